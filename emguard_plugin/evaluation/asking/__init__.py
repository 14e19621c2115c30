"""Questions, how a model is asked them, and its answers."""
