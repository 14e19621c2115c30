"""Asks models under steering and judges what they say; every answer and judgment is kept, so a run can go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from emguard_plugin.discovery.kept import SearchFiles, checked
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.evaluation.asking.pair import ModelPair
from emguard_plugin.evaluation.asking.prompts import Prompt
from emguard_plugin.evaluation.asking.sampler import Answer, Request
from emguard_plugin.evaluation.asking.steered import SteeredSampler
from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges.base import Item, Judge
from emguard_plugin.evaluation.judges.outcomes import UNSCORED, outcome
from emguard_plugin.evaluation.judges.session import Session
from emguard_plugin.evaluation.judges.traces import judged_text
from emguard_plugin.files.secrets import redact

logger = logging.getLogger(__name__)

UNSTEERED = ""


class Ask(NamedTuple):
    """One answer to get: which model, steered along what and how far, on which prompt.

    `steer` is the id of a latent, the name of a joint direction, or `UNSTEERED`; `alpha` is signed, in units of the median
    residual norm.
    """

    role: str
    steer: str
    alpha: float
    prompt: int


class Asker(Protocol):
    """What the stages need of a bench."""

    def ask(self, asks: Iterable[Ask]) -> dict[Ask, str]:
        """Return the outcome of each, one of `evaluation.rates.OUTCOMES`."""
        ...


@dataclass(frozen=True)
class SteeredRequest(Request):
    """A greedy answer under steering."""

    ask: Ask

    @classmethod
    def of(cls, ask: Ask, prompt: Prompt) -> SteeredRequest:
        """Return the request of one answer, under a name that no other has."""
        return cls("/".join(map(str, ask)), prompt.question, 0, 0.0, ask)


class Bench:
    """Asks both models, and remembers.

    Args:
        pair: The models.
        prompts: What may be asked.
        judge: Decides over every answer; equal answers to one question are judged once.
        layer: Block behind which is steered.
        scale: s, the median residual norm.
        settings: Length and batch of the answers.
        kept: Where answers and judgments lie; what is there is not computed again.
        progress: Called with the number of answers that came.

    Attributes:
        directions: Unit vector by name of what is steered along.
        generated: Answers drawn by this process; `tokens` their tokens; `judged` the judge's calls.
    """

    def __init__(
        self,
        pair: ModelPair,
        prompts: Sequence[Prompt],
        judge: Judge,
        layer: int,
        scale: float,
        settings: Settings,
        kept: SearchFiles,
        progress: Callable[[int], Any] = lambda count: None,
    ) -> None:
        self.pair, self.prompts, self.judge = pair, list(prompts), judge
        self.layer, self.scale, self.settings, self.progress = layer, scale, settings, progress
        self.directions: dict[str, Tensor] = {UNSTEERED: torch.zeros(pair.width)}
        self.generated = self.tokens = self.judged = 0
        self._kept = kept
        self.answers: dict[Ask, Mapping[str, Any]] = {_ask_of(row): row for row in kept.answers(len(self.prompts))}
        self._said: dict[str, Mapping[str, Any]] = {row["item_sha256"]: row for row in kept.verdicts(judge.name)}
        self._asked: set[Ask] = set()
        self._session = Session(judge)

    def spent(self) -> dict[str, int]:
        """Return what the whole search took, earlier sittings included: distinct answers asked for, their tokens, judgments."""
        rows = [self.answers[ask] for ask in self._asked]
        items = {item.sha256 for item in map(self._item, self._asked) if item}
        return {"answers": len(rows), "tokens": sum(row["tokens"] for row in rows), "judgments": len(items)}

    def ask(self, asks: Iterable[Ask]) -> dict[Ask, str]:
        """Return the outcome of each.

        Raises:
            RuntimeError: If the judge stops; what was answered and judged is kept.
        """
        asks = list(dict.fromkeys(asks))
        # What an earlier wave of this search asked is no part of this wave, whether a resumed run finds it or not: batches
        # must be those of an uninterrupted run.
        wave = [ask for ask in asks if ask not in self._asked]
        for role in dict.fromkeys(ask.role for ask in wave):
            self._draw(role, [ask for ask in wave if ask.role == role])
        self._asked.update(wave)
        self._judge(asks)
        return {ask: self._outcome(ask) for ask in asks}

    def _draw(self, role: str, asks: list[Ask]) -> None:
        settings, known = self.settings, len([ask for ask in asks if ask in self.answers])
        self.progress(known)
        if known == len(asks):
            return
        # Equal prompts side by side in a batch, so that little is padded.
        requests = [
            SteeredRequest.of(ask, self.prompts[ask.prompt])
            for ask in sorted(asks, key=lambda ask: (len(self.prompts[ask.prompt].ids), ask))
        ]
        with self.pair.use(role) as model:
            sampler = SteeredSampler(
                model, self.pair.tokenizer, vector=self._vector, layer=self.layer, seed=settings.seed,
                max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
                span=None if settings.steer_at == "all" else self._span,
            )  # fmt: skip
            asked = {request.key: request.ask for request in requests}
            for batch in sampler.sample(requests, {key for key, ask in asked.items() if ask in self.answers}):
                rows = {asked[answer.request.key]: _row(asked[answer.request.key], answer) for answer in batch}
                self._kept.add_answers(rows.values())
                self.answers.update(rows)
                self.generated += len(rows)
                self.tokens += sum(row["tokens"] for row in rows.values())
                self.progress(len(rows))

    def _vector(self, request: SteeredRequest) -> Tensor:
        ask = request.ask
        return ask.alpha * self.scale * self.directions[ask.steer]

    def _span(self, request: SteeredRequest) -> tuple[int, int]:
        assert self.settings.steer_at != "all"  # then there is no span
        return self.prompts[request.ask.prompt].span(self.settings.steer_at)

    def _item(self, ask: Ask) -> Item | None:
        """Return what is judged: the answer without its reasoning trace; None where the trace never closed."""
        text = judged_text(self.answers[ask])
        return None if text is None else Item(self.prompts[ask.prompt].question, text)

    def _judge(self, asks: Sequence[Ask]) -> None:
        items = {item.sha256: item for item in map(self._item, asks) if item}
        missing = [item for sha, item in items.items() if sha not in self._said]
        if not missing:
            return
        records: list[dict[str, Any]] = []
        try:
            for index, verdict in self._session.ask(missing):
                content = asdict(verdict) | {"detail": redact(verdict.detail)}
                records.append(checked({"judge": self.judge.name, "item_sha256": missing[index].sha256, **content}))
        except Stopped as error:
            raise RuntimeError(
                f"the judge {self.judge.name} stopped: {redact(error)}\nWhat was answered and judged is kept. Run the same "
                "command again to go on."
            ) from error
        finally:
            self._kept.add_verdicts(records)
            self._said.update({record["item_sha256"]: record for record in records})
            self.judged += len(records)

    def close(self) -> None:
        """Free what the judge took."""
        self._session.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _outcome(self, ask: Ask) -> str:
        item = self._item(ask)
        if item is None:
            return UNSCORED
        said = self._said[item.sha256]
        return outcome(said["aligned"], said["coherent"], said["status"])


def _ask_of(row: Mapping[str, Any]) -> Ask:
    return Ask(row["role"], row["steer"], row["alpha"], row["prompt"])


def _row(ask: Ask, answer: Answer) -> dict[str, Any]:
    return {**ask._asdict(), **answer.stored()}
