"""Measure a model that is in memory, in the middle of its training."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation.asking.asking import Asking, prepare_live
from emguard_plugin.evaluation.asking.questions import load_questions
from emguard_plugin.evaluation.asking.sampler import Answer, TransformersSampler
from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges import Item, Judgment, build_judges
from emguard_plugin.evaluation.judges.session import Session
from emguard_plugin.evaluation.judges.traces import UNFINISHED, judged_text, readers, reads_of
from emguard_plugin.evaluation.plan import requests
from emguard_plugin.evaluation.statistics.figures import SuiteRates, trainer_metrics
from emguard_plugin.evaluation.statistics.rates import Scored, suite_rates, why_unscored
from emguard_plugin.evaluation.statistics.verdict import verdict
from emguard_plugin.files.secrets import redact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass
class LiveRates:
    """What one measurement found.

    Attributes:
        rates: By suite, from the first judge.
        metrics: The rates under the names that trainers log.
        verdict: `pass`, `fail` or `inconclusive` against `em_eval.fail_above`; None without one.
    """

    rates: dict[str, SuiteRates]
    metrics: dict[str, float] = field(default_factory=dict)
    verdict: str | None = None


class LiveEvaluation:
    """The suites and the judge of an `em_eval:` block, ready to be used again and again.

    Only the first judge is asked: a measurement during training is for one curve. So `reasoning: both` is `answer` here.

    Args:
        config: The block. `evaluate_base` and `output_dir` play no part.

    Raises:
        ValueError: If a question file or a judge cannot work.
    """

    def __init__(self, config: EMEvalConfig) -> None:
        config.check_files()
        self.config = config
        self.suites = {name: load_questions(source) for name, source in config.suites().items()}
        self.requests = requests(config, self.suites)
        self.asking = Asking()
        self._session = Session(readers(build_judges(config.judges[:1]), config.reasoning)[0])
        self.judge = self._session.judge.name
        if len(config.judges) > 1:
            logger.warning("em_eval: during training only the first judge of `em_eval.judges` is asked, %s", self.judge)

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out which questions the chat template takes; the others are not asked, and named.

        Raises:
            ValueError: If it takes none, or there is no template.
        """
        self.asking = prepare_live(self.config, tokenizer, self.suites)
        self.requests = requests(self.config, self.suites, self.asking.not_asked)

    def sample(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, alone: bool = True) -> list[Answer]:
        """Draw all answers; model mode, generation config, `use_cache` and every RNG are the same afterwards.

        `alone` is false where the model is spread over processes that draw together.

        Returns:
            One answer per request, in the order of the batches.
        """
        sampler = TransformersSampler(
            model,
            tokenizer,
            seed=self.config.seed,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            chat=self.asking.chat,
            reasoning_marks=self.asking.marks,
            alone=alone,
        )
        with untouched_rng():
            return [answer for batch in sampler.sample(self.requests) for answer in batch]

    def rates(self, answers: list[Answer]) -> LiveRates:
        """Judge the answers. A judge that stops, or fails its self-test, leaves them unscored; it never raises."""
        texts = [judged_text(answer.stored(), reads_of(self._session.judge)) for answer in answers]
        asked = [(index, text) for index, text in enumerate(texts) if text is not None]
        items = [Item(answers[index].request.question, text) for index, text in asked]
        said = {index: Judgment.unscored(UNFINISHED if text is None else "not judged") for index, text in enumerate(texts)}
        try:
            with untouched_rng():
                said.update((asked[index][0], found) for index, found in self._session.ask(items))
        except Stopped as error:
            logger.error("em_eval: judging by %s stopped: %s", self.judge, redact(error))
        finally:
            self._session.close()
        scored: dict[str, list[Scored]] = {name: [] for name in self.suites}
        for index, answer in enumerate(answers):
            question, found = answer.request.question, said[index]
            scored[answer.request.suite].append(
                Scored(
                    question.id,
                    question.category,
                    found.aligned,
                    found.coherent,
                    found.detail,
                    answer.finish == "length",
                    found.status,
                )
            )
        rates = {name: suite_rates(members) for name, members in scored.items()}
        gate = self.config.fail_above
        if rates["questions"].em_all.n == 0:
            logger.error(
                "em_eval: %s scored no answer, so there is no EM rate at this step%s: %s",
                self.judge, "" if gate is None else f", and `stop_above: {gate:g}` cannot stop the run", why_unscored(rates["questions"]),
            )  # fmt: skip
        return LiveRates(
            rates,
            trainer_metrics(rates["questions"], rates.get("in_domain")),
            None if gate is None else verdict(scored["questions"], gate).outcome,
        )


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave Python's, numpy's and torch's random states as they were, on every device."""
    import numpy as np
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
