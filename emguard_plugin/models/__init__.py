"""A transformers model under PEFT: its parts, its modes, what it computes on the way, and which one it is."""
