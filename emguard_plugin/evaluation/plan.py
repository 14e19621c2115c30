"""What an evaluation will do, decided and checked before any work."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import judges as judging
from emguard_plugin.evaluation.asking import asking
from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.asking.questions import Question, load_questions, suite_hash
from emguard_plugin.evaluation.asking.rendering import NotAsked
from emguard_plugin.evaluation.asking.sampler import Request
from emguard_plugin.evaluation.asking.served import ServedSource
from emguard_plugin.evaluation.judges.traces import readers
from emguard_plugin.evaluation.run_folder.differences import in_words
from emguard_plugin.evaluation.run_folder.stored_run import stored_run
from emguard_plugin.files import result_folder as store

logger = logging.getLogger(__name__)

JUDGING = ("judges", "thresholds")
"""What an earlier version kept in the protocol of the answers: it binds judgments, not answers."""

SAMPLERS = {
    "transformers": "transformers, inverse CDF, no top-k or top-p",
    "openai": "chat completions, top_p 1, a seed per draw",
    "vllm": "vLLM, top_p 1, no top-k, a seed per draw",
}
MOST_ANSWERS = 10_000_000
"""More answers than this are a slip of the keyboard."""
PACKAGES = ("emguard-plugin", "torch", "transformers", "peft", "numpy", "scipy", "statsmodels")


@dataclass(frozen=True)
class Plan:
    """All that an evaluation does, decided before any work.

    Attributes:
        config: The `em_eval` block.
        folder: Where the files lie.
        source: The models; None where the answers are there and no model is needed.
        roles: Which of `base` and `tuned` answer.
        suites: Questions by suite: `questions`, and `in_domain` and others where given.
        judges: The judges, in the order of the config.
        asking: How questions are put to the models, and which cannot be.
    """

    config: EMEvalConfig
    folder: Path
    source: models.ModelSource | ServedSource | None
    roles: tuple[str, ...]
    suites: dict[str, list[Question]]
    judges: list[judging.Judge]
    asking: asking.Asking = field(default_factory=asking.Asking)

    @property
    def responses(self) -> store.JsonLines:
        """File of the answers."""
        return store.JsonLines(self.folder / "responses.jsonl")

    @property
    def judgments(self) -> store.JsonLines:
        """File of the scores."""
        return store.JsonLines(self.folder / "judgments.jsonl")

    def questions(self) -> dict[tuple[str, str, int], Question]:
        """Return every wording by (suite, id, paraphrase)."""
        return {(name, q.id, q.paraphrase): q for name, suite in self.suites.items() for q in suite}

    def requests(self) -> list[Request]:
        """Return every answer that each role gives, in the order of the suites."""
        return requests(self.config, self.suites, self.asking.not_asked)


def requests(config: EMEvalConfig, suites: dict[str, list[Question]], not_asked: Collection[NotAsked] = ()) -> list[Request]:
    """Return every answer that a block asks for, in the order of the suites; none to what cannot be asked.

    Raises:
        ValueError: For so many that the list of them alone would fill the memory.
    """
    number = sum(_samples(config, question) for suite in suites.values() for question in suite)
    if number > MOST_ANSWERS:
        raise ValueError(f"`em_eval.samples_per_question` asks for {number:,} answers in all; at most {MOST_ANSWERS:,}. Lower it.")
    left_out = {(one.suite, one.question, one.paraphrase) for one in not_asked}
    return [
        Request(name, question, draw, _temperature(config, question))
        for name, suite in suites.items()
        for question in suite
        if (name, question.id, question.paraphrase) not in left_out
        for draw in range(_samples(config, question))
    ]


def make_plan(
    config: EMEvalConfig,
    model: str | Path,
    output_dir: str | Path,
    base: str | Path | None = None,
    with_model: bool = True,
) -> Plan:
    """Check everything that can be checked before a model is loaded.

    Args:
        config: As in `run_em_eval`.
        model: As in `run_em_eval`.
        output_dir: As in `run_em_eval`.
        base: As in `run_em_eval`.
        with_model: Whether answers may have to be drawn; otherwise the folder must hold those of an earlier run.

    Returns:
        All that the evaluation does.

    Raises:
        ValueError: For what cannot work, in the words of the YAML.
    """
    suites = {name: load_questions(source) for name, source in config.suites().items()}
    judges = readers(judging.build_judges(config.judges), config.reasoning)
    if any(question.judge or question.judge_prompts for suite in suites.values() for question in suite):
        logger.warning(
            "em_eval: the question files name a `judge` or `judge_prompts` of their own, which are not used: `em_eval.judges` "
            "judge, by emguard's prompts. Rates do not compare with those that the files' authors published."
        )
    if not with_model:
        folder = store.prepare_folder(output_dir)
        stored = stored_run(folder)
        _check_drawn_by(config, stored["models"]["tuned"], model, folder)
        return Plan(config, folder, None, tuple(stored["models"]), suites, judges, asking.stored(stored["protocol"]))
    source = source_of(config, model, base)
    if config.evaluate_base and source.base is None:
        raise ValueError(
            f"{model} is a whole model and does not say what it was trained from. Give `--base` (`base=` in Python), "
            "or set `em_eval.evaluate_base: false`."
        )
    if isinstance(source, models.ModelSource):
        _warn_of_another_base(source)
    roles = ("base", "tuned") if config.evaluate_base else ("tuned",)
    how = asking.prepare(config, source, suites, Path(output_dir))
    return Plan(config, store.prepare_folder(output_dir), source, roles, suites, judges, how)


def _warn_of_another_base(source: models.ModelSource) -> None:
    named = models.named_base(source.path) if source.adapter else None
    if not (named and source.base and models.holds_weights(named) and models.holds_weights(source.base)):
        return
    if Path(named).resolve() == Path(source.base).resolve():
        return
    if models.identity(named)["weights_sha256"] != models.identity(source.base)["weights_sha256"]:
        logger.warning(
            "em_eval: %s was trained on %s, whose weights are others than those of %s; the rates are those of the adapter on the latter",
            source.path, named, source.base,
        )  # fmt: skip


def _check_drawn_by(config: EMEvalConfig, known: Any, model: str | Path, folder: Path) -> None:
    """Refuse to judge or report under the name of one model what another has said. One that is not here cannot be compared.

    Raises:
        ValueError: If the model is here and its weights are not those that answered, or a server's model has another name.
    """
    then = models.own_part(known)
    if config.sampler.provider == "openai":
        now: dict[str, Any] = {"name": config.sampler.model or str(model)}
        same = "served_by" in then and then["name"] == now["name"]
    elif models.holds_weights(model):
        now = models.identity(model)
        same = then.get("weights_sha256") == now["weights_sha256"]
    else:
        return
    if not same:
        raise ValueError(
            f"{folder} holds the answers of {then.get('name')}, and {model} is another model"
            f"{'' if then.get('name') != now['name'] else ' of the same name: its weights differ'}. Give the model that "
            f"answered, or another `{store.OPTION}`."
        )


def source_of(config: EMEvalConfig, model: str | Path, base: str | Path | None) -> models.ModelSource | ServedSource:
    """Return where a block's models are: in folders, or behind a server."""
    sampler = config.sampler
    if sampler.provider != "openai":
        return models.resolve_model(model, base)
    start = sampler.base_model or (str(base) if base else None)
    return ServedSource(sampler.model or str(model), start, sampler)


