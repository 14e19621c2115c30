"""The model before this run: stored, in a folder, row by row, and found again beside a checkpoint."""
