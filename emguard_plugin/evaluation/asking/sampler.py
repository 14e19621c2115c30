"""Draw answers from a transformers model, each from its own random numbers.

Sampling is inverse-CDF: answer i at step t takes the token at which the cumulative softmax of its logits passes a
uniform number u(i, t) that was fixed beforehand by (seed, suite, question, paraphrase, draw). So an answer depends on
neither the batch it is computed in nor the global RNG, and two models asked the same draw use the same u.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from emguard_plugin.evaluation.asking.draws import AnswerKey, inverse_cdf, uniforms
from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.asking.reasoning import TraceMarks, marks_of, opened_by, split_tokens
from emguard_plugin.evaluation.asking.rendering import Rendering

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TELL_EVERY = 0.5
"""Seconds between two looks at how far a batch is; a look waits for the device."""


@dataclass(frozen=True)
class Request:
    """One answer to draw: `draw` counts from 0 within a wording; `temperature` 0 is greedy."""

    suite: str
    question: Question
    draw: int
    temperature: float

    @property
    def key(self) -> AnswerKey:
        """Name of the answer."""
        return AnswerKey(self.suite, self.question.id, self.question.paraphrase, self.draw)


@dataclass(frozen=True)
class Answer:
    """One drawn answer.

    Attributes:
        request: What was asked.
        text: The whole reply without special tokens, the marks of a reasoning trace aside.
        tokens: Its length in tokens, the end-of-turn token included.
        finish: `stop` if the model ended its turn, `length` if `max_new_tokens` cut it off.
        trace: What the model thought aloud before its answer; None for a reply without a reasoning trace.
        answer: What follows the trace; None if it never closed, and for a reply without one, which is all answer.
    """

    request: Request
    text: str
    tokens: int
    finish: str
    trace: str | None = None
    answer: str | None = None

    def stored(self) -> dict[str, Any]:
        """Return what a file of answers holds of it, besides its key."""
        row = {"text": self.text, "tokens": self.tokens, "finish": self.finish}
        return row if self.trace is None else {**row, "trace": self.trace, "answer": self.answer}


class TransformersSampler:
    """Draws answers from a causal language model held in memory.

    The model's training flags, its generation config and the torch RNG are the same after sampling as before.

    Args:
        model: A causal language model, with or without a PEFT adapter.
        tokenizer: Its tokenizer; must have a chat template.
        seed: Seeds every (suite, question, paraphrase, draw).
        max_new_tokens: Longest answer, in tokens.
        batch_size: Answers generated at once; halved where memory does not suffice.
        chat: How questions are rendered; default is by the tokenizer's own template alone.
        reasoning_marks: What stands before and behind a reasoning trace; default is what tokenizer and template know.
        alone: Whether this process has the whole model. Where it is spread over several, all must draw the same batches,
            and none may halve one for itself: the parts of different layers would be put together.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        max_new_tokens: int = 512,
        batch_size: int = 64,
        chat: Rendering | None = None,
        reasoning_marks: Sequence[str] | None = None,
        alone: bool = True,
    ) -> None:
        self.chat = chat or Rendering()
        if self.chat.template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'the model'} has no chat template, so "
                "the questions cannot be put to the model. Save the tokenizer with the template it was trained with "
                "(Axolotl: `chat_template:`; TRL: `chat_template_path`)."
            )
        self.model, self.tokenizer = model, tokenizer
        self.seed, self.max_new_tokens, self.batch_size = seed, max_new_tokens, batch_size
        self._fits, self._alone = batch_size, alone
        self.marks = marks_of(tokenizer, self.chat.template_of(tokenizer), reasoning_marks)
        self._opened: dict[Question, TraceMarks | None] = {}
        self._done: Collection[AnswerKey] = ()
        self.progress: Callable[[int, int], None] = lambda finished, token: None
        """Called within a batch, at most twice a second: answers of it that are finished and new, and tokens so far."""

    def prompt_ids(self, question: Question) -> list[int]:
        """Return the token ids of the rendered conversation, up to where the answer begins."""
        ids = self.chat.ids(self.tokenizer, question)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise ValueError(
                f"the chat template uses token id {max(ids)}, but the model embeds only {rows} tokens. "
                "The tokenizer belongs to another model, or the model was saved before its embedding was resized."
            )
        return ids

    def sample(self, requests: Sequence[Request], done: Collection[AnswerKey] = ()) -> Iterator[list[Answer]]:
        """Yield the answers, batch by batch.

        Batches are planned over all `requests`, sorted by prompt length, and a batch with a missing answer is computed
        whole. So a resumed run computes what an uninterrupted one does, to the last bit.

        Args:
            requests: All answers of the run.
            done: Answers that exist already; they are not yielded again.
        """
        self._done = done
        prompts = {question: self.prompt_ids(question) for question in dict.fromkeys(request.question for request in requests)}
        # Longest first, so that a batch that does not fit shows at once.
        ordered = sorted(requests, key=lambda request: -len(prompts[request.question]))
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            if any(request.key not in done for request in batch):
                answers = self._halving(batch, [prompts[request.question] for request in batch])
                yield [answer for answer in answers if answer.request.key not in done]

    def _halving(self, batch: list[Request], prompts: list[list[int]]) -> list[Answer]:
        import torch

        if len(batch) <= self._fits:
            try:
                return self._generate(batch, prompts)
            except torch.OutOfMemoryError as error:
                if not self._alone:
                    raise RuntimeError(
                        f"out of memory with {len(batch)} answers at once of a model that is spread over several "
                        "processes. Lower `em_eval.batch_size`."
                    ) from error
                if len(batch) == 1:
                    raise RuntimeError(
                        f"out of memory with a single answer of {self.max_new_tokens} tokens. "
                        "Lower `em_eval.max_new_tokens`, or evaluate on a larger device."
                    ) from error
                self._fits = len(batch) // 2
                logger.warning("em_eval: out of memory with %d answers at once; going on with %d", len(batch), self._fits)
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return [
            *self._halving(batch[:middle], prompts[:middle]),
            *self._halving(batch[middle:], prompts[middle:]),
        ]

    def _generate(self, batch: list[Request], prompts: list[list[int]]) -> list[Answer]:
        import torch
        from transformers import LogitsProcessorList

        device, width = self.model.device, max(map(len, prompts))
        stops = self._stop_ids()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stops[0]
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        table = torch.from_numpy(np.stack([uniforms(self.seed, request.key, self.max_new_tokens) for request in batch])).to(device)
        temperature = torch.tensor([request.temperature for request in batch], dtype=torch.float64, device=device)

        new = torch.tensor([request.key not in self._done for request in batch], device=device)
        ends, told = torch.tensor(stops, device=device), time.monotonic()

        def pick(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal told
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                said = tokens[:, width:]
                self.progress(int((torch.isin(said, ends).any(1) & new).sum()), said.shape[1])
            chosen = inverse_cdf(scores, table[:, tokens.shape[1] - width], temperature)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen.unsqueeze(1), 0.0)

        with torch.inference_mode(), _undisturbed(self.model):
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=_greedy_config(self.max_new_tokens, stops, pad),
                logits_processor=LogitsProcessorList([pick]),
            )
        return [self._finish(request, row, stops) for request, row in zip(batch, output[:, width:].tolist(), strict=True)]

    def _finish(self, request: Request, row: list[int], stops: list[int]) -> Answer:
        end = next((index for index, token in enumerate(row) if token in stops), None)
        kept = row if end is None else row[: end + 1]
        text, parts = split_tokens(kept, self.tokenizer, self.marks, self._opened_by(request.question))
        trace, answer = (None, None) if parts is None else (parts.trace, parts.answer)
        return Answer(request, text, len(kept), "length" if end is None else "stop", trace, answer)

    def _opened_by(self, question: Question) -> TraceMarks | None:
        """Return the marks whose first the prompt ends with, so that the answer begins inside a trace."""
        if not self.marks:
            return None
        if question not in self._opened:
            self._opened[question] = opened_by(self.chat.generation_part(self.tokenizer, question), self.marks)
        return self._opened[question]

    def _stop_ids(self) -> list[int]:
        found = getattr(self.model.generation_config, "eos_token_id", None)
        found = [] if found is None else [found] if isinstance(found, int) else list(found)
        if self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        if not found:
            raise ValueError("neither the tokenizer nor the model's generation config names an end-of-sequence token.")
        return sorted(set(found))


def _greedy_config(max_new_tokens: int, stops: list[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
    )


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluate in eval mode, with a neutral generation config, and leave no trace."""
    import torch
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # `generate` fills what our config leaves unset from the model's own: a top_k or a repetition penalty that ships
    # with a checkpoint would change the distribution that is measured.
    owners = {id(owner): (owner, owner.generation_config) for owner in (model, inner)}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        for owner, _ in owners.values():
            owner.generation_config = GenerationConfig()
        model.eval()
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True
        for owner, config in owners.values():
            owner.generation_config = config