def open_run(plan: Plan) -> dict[str, Any]:
    """Check that the folder's answers are of this protocol and these models; return what is stored about the run.

    What binds answers is compared here: suites, decoding, rendering, models. Judges may differ: their judgments say of each
    answer who made them. A new folder is tied by `begin`, with the first answer.

    Returns:
        What `protocol.json` holds, or will hold.
    """
    # Without a model, whatever drew the answers stands in the folder.
    known = stored_run(plan.folder)["protocol"] if plan.source is None else {}
    config, samples = plan.config, {}
    for name, suite in plan.suites.items():
        samples[name] = [(_samples(config, question), _temperature(config, question)) for question in suite]
    protocol = {
        "suites": {
            name: {
                "sha256": suite_hash(suite),
                "questions": len({question.id for question in suite}),
                "wordings": len(suite),
                "answers": sum(count for count, _ in samples[name]),
                "samples_per_wording": sorted({count for count, _ in samples[name]}),
                "temperature": sorted({temperature for _, temperature in samples[name]}),
            }
            for name, suite in plan.suites.items()
        },
        "decoding": {
            "sampler": known["decoding"].get("sampler") if known else SAMPLERS[config.sampler.provider],
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
        },
        **(asking.stated(known, config) if known else plan.asking.protocol()),
    }
    if plan.source is None:
        store.claim(plan.folder, {"protocol": protocol}, entries=("protocol",), free=JUDGING, write=False, words=in_words)
        return stored_run(plan.folder)
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": uuid4().hex,
        "protocol": protocol,
        "models": {role: identity_of(plan.source, role) for role in plan.roles},
        "versions": _versions(),
        "example_prompt": plan.asking.example(plan.requests()[0].question),
    }
    claimed = store.claim(plan.folder, record, entries=("protocol", "models"), free=JUDGING, write=False, words=in_words)
    return claimed if claimed.get("run") == record["run"] else stored_run(plan.folder)


def begin(plan: Plan, record: dict[str, Any]) -> None:
    """Tie a new folder to its run, right before its first answer is stored."""
    path = plan.folder / store.PROTOCOL
    if not path.is_file() or not store.holds_lines(plan.responses.path):
        store.write_json(path, record)


def _samples(config: EMEvalConfig, question: Question) -> int:
    if "samples_per_question" in config.model_fields_set or question.samples is None:
        return config.samples_per_question
    return question.samples


def _temperature(config: EMEvalConfig, question: Question) -> float:
    if "temperature" in config.model_fields_set or question.temperature is None:
        return float(config.temperature)
    return float(question.temperature)


def identity_of(source: models.ModelSource | ServedSource, role: str) -> dict[str, Any]:
    """Return what tells the model of a role from any other."""
    if isinstance(source, ServedSource):
        return {"name": source.base if role == "base" else source.name, "served_by": source.host}
    base = models.identity(source.base) if source.base else None
    if role == "base":
        assert base is not None  # `make_plan` refuses a base that nobody names
        return base
    own = models.identity(source.path)
    return {"adapter": own, "on": base} if source.adapter else own


def _versions() -> dict[str, str]:
    def find() -> Iterator[tuple[str, str]]:
        for name in PACKAGES:
            try:
                yield name, version(name)
            except PackageNotFoundError:
                yield name, "not installed"

    return dict(find())
