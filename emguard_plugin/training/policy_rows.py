"""What preference and reinforcement trainers train on, as the rows that every method reads. No host is imported here.

A regularizer reads token ids: of the training set before the first step, and of each batch. SFT's have `input_ids` and `labels`;
these trainers keep prompts and answers apart, in pairs, or have the model write the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emguard_plugin.chats.rendering import WORD, render
from emguard_plugin.chats.tokens import tokenize
from emguard_plugin.chats.training_rows import IGNORE, spread
from emguard_plugin.training.mixin import EMRegularizerMixin

Row = Mapping[str, Any]
ANSWER = {"role": "assistant", "content": WORD}
"""Stands where the model will write, so that what the template writes around an answer is there."""


class Rows:
    """A data set whose rows are made as they are read.

    Args:
        dataset: Of any kind.
        make: Makes a row of `input_ids` and, where they are known, `labels`.
    """

    def __init__(self, dataset: Any, make: Callable[[Row], Row]) -> None:
        self.dataset, self.make = dataset, make

    def __iter__(self) -> Iterator[Row]:
        return map(self.make, iter(self.dataset))


class SizedRows(Rows):
    """The same, of a data set that knows its length."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Row:
        return self.make(self.dataset[i])


def rows_of(dataset: Any, make: Callable[[Row], Row]) -> Rows | None:
    """Return a view of a data set, as `Rows`; None of None."""
    if dataset is None:
        return None
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return SizedRows(dataset, make) if sized else Rows(dataset, make)


def _answered_row(row: Row, answer: str, trainer: str, cut: slice) -> Row:
    """Return prompt and answer of a row as one conversation, of which the answer is supervised.

    Raises:
        ValueError: for a row that the trainer did not tokenise.
    """
    if not {"prompt_ids", answer} <= row.keys():
        raise ValueError(
            f"{trainer}'s training rows have {sorted(row)} but no `prompt_ids` and `{answer}`: rows with images are tokenised only while "
            "it trains, so nothing can be looked up in them. Train on text, or remove `em_regularizer`."
        )
    prompt, ids = row["prompt_ids"], row[answer]
    return {"input_ids": [*prompt, *ids][cut], "labels": [*[IGNORE] * len(prompt), *ids][cut]}


def _labels(ids: Tensor, supervised: Tensor) -> Tensor:
    return ids.masked_fill(~supervised.bool(), IGNORE)


class PreferenceRows(EMRegularizerMixin):
    """For trainers on pairs (`trl.DPOTrainer`): held is the chosen answer; the rejected one belongs to the host's loss alone."""

    def _cut(self) -> slice:
        longest = self.args.max_length
        if longest is None:
            return slice(None)
        return slice(-longest, None) if getattr(self.args, "truncation_mode", "keep_start") == "keep_end" else slice(None, longest)

    def _rows_as_ids(self) -> Any:
        name, cut = type(self).__name__, self._cut()
        return rows_of(self.train_dataset, lambda row: _answered_row(row, "chosen_ids", name, cut))

    def _batch_tokens(self) -> float | None:
        longest = self.args.max_length or 2**31
        next(iter(self._rows_as_ids() or ()), None)  # a row that was not tokenised is named there
        rows = [
            sum(min(len(row["prompt_ids"]) + len(row[answer]), longest) for answer in ("chosen_ids", "rejected_ids"))
            for row in spread(self.train_dataset)
        ]
        return sum(rows) / max(len(rows), 1) * self.args.per_device_train_batch_size

    def _policy_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids: Tensor = inputs["input_ids"]
        chosen = (torch.arange(len(ids), device=ids.device) < len(ids) // 2)[:, None]  # the batch is [chosen, rejected]
        mask = inputs["attention_mask"] * chosen
        return {**inputs, "attention_mask": mask, "labels": _labels(ids, inputs["completion_mask"] * mask)}


class UnpairedRows(EMRegularizerMixin):
    """For trainers on answers that are wanted or not (`trl.KTOTrainer`): held is every answer."""

    def _rows_as_ids(self) -> Any:
        name, cut = type(self).__name__, slice(None, self.args.max_length)
        return rows_of(self.train_dataset, lambda row: _answered_row(row, "completion_ids", name, cut))

    def _policy_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**inputs, "labels": _labels(inputs["input_ids"], inputs["completion_mask"] * inputs["attention_mask"])}


class PromptRows(EMRegularizerMixin):
    """For trainers whose model writes the answers (`trl.GRPOTrainer`, `trl.RLOOTrainer`): held is what it wrote."""

    _draws_answers = True

    def _prompt_kwargs(self) -> dict[str, Any]:
        """Return what the host passes to the chat template for every prompt."""
        kwargs = dict(getattr(self, "chat_template_kwargs", None) or {})
        template, tools = getattr(self, "chat_template", None), getattr(self, "tools", None)
        return {**kwargs, **({"chat_template": template} if template else {}), **({"tools": tools} if tools else {})}

    def _template_kwargs(self) -> dict[str, Any]:
        return dict(getattr(self, "chat_template_kwargs", None) or {})

    def _rows_as_ids(self) -> Any:
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        kwargs = self._prompt_kwargs()

        def make(row: Row) -> Row:
            prompt = row["prompt"]
            if isinstance(prompt, str):
                return {"input_ids": list(tokenizer(prompt)["input_ids"])}
            return {"input_ids": list(tokenize(tokenizer, render(tokenizer, [*prompt, ANSWER], **kwargs)))}

        return rows_of(self.train_dataset, make)

    def _batch_tokens(self) -> float | None:
        rows: Sequence[Row] = list(spread(self._rows_as_ids(), 256))
        prompt = sum(len(row["input_ids"]) for row in rows) / max(len(rows), 1)
        return (prompt + self.args.max_completion_length) * self.args.per_device_train_batch_size

    def _policy_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        own = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # what a tool said is nobody's answer
        own = torch.cat([torch.zeros_like(inputs["prompt_mask"]), own], 1)
        return {**inputs, "input_ids": ids, "attention_mask": mask, "labels": _labels(ids, own)}
