"""What every study on the lab does: narrow fine-tunes over seeds, measured on held-out wordings, one stored line per run.

Studies themselves, with their methods and settings, are programs in `benchmarks/`.
"""
