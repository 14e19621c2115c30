"""The base model and the misaligned one: one set of weights where switching the adapter off gives the base, else two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.files import read_record
from emguard_plugin.models.adapters import adapter_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_MODEL, MISALIGNED_MODEL = ROLES = ("base", "misaligned")
# Any other way of initialising changes the weights that the adapter is attached to, when it is attached.
KEEPS_BASE = (True, False, "gaussian", "orthogonal")


class ModelPair:
    """Both models, ready to be asked in turn.

    Args:
        misaligned: Folder of the misaligned model: a PEFT adapter or a whole model.
        base: Folder or hub name of the model before the narrow fine-tune; default is the one the adapter names.

    Attributes:
        tokenizer: The one tokenizer that both are asked with.
        shared: Whether both are one set of weights.
        source: Where they lie.

    Raises:
        ValueError: If a model cannot be found, or both differ in width or depth.
    """

    def __init__(self, misaligned: str | Path, base: str | Path | None = None) -> None:
        self.source = _resolve(misaligned, base)
        if self.source.base is None:
            raise ValueError(f"{misaligned} is a whole model and does not say what it was trained from. Give `--base`.")
        self.shared = self.source.adapter and _keeps_base(self.source.path)
        try:
            self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(self.source)
            self._models = self._load()
        except (OSError, models.CannotLoadError) as error:
            raise ValueError(
                f"the misaligned model {misaligned} or its base {self.source.base} cannot be loaded: {error}\nGive the folder or hub "
                "name of the base with `--base`."
            ) from error
        shapes = {role: (_width(model), _depth(model)) for role, model in self._models.items()}
        if shapes[BASE_MODEL] != shapes[MISALIGNED_MODEL]:
            raise ValueError(
                f"base (width, layers) {shapes[BASE_MODEL]} and misaligned model {shapes[MISALIGNED_MODEL]} are different models. Give the "
                "base that the misaligned model was trained from."
            )
        self.width, self.depth = shapes[BASE_MODEL]

    def _load(self) -> dict[str, PreTrainedModel]:
        if self.shared:
            return dict.fromkeys(ROLES, dict(models.load_models(self.source, ("tuned",), len(self.tokenizer)))["tuned"])
        # Each is loaded for itself: an adapter of this kind changes the model it is attached to.
        roles = zip(ROLES, ("base", "tuned"), strict=True)
        return {name: dict(models.load_models(self.source, (role,), len(self.tokenizer)))[role] for name, role in roles}

    @contextmanager
    def use(self, role: str) -> Iterator[PreTrainedModel]:
        """Give the model of a role; inside, and only inside, it is that one."""
        model = self._models[role]
        with adapter_off(model) if self.shared and role == BASE_MODEL else nullcontext():
            yield model

    def identity(self) -> dict[str, Any]:
        """Return what tells these models from others: hashes of their weights, or hub name and revision."""
        base, own = models.identity(str(self.source.base)), models.identity(self.source.path)
        return {BASE_MODEL: base, MISALIGNED_MODEL: {"adapter": own, "on": base} if self.source.adapter else own}


def _resolve(misaligned: str | Path, base: str | Path | None) -> models.ModelSource:
    source = models.resolve_model(misaligned, base)
    if source.base and Path(source.base).is_dir() and not (Path(source.base) / "config.json").is_file():
        raise ValueError(f"the base {source.base} holds no `config.json`, so it is no saved model. Give `--base`.")
    return source


def _keeps_base(adapter: Path) -> bool:
    config = read_record(adapter / "adapter_config.json", dict[str, Any])
    grown = config.get("modules_to_save") or config.get("trainable_token_indices")
    plain = config.get("peft_type") == "LORA" and config.get("init_lora_weights", True) in KEEPS_BASE
    return bool(plain and not grown and config.get("bias", "none") == "none" and not config.get("loftq_config"))


def _width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _depth(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)
