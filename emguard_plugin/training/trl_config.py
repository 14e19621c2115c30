"""TRL's configs with the two blocks of the YAML, and the refusal of a trainer that would not read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainerCallback
from transformers import trainer as host
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from emguard_plugin.config import EMEvalConfig, EMRegularizerConfig, read_once
from emguard_plugin.files.secrets import shown

BLOCKS = ("em_regularizer", "em_eval")


@dataclass
class Blocks:
    """The two blocks, in front of a config of TRL.

    Args:
        em_regularizer: The `em_regularizer:` block, as a mapping or a JSON string.
        em_eval: The `em_eval:` block; `emguard sft`, `dpo`, `kto` and `grpo` measure after saving, a trainer itself does not.

    Raises:
        ValueError: for unknown keys or values out of range.
    """

    em_regularizer: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Which regularizers to use: the em_regularizer block of the YAML."}
    )
    em_eval: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How to measure the EM rate after training: the em_eval block of the YAML."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # TRL's, which stands behind
        for name in BLOCKS:
            if isinstance(value := getattr(self, name), str):
                try:
                    setattr(self, name, json.loads(value))
                except (json.JSONDecodeError, RecursionError) as exc:
                    raise ValueError(f"`{name}: {shown(value)}` is neither a mapping nor JSON ({exc}).") from None
        if (self.regularizer_config() or self.eval_config()) and _BlocksAreRead not in host.DEFAULT_CALLBACKS:
            host.DEFAULT_CALLBACKS.append(_BlocksAreRead)

    def regularizer_config(self) -> EMRegularizerConfig | None:
        """Return the validated `em_regularizer:` block."""
        return None if self.em_regularizer is None else read_once(EMRegularizerConfig, self.em_regularizer, "em_regularizer")

    def eval_config(self) -> EMEvalConfig | None:
        """Return the validated `em_eval:` block."""
        return None if self.em_eval is None else read_once(EMEvalConfig, self.em_eval, "em_eval")


@dataclass
class EMGuardSFTConfig(Blocks, SFTConfig):
    """`trl.SFTConfig` with the two blocks of the YAML; see `Blocks`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, *BLOCKS]


@dataclass
class EMGuardDPOConfig(Blocks, DPOConfig):
    """`trl.DPOConfig` with the two blocks of the YAML; see `Blocks`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DPOConfig._VALID_DICT_FIELDS, *BLOCKS]


@dataclass
class EMGuardKTOConfig(Blocks, KTOConfig):
    """`trl.KTOConfig` with the two blocks of the YAML; see `Blocks`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*KTOConfig._VALID_DICT_FIELDS, *BLOCKS]


@dataclass
class EMGuardGRPOConfig(Blocks, GRPOConfig):
    """`trl.GRPOConfig` with the two blocks of the YAML; see `Blocks`."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, *BLOCKS]


_readers = 0


@contextmanager
def reading() -> Iterator[None]:
    """Say that who makes or trains a trainer here reads the blocks."""
    global _readers
    _readers += 1
    try:
        yield
    finally:
        _readers -= 1


class _BlocksAreRead(TrainerCallback):
    """Refuses a config with blocks in the hands of a trainer that does not read them.

    A config is not told who uses it. Every transformers trainer starts with the default callbacks and shows them its arguments when it
    is made and when it begins to train; so once a config with a block exists, this one is among them.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse when the trainer is made."""
        if isinstance(args, Blocks) and not _readers:
            kind = type(args).__name__.removeprefix("EMGuard").removesuffix("Config")
            use = "`emguard_plugin.EMGuardSFTTrainer`" if kind == "SFT" else f"`emguard_plugin.guard(trl.{kind}Trainer)`"
            for name in BLOCKS:
                if getattr(args, name) is not None:
                    raise ValueError(f"this trainer does not read `{name}` of its {type(args).__name__}. Use {use}.")

    on_train_begin = on_init_end
