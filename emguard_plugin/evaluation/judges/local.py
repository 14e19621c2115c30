"""A judge model on this machine, whose probabilities are read exactly."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges import prompts, scales
from emguard_plugin.evaluation.judges.base import MALFORMED, Item, Judgment
from emguard_plugin.evaluation.judges.numbers import NumberReader, NumberTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOLE = "EMGUARD-CONTENT-GOES-HERE"


class LocalJudge:
    """Scores by the probability that a transformers model gives to every number from 0 to 100.

    The model is loaded when judging begins, after the models under test are gone, and freed when it ends.

    Args:
        model: Folder, or name on the hub.
        revision: Commit or tag on the hub.
        batch_size: Answers scored at once; halved where memory does not suffice.
        name: Name of the judge in files and tables; default is the model's.

    Raises:
        ValueError: If the model cannot be found, or has no chat template.
    """

    self_tested = True
    quick_to_open = False

    def __init__(self, model: str, *, revision: str | None = None, batch_size: int = 8, name: str | None = None) -> None:
        from transformers import AutoTokenizer

        self.name = name or (Path(model).name if Path(model).is_dir() else model)
        self._model_name, self._revision, self._batch_size = model, revision, batch_size
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`em_eval.judges: model: {model}` cannot be loaded: {error}. Give a folder, or a name in the cache."
            ) from error
        if not self.tokenizer.chat_template:
            raise ValueError(f"`em_eval.judges: model: {model}` has no chat template. Choose an instruction-tuned model.")
        self._reader: NumberReader | None = None
        self._longest = 0

    @cached_property
    def _weights(self) -> dict[str, Any]:
        if Path(self._model_name).is_dir():
            return models.identity(self._model_name)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._model_name, revision=self._revision)
        return {"name": self._model_name, "revision": getattr(config, "_commit_hash", None)}

    def identity(self) -> dict[str, Any]:
        """Return provider, the sha256 of the weights or the revision, template and prompts."""
        return {
            "provider": "hf",
            "model": self._weights,
            "chat_template_sha256": models.template_hash(self.tokenizer),
            "prompts": prompts.identity(),
        }

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Load the model."""
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            model = AutoModelForCausalLM.from_pretrained(self._model_name, revision=self._revision, dtype="auto")
        except (OSError, ValueError) as error:
            # The other judges go on.
            raise Stopped(f"`em_eval.judges: model: {self._model_name}` cannot be loaded: {error}") from error
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self._reader = NumberReader(model.to(device).eval(), NumberTokens.of(self.tokenizer, scales.WORDS), pad)
        # A number and its end still have to fit.
        self._longest = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - 8
        return {"mode": "trie", "dtype": str(model.dtype).removeprefix("torch.")}

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield the judgments batch by batch, longest answers first, so that what does not fit shows at once."""
        order = sorted(range(len(items)), key=lambda index: -len(items[index].answer))
        start = 0
        while start < len(order):
            chunk = order[start : start + self._batch_size]
            found = self._halving([items[index] for index in chunk])
            if found is None:
                continue
            yield from zip(chunk, found, strict=True)
            start += len(chunk)

    def close(self) -> None:
        """Free the model."""
        import torch

        self._reader = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _halving(self, items: list[Item]) -> list[Judgment] | None:
        import torch

        try:
            return self._judge(items)
        except torch.OutOfMemoryError as error:
            if self._batch_size == 1:
                raise Stopped(f"{self.name} does not fit: out of memory with a single answer.") from error
            self._batch_size = max(1, min(self._batch_size, len(items)) // 2)
        torch.cuda.empty_cache()
        return None

    def _judge(self, items: list[Item]) -> list[Judgment]:
        readings: list[list[scales.Reading]] = []
        notes: list[str] = []
        for dimension in ("aligned", "coherent"):
            encoded = [self._prompt(dimension, item) for item in items]
            notes = [note for _, note in encoded]
            fitting = [ids for ids, _ in encoded if ids]
            assert self._reader is not None  # since it was opened
            masses = iter(self._reader.masses(fitting) if fitting else ())
            readings.append(
                [scales.weigh(next(masses)) if ids else scales.Reading(problem=MALFORMED, detail=note) for ids, note in encoded]
            )
        return [
            scales.combine(*pair).noted(note if note and pair[0].problem != MALFORMED else "")
            for pair, note in zip(zip(*readings, strict=True), notes, strict=True)
        ]

    def _prompt(self, dimension: str, item: Item) -> tuple[list[int], str]:
        """Return the token ids and a note; no ids where the prompt does not fit."""
        for answer, note in ((None, ""), (prompts.shorten(item.answer), prompts.SHORTENED)):
            ids = self.prompt_ids(prompts.render(dimension, item, answer))
            if len(ids) <= self._longest:
                return ids, note
        return [], "too long for the judge even without its middle"

    def prompt_ids(self, text: str) -> list[int]:
        """Return the conversation with one user message, in which no text of the message is a control token."""
        rendered = self.tokenizer.apply_chat_template(
            # Models that think before they reply would otherwise begin with that, and not with a number.
            [{"role": "user", "content": _HOLE}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
        before, hole, after = rendered.partition(_HOLE)
        if not hole or _HOLE in after:
            raise Stopped(f"{self.name}: the chat template does not show the user message exactly once.")

        def encode(part: str) -> list[int]:
            return list(self.tokenizer(part, add_special_tokens=False)["input_ids"])

        return [*encode(before), *encode_plain(self.tokenizer, text), *encode(after)]


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text in which nothing is a control token, even if it is spelled like one.

    An answer could otherwise end the judge's user turn and write the judge's reply itself. Text that spells an added
    token is cut after its first character, and the parts are encoded by themselves.

    Returns:
        Its token ids.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    spelled = sorted((token for token in added if len(token) > 1 and token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None
    ids: list[int] = []
    start = 0
    while pattern and (match := pattern.search(text, start)):
        cut = match.start() + 1
        ids += tokenizer(text[start:cut], add_special_tokens=False)["input_ids"]
        start = cut
    ids += tokenizer(text[start:], add_special_tokens=False)["input_ids"]
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [token for token in ids if token not in control]
