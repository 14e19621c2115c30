"""Find, name and load the fine-tuned model and the model it started from."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emguard_plugin.files import first_line, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# Both patterns also match what a trainer leaves beside the weights.
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin", "scaler.pt")


class CannotLoadError(ValueError):
    """A folder or name from which no model or tokenizer can be loaded."""


@contextmanager
def loading(what: str, name: str | Path) -> Iterator[None]:
    """Say which model cannot be loaded: libraries raise whatever their parts raise, and name no file.

    Raises:
        CannotLoadError: In place of every exception but those of memory.
    """
    import torch

    try:
        yield
    except (CannotLoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CannotLoadError(f"the {what} of {name} cannot be loaded: {type(error).__name__}: {first_line(error)}.") from error


@dataclass(frozen=True)
class ModelSource:
    """Where a fine-tuned model lies.

    Attributes:
        path: The folder that was asked for.
        base: Folder or hub name of the model it started from; None if nothing tells.
        adapter: True if `path` holds a PEFT adapter for `base`, False if it holds a whole model.
    """

    path: Path
    base: str | None
    adapter: bool


def resolve_model(path: str | Path, base: str | Path | None = None) -> ModelSource:
    """Look at a model folder.

    Args:
        path: Folder with `adapter_config.json` (a PEFT adapter) or with `config.json` (a whole model).
        base: The model before fine-tuning; default is what the adapter names. A whole model names none.

    Returns:
        Where the model lies, and what it started from.

    Raises:
        ValueError: If the folder is neither, or if the adapter's base is named nowhere or does not exist.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"model folder {path} does not exist. Give the folder that the training run saved.")
    adapter_config = path / "adapter_config.json"
    if adapter_config.is_file():
        named = base or named_base(path)
        if not named:
            raise ValueError(
                f"{adapter_config} does not name its base model. Give `--base` (`base=` in Python), the model it was trained on."
            )
        return ModelSource(path, _checked_base(str(named), path), adapter=True)
    if (path / "config.json").is_file():
        return ModelSource(path, None if base is None else _checked_base(str(base), path), adapter=False)
    raise ValueError(f"{path} holds neither `adapter_config.json` nor `config.json`, so it is no saved model.")


def named_base(adapter: Path) -> str | None:
    """Return the base model that an adapter's folder names."""
    return read_record(adapter / "adapter_config.json", dict[str, Any]).get("base_model_name_or_path")


def _checked_base(base: str, model: Path) -> str:
    # A path is told from a hub name ("org/name") by its shape; hub names are left to transformers.
    looks_like_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    folder = Path(base).expanduser()
    if folder.is_dir():
        return str(folder)
    if looks_like_path:
        raise ValueError(
            f"{model} was trained on {base}, which is no folder here. Give `--base` (`base=` in Python) with its present place."
        )
    return base


def identity(name: str | Path) -> dict[str, Any]:
    """Return what tells one model from another: its files' sha256, or its hub name and revision.

    Args:
        name: A folder, or the name of a model on the hub whose files are in the local cache.

    Raises:
        ValueError: If the name is neither a folder with weights nor in the local cache.
    """
    folder = Path(name)
    if not folder.is_dir():
        from transformers import AutoConfig

        return {"name": str(name), "revision": getattr(AutoConfig.from_pretrained(str(name)), "_commit_hash", None)}
    files = _weight_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no weights ({', '.join(WEIGHTS)}).")
    hashes = {file.name: _sha256(file) for file in files}
    # `.` has no name of its own.
    return {"name": Path(os.path.abspath(folder)).name, "weights_sha256": hashes}


def _weight_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)} - {folder / x for x in NOT_WEIGHTS})


def holds_weights(name: str | Path) -> bool:
    """Whether a name is that of a folder with weights, which `identity` can tell from others."""
    return Path(name).is_dir() and bool(_weight_files(Path(name)))


def own_part(identity: Any) -> dict[str, Any]:
    """Return the identity of a fine-tuned model without that of the base it stands on."""
    found = identity.get("adapter", identity) if isinstance(identity, dict) else {}
    return found if isinstance(found, dict) else {}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the fine-tuned model was saved with, or its base's where it saved none.

    Base and fine-tuned model are asked with the same tokenizer and template, as their answers are compared.

    Returns:
        The tokenizer, as it was saved.
    """
    from transformers import AutoTokenizer

    own = (source.path / "tokenizer_config.json").is_file()
    place = source.path if own or not source.base else source.base
    with loading("tokenizer", place):
        return AutoTokenizer.from_pretrained(place)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def load_models(source: ModelSource, roles: tuple[str, ...], vocabulary: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield (role, model) for each role asked for, `base` before `tuned`; one model is in memory at a time.

    An adapter is attached to the very base that just answered. The base answers before that, and not with the adapter
    switched off, because some adapters (PiSSA, LoftQ) change the weights they are attached to.

    Args:
        source: From `resolve_model`.
        roles: Of `base` and `tuned`.
        vocabulary: Length of the tokenizer; an adapter trained with added tokens gets an embedding of its size.
    """
    model: Any = None
    if "base" in roles or source.adapter:
        assert source.base is not None  # looked at in the plan
        model = _load(source.base)
    if "base" in roles:
        yield "base", model
    if "tuned" not in roles:
        return
    if source.adapter:
        yield "tuned", _attach(model, source.path, vocabulary)
        return
    del model
    gc.collect()
    yield "tuned", _load(source.path)


def _load(name: str | Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with loading("model", name):
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()


def _attach(model: PreTrainedModel, adapter: Path, vocabulary: int) -> PreTrainedModel:
    from peft import PeftModel

    config = read_record(adapter / "adapter_config.json", dict[str, Any])
    holds_embedding = bool(config.get("modules_to_save") or config.get("trainable_token_indices"))
    if holds_embedding and vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary)
    with loading("adapter", adapter):
        return PeftModel.from_pretrained(model, adapter).eval()
