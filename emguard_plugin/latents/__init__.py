"""Signed SAE latents: the subset encoder, the file that holds one, and loading SAEs through sae-lens.

Reading a latent-set file and encoding with it need torch and safetensors alone; `sae` imports sae-lens on first use.
"""

from emguard_plugin.latents.encoder import SubsetEncoder
from emguard_plugin.latents.latent_set import LatentsError, LatentSet

__all__ = ["LatentSet", "LatentsError", "SubsetEncoder"]
