"""Signed SAE latents: the subset encoder, the file that holds one, and loading SAEs through sae-lens.

What a file says of itself is read without torch (`description`). Encoding needs torch and safetensors; `sae` imports sae-lens on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emguard_plugin.latents.description import LatentsError

if TYPE_CHECKING:
    from emguard_plugin.latents.encoder import SubsetEncoder
    from emguard_plugin.latents.latent_set import LatentSet

_HOMES = {"SubsetEncoder": "encoder", "LatentSet": "latent_set"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = ["LatentSet", "LatentsError", "SubsetEncoder"]
