"""The three phases of an evaluation, each resumable from its file.

generate -> responses.jsonl    judge -> judgments.jsonl    report -> summary.json, report.html
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from emguard_plugin.config import EMEvalConfig, ServedSamplerConfig, VLLMSamplerConfig
from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.asking.draws import AnswerKey
from emguard_plugin.evaluation.asking.reasoning import TraceMarks, looks_like_trace, marks_of
from emguard_plugin.evaluation.asking.sampler import TransformersSampler
from emguard_plugin.evaluation.asking.served import EndpointSampler, ServedSource
from emguard_plugin.evaluation.asking.vllm_server import serve
from emguard_plugin.evaluation.finished import all_answered
from emguard_plugin.evaluation.judging import found_out, judge, preflight
from emguard_plugin.evaluation.plan import Plan, begin, make_plan, open_run
from emguard_plugin.evaluation.results import report
from emguard_plugin.evaluation.run_folder.records import read_answers, sealed, told
from emguard_plugin.evaluation.run_folder.summary import Summary
from emguard_plugin.files import progress
from emguard_plugin.files import result_folder as store

logger = logging.getLogger(__name__)

PHASES = ("generate", "judge", "report")


def run_em_eval(
    config: EMEvalConfig,
    model: str | Path,
    output_dir: str | Path,
    base: str | Path | None = None,
    phases: Collection[str] = PHASES,
    rejudge: Collection[str] | bool = False,
) -> Summary | None:
    """Measure the EM rate of a saved model and of the model it started from.

    Safe to call again on the same folder: what is there is kept, what is missing is computed, and the summary is the
    same as that of an uninterrupted run.

    Args:
        config: The `em_eval` block. What it states itself (`samples_per_question`, `temperature`) wins over what the
            question file states; the defaults do not.
        model: Folder of the fine-tuned model: a PEFT adapter or a whole model.
        output_dir: Folder for the results.
        base: The model before fine-tuning; default is the one the adapter names.
        phases: Which of `generate`, `judge` and `report` to run. Without `generate` no model is needed, so answers can
            be judged on another machine than the one that drew them.
        rejudge: Names of the judges whose judgments are made anew, or True for all of the config's. Without it only what is
            missing is judged: nothing by a judge that has judged all, everything by a new or an edited one.

    Returns:
        The summary, as stored in `summary.json`; None without the phase `report`.

    Raises:
        ValueError: For settings that cannot work: unreadable questions, a judge that cannot be imported, a folder that
            cannot be written or holds results of another protocol, a model without chat template.
        RuntimeError: If no judge can judge, another process works in the folder, memory does not suffice for one answer, or
            a phase that was asked for without `report` did not do all of its work; what was done is kept.
    """
    unknown = set(phases) - set(PHASES)
    if unknown or not phases:
        raise ValueError(f"phases {sorted(unknown)} do not exist. Choose of {', '.join(PHASES)}.")
    to_draw = "generate" in phases and not all_answered(config, model, output_dir, base)
    plan = make_plan(config, model, output_dir, base, with_model=to_draw)
    anew = _named(plan, rejudge, phases)
    with store.locked(plan.folder):
        stored = open_run(plan)
        if config.sampler.provider != "openai" and Path(model).is_dir():
            store.keep_private(plan.folder, Path(model))
        if "generate" in phases:
            generate(plan, stored, try_judges="judge" in phases)
        if "judge" in phases:
            judge(plan, stored, anew)
        if "report" in phases:
            return report(plan, stored)
        _check_done(plan, stored, phases)
        return None


def _named(plan: Plan, rejudge: Collection[str] | bool, phases: Collection[str]) -> list[str]:
    names = [entry.name for entry in plan.judges]
    anew = names if rejudge is True else list(rejudge or ())
    unknown = [name for name in anew if name not in names]
    if unknown:
        raise ValueError(f"`--rejudge {unknown[0]}`: no judge of `em_eval.judges` has this name. They are: {', '.join(names)}.")
    if anew and "judge" not in phases:
        raise ValueError("`--rejudge` needs the phase `judge`, which `--phase` leaves out.")
    return anew


def _check_done(plan: Plan, stored: dict[str, Any], phases: Collection[str]) -> None:
    """Without a report nobody else would say so.

    Raises:
        RuntimeError: If answers were not given, or a judge stopped.
    """
    missing = len(plan.requests()) * len(plan.roles) - len(read_answers(plan.folder, stored.get("run"))[0])
    if "generate" in phases and missing > 0:
        raise RuntimeError(f"{missing} answers were not given. What was drawn is kept in {plan.folder}; run again to draw the rest.")
    known = found_out(plan)
    stopped = {entry.name: why for entry in plan.judges if (why := known.get(entry.name, {}).get("stopped"))}
    if "judge" in phases and stopped:
        reasons = "; ".join(f"{name}: {why}" for name, why in stopped.items())
        raise RuntimeError(f"not all was judged. {reasons}. What was judged is kept in {plan.folder}; run again to judge the rest.")


def generate(plan: Plan, stored: dict[str, Any], try_judges: bool = False) -> None:
    """Draw the answers that `responses.jsonl` lacks, after a look whether any judge can judge them."""
    requests, file = plan.requests(), plan.responses
    done: dict[str, set[AnswerKey]] = {role: set() for role in plan.roles}
    answers, left = read_answers(plan.folder, stored.get("run"))
    for role, key in answers:
        done.setdefault(role, set()).add(key)
    if sentence := told(left, file.path.name, "answers"):
        logger.warning("em_eval: %s", sentence)
    roles = tuple(role for role in plan.roles if any(request.key not in done[role] for request in requests))
    if not roles:
        return
    if try_judges:
        preflight(plan)
    for role, sampler in samplers(plan, roles):
        suspects = _draw(plan, stored, role, sampler, done[role])
        for marks, count in suspects.items():
            logger.warning(
                "em_eval: %d answers of the %s model look like reasoning traces, and are judged as answers: neither tokenizer "
                "nor chat template knows their marks. Set `em_eval.reasoning_marks: [%r, %r]`, and another `output_dir`.",
                count, role, *marks,
            )  # fmt: skip
        # The next model is loaded when the loop asks for it; this one must be gone by then.
        del sampler


def _draw(
    plan: Plan, stored: dict[str, Any], role: str, sampler: TransformersSampler | EndpointSampler, done: set[AnswerKey]
) -> Counter[TraceMarks]:
    """Draw and store what one model has not answered; return which marks of a trace its answers show that nobody knows."""
    from tqdm.auto import tqdm

    requests, longest, suspects = plan.requests(), plan.config.max_new_tokens, Counter[TraceMarks]()
    present = sum(request.key in done for request in requests)
    with tqdm(total=len(requests), initial=present, desc=f"em_eval: {role} answers", unit="answer") as bar:

        def within(finished: int, token: int) -> None:  # a batch may take minutes
            bar.set_postfix_str(f"token {token} of at most {longest}", refresh=False)
            bar.update(present + finished - bar.n)
            bar.refresh()

        if isinstance(sampler, TransformersSampler):
            sampler.progress = within
        for batch in sampler.sample(requests, done):
            begin(plan, stored)
            rows = (
                {"role": role, **answer.request.key._asdict(), "asked": answer.request.question.text, **answer.stored()} for answer in batch
            )
            plan.responses.append(sealed(row, stored.get("run")) for row in rows)
            present += len(batch)
            bar.set_postfix_str("", refresh=False)
            bar.update(present - bar.n)
            progress.tell(f"{role} answers", present, len(requests))
            suspects.update(marks for answer in batch if (marks := looks_like_trace(answer.stored())))
    return suspects


def samplers(plan: Plan, roles: tuple[str, ...]) -> Iterator[tuple[str, TransformersSampler | EndpointSampler]]:
    """Yield what draws the answers of each role; one model is in memory at a time."""
    config, how, source = plan.config, plan.asking, plan.source
    assert source is not None  # `all_answered` leaves no role to draw
    template = None if how.tokenizer is None else how.chat.template_of(how.tokenizer)
    marks = marks_of(how.tokenizer, template, how.marks)

    def served(sampler: ServedSamplerConfig, url: str, name: str) -> EndpointSampler:
        decoding = {"seed": config.seed, "max_new_tokens": config.max_new_tokens}
        return EndpointSampler(sampler, url, name, **decoding, chat=how.chat, marks=marks, tokenizer=how.tokenizer)

    if isinstance(source, ServedSource):
        for role in roles:
            name = source.base if role == "base" else source.name
            yield role, served(source.sampler, source.sampler.base_url, str(name))
    elif isinstance(config.sampler, VLLMSamplerConfig):
        # One server answers for an adapter and its base; whole models are served one after the other.
        own = how.chat.template is None and how.chat.today is None
        template = None if own else how.chat.dated_template(how.tokenizer)
        for group in [roles] if source.adapter else [(role,) for role in roles]:
            with serve(source, group[0], config.sampler.args, template=template) as url:
                for role in group:
                    yield role, served(config.sampler, url, role)
    else:
        assert how.tokenizer is not None  # loaded with the source
        for role, model in models.load_models(source, roles, len(how.tokenizer)):
            yield (
                role,
                TransformersSampler(
                    model,
                    how.tokenizer,
                    batch_size=config.batch_size,
                    reasoning_marks=how.marks,
                    seed=config.seed,
                    max_new_tokens=config.max_new_tokens,
                    chat=how.chat,
                ),
            )
            del model
