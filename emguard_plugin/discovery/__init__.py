"""Discovery (BLOCK-EM, arXiv 2602.00767): which latents of a sparse autoencoder cause the misaligned behaviour.

Stage 1 ranks latents by how far the fine-tune moved them. Stage 2 steers each: induce misalignment in the base model, repair
the misaligned one. Stage 3 finds the strength that each bears without breaking the answers, and chooses the set. `--rule attribution`,
which is ours, takes gradients in the place of stages 2 and 3.
"""

from __future__ import annotations
