"""TRL's trainers with a guard: `EMGuardSFTTrainer`, and `guard` for the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

from trl import SFTTrainer

from emguard_plugin.chats import Chat
from emguard_plugin.evaluation.asking.as_trained import constant_kwargs
from emguard_plugin.regularizers import build_regularizers
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.training.mixin import EMRegularizerMixin
from emguard_plugin.training.policy_rows import PreferenceRows, PromptRows, UnpairedRows
from emguard_plugin.training.trl_chats import has_chats, read_chats
from emguard_plugin.training.trl_config import Blocks, reading


class TRLGuard(EMRegularizerMixin):
    """In front of any TRL trainer, same arguments; regularizers go into `callbacks` or into the config's `em_regularizer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _named(super().__init__, args, kwargs)
        dataset = given.get("train_dataset")
        self._given_rows = None if given.get("formatting_func") else dataset
        self._column_kwargs = _first_template_kwargs(dataset)
        self._rendered_alike, self._same_kwargs = constant_kwargs(dataset)[::-1]
        with reading():
            super().__init__(*args, **kwargs)
        if isinstance(self.args, Blocks) and (config := self.args.regularizer_config()) is not None:
            for callback in build_regularizers(config):
                self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the host does, and say who measures the EM rate."""
        if not any(isinstance(callback, EMRegularizerCallback) for callback in self.callback_handler.callbacks):
            self.accelerator.print(
                "There is no `em_regularizer:` block and no regularizer among the callbacks: this run is NOT regularized."
            )
        with reading():
            result = super().train(*args, **kwargs)
        if getattr(self.args, "em_eval", None) is not None:
            kind = type(self.args).__name__.removeprefix("EMGuard").removesuffix("Config").lower()
            self.accelerator.print(
                f"em_eval: `emguard {kind}` measures once the model is saved. From Python: save the model, then run "
                f"`emguard eval {self.args.output_dir} --config FILE`, FILE being a YAML with the block."
            )
        return result

    def _template_kwargs(self) -> dict[str, Any]:
        return self._column_kwargs

    def _chats(self) -> Callable[[], Iterable[Chat]] | None:
        if not has_chats(self._given_rows):
            return None
        return partial(read_chats, self._given_rows, self.processing_class, getattr(self, "chat_template", None))

    def rendering_settings(self) -> Mapping[str, Any]:
        """Return the rows' `chat_template_kwargs` where all have the same; where they differ, no question has them all."""
        if self._rendered_alike:
            return {"chat_template_kwargs": self._same_kwargs}
        self.accelerator.print(
            "em_eval: the rows' `chat_template_kwargs` differ, so questions are rendered without any. Set "
            "`em_eval.chat_template_kwargs` to those of the rows that matter."
        )
        return {}


class EMGuardSFTTrainer(TRLGuard, SFTTrainer):
    """`trl.SFTTrainer`, same arguments; regularizers go into `callbacks` or into `EMGuardSFTConfig.em_regularizer`."""

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "emguard"]
    _name = "EMGuard SFT"


class PreferenceGuard(TRLGuard, PreferenceRows):
    """In front of `trl.DPOTrainer`."""


class UnpairedGuard(TRLGuard, UnpairedRows):
    """In front of `trl.KTOTrainer`."""


class PromptGuard(PromptRows, TRLGuard):
    """In front of `trl.GRPOTrainer` and `trl.RLOOTrainer`."""

    def _chats(self) -> Callable[[], Iterable[Chat]] | None:
        if not has_chats(self._given_rows):
            return None
        return partial(read_chats, self._given_rows, self.processing_class, None, self._prompt_kwargs())

    def rendering_settings(self) -> Mapping[str, Any]:
        """Return the config's `chat_template_kwargs`."""
        return {"chat_template_kwargs": self._template_kwargs()}


def _named(init: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; those that a class in between hands on with `**kwargs` too."""
    try:
        signature = inspect.signature(init)
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return kwargs  # the host says what is wrong with them
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {**bound.arguments, **(bound.arguments.get(rest, {}) if rest else {})}


def _first_template_kwargs(dataset: Any) -> dict[str, Any]:
    """Return TRL's `chat_template_kwargs` column of the first row; the preparation of the data drops it."""
    if dataset is None or "chat_template_kwargs" not in (getattr(dataset, "column_names", None) or ["chat_template_kwargs"]):
        return {}  # a streamed data set may not know its columns before its first row
    first: Mapping[str, Any] = next(iter(dataset), {})
    return dict(first.get("chat_template_kwargs") or {})
