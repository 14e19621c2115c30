"""BLOCK-EM: a small signed set of SAE latents must not move in the bad direction (arXiv 2602.00767)."""
