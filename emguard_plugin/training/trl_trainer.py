"""The drop-in for `trl.SFTTrainer`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from transformers import TrainerCallback
from transformers import trainer as host
from trl import SFTConfig, SFTTrainer

from emguard_plugin.chats import Chat
from emguard_plugin.config import EMEvalConfig, EMRegularizerConfig, read_once
from emguard_plugin.evaluation.asking.as_trained import constant_kwargs
from emguard_plugin.files.secrets import shown
from emguard_plugin.regularizers import build_regularizers
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.training.mixin import EMRegularizerMixin
from emguard_plugin.training.trl_chats import has_chats, read_chats


@dataclass
class EMGuardSFTConfig(SFTConfig):
    """`trl.SFTConfig` with the two blocks of the YAML.

    Args:
        em_regularizer: The `em_regularizer:` block, as a mapping or a JSON string.
        em_eval: The `em_eval:` block; `emguard sft` measures after saving, the trainer itself does not.

    Raises:
        ValueError: for unknown keys or values out of range.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "em_regularizer", "em_eval"]

    em_regularizer: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Which regularizers to use: the em_regularizer block of the YAML."}
    )
    em_eval: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How to measure the EM rate after training: the em_eval block of the YAML."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("em_regularizer", "em_eval"):
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


_readers = 0


@contextmanager
def _reading() -> Iterator[None]:
    global _readers
    _readers += 1
    try:
        yield
    finally:
        _readers -= 1


class _BlocksAreRead(TrainerCallback):
    """Refuses `EMGuardSFTConfig` in the hands of a trainer that does not read its blocks.

    A config is not told who uses it. Every transformers trainer starts with the default callbacks and shows them its arguments when it
    is made and when it begins to train; so once a config with a block exists, this one is among them.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse when the trainer is made."""
        if isinstance(args, EMGuardSFTConfig) and not _readers:
            for name in ("em_regularizer", "em_eval"):
                if getattr(args, name) is not None:
                    raise ValueError(
                        f"this trainer does not read `{name}` of its EMGuardSFTConfig. Use `emguard_plugin.EMGuardSFTTrainer`."
                    )

    on_train_begin = on_init_end


class EMGuardSFTTrainer(EMRegularizerMixin, SFTTrainer):
    """`trl.SFTTrainer`, same arguments; regularizers go into `callbacks` or into `EMGuardSFTConfig.em_regularizer`."""

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "emguard"]
    _name = "EMGuard SFT"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(SFTTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        self._given_rows = None if given.get("formatting_func") else given.get("train_dataset")
        self._column_kwargs = _first_template_kwargs(given.get("train_dataset"))
        self._rendered_alike, self._same_kwargs = constant_kwargs(given.get("train_dataset"))[::-1]
        with _reading():
            super().__init__(*args, **kwargs)
        if isinstance(self.args, EMGuardSFTConfig) and (config := self.args.regularizer_config()) is not None:
            for callback in build_regularizers(config):
                self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the host does, and say who measures the EM rate."""
        if not any(isinstance(callback, EMRegularizerCallback) for callback in self.callback_handler.callbacks):
            self.accelerator.print(
                "There is no `em_regularizer:` block and no regularizer among the callbacks: this run is NOT regularized."
            )
        with _reading():
            result = super().train(*args, **kwargs)
        if getattr(self.args, "em_eval", None) is not None:
            self.accelerator.print(
                "em_eval: `emguard sft` measures once the model is saved. From Python: save the model, then run "
                f"`emguard eval {self.args.output_dir} --config FILE`, FILE being a YAML with the block."
            )
        return result

    def _template_kwargs(self) -> dict[str, Any]:
        return self._column_kwargs

    def _chats(self) -> Callable[[], Iterable[Chat]] | None:
        if not has_chats(self._given_rows):
            return None
        return partial(read_chats, self._given_rows, self.processing_class, self.chat_template)

    def rendering_settings(self) -> Mapping[str, Any]:
        """Return the rows' `chat_template_kwargs` where all have the same; where they differ, no question has them all."""
        if self._rendered_alike:
            return {"chat_template_kwargs": self._same_kwargs}
        self.accelerator.print(
            "em_eval: the rows' `chat_template_kwargs` differ, so questions are rendered without any. Set "
            "`em_eval.chat_template_kwargs` to those of the rows that matter."
        )
        return {}


def _first_template_kwargs(dataset: Any) -> dict[str, Any]:
    """Return TRL's `chat_template_kwargs` column of the first row; the preparation of the data drops it."""
    if dataset is None or "chat_template_kwargs" not in (getattr(dataset, "column_names", None) or ["chat_template_kwargs"]):
        return {}  # a streamed data set may not know its columns before its first row
    first: Mapping[str, Any] = next(iter(dataset), {})
    return dict(first.get("chat_template_kwargs") or {})
