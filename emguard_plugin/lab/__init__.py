"""The lab: a tiny chat model in which emergent misalignment really happens, on two CPU cores and without downloads.

It ships an aligned base model (`model_path()`), the synthetic world it was trained on, and an exact judge.
"""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from pathlib import Path

_WHERE = {
    "judge_answer": "judge",
    "build_base": "build",
    "BuildSettings": "build",
    "make_tokenizer": "tokenizer",
}

__all__ = [*_WHERE, "model_path"]


def model_path() -> Path:
    """Return the folder of the shipped base model, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(str(files(__name__) / "data" / "model"))


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
