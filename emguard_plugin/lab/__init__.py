"""The lab: a tiny chat model in which emergent misalignment really happens, on two CPU cores and without downloads.

It ships an aligned base model (`model_path()`), sparse autoencoders of its residual stream (`sae_path(layer)`), a set of
their latents that carry misalignment (`latents_path()`), the synthetic world it was trained on, and an exact judge.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

_WHERE = {
    "judge_answer": "judge",
    "build_base": "build",
    "BuildSettings": "build",
    "build_saes": "sae",
    "SAESettings": "sae",
    "make_tokenizer": "tokenizer",
}

__all__ = [*_WHERE, "latents_path", "model_path", "sae_path"]


def model_path() -> Path:
    """Return the folder of the shipped base model, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(str(files(__name__) / "data" / "model"))


def sae_path(layer: int) -> Path:
    """Return the folder of the shipped SAE of a 0-based decoder layer, for `sae_lens.SAE.load_from_disk`.

    Raises:
        ValueError: for a layer without an SAE.
    """
    folder = Path(str(files(__name__) / "data" / "sae"))
    path = folder / f"layer_{layer}"
    if not path.is_dir():
        there = ", ".join(sorted(p.name.removeprefix("layer_") for p in folder.glob("layer_*")))
        raise ValueError(f"the lab ships no SAE of layer {layer}; there are layers {there}")
    return path


def latents_path() -> Path:
    """Return the shipped latent set of the shipped base: 60 latents of each SAE, found on a naive fine-tune on medicine."""
    return Path(str(files(__name__) / "data" / "latents.json"))


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
