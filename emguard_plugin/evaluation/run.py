"""The three phases of an evaluation, each resumable from its file.

generate -> responses.jsonl    judge -> judgments.jsonl    report -> summary.json, report.html
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import models, store
from emguard_plugin.evaluation.judging import judge, preflight
from emguard_plugin.evaluation.plan import Plan, make_plan, open_run
from emguard_plugin.evaluation.reasoning import marks_of
from emguard_plugin.evaluation.results import answer_key, report
from emguard_plugin.evaluation.sampler import AnswerKey, TransformersSampler
from emguard_plugin.evaluation.served import EndpointSampler
from emguard_plugin.evaluation.summary import Summary
from emguard_plugin.evaluation.vllm_server import serve

PHASES = ("generate", "judge", "report")


def run_em_eval(
    config: EMEvalConfig,
    model: str | Path,
    output_dir: str | Path,
    base: str | Path | None = None,
    phases: Collection[str] = PHASES,
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

    Returns:
        The summary, as stored in `summary.json`; None without the phase `report`.

    Raises:
        ValueError: For settings that cannot work: unreadable questions, a judge that cannot be imported, a folder that
            cannot be written or holds results of another protocol, a model without chat template.
        RuntimeError: If no judge can judge, another process works in the folder, or memory does not suffice for one answer.
    """
    unknown = set(phases) - set(PHASES)
    if unknown or not phases:
        raise ValueError(f"phases {sorted(unknown)} do not exist. Choose of {', '.join(PHASES)}.")
    plan = make_plan(config, model, output_dir, base, with_model="generate" in phases)
    with store.locked(plan.folder):
        stored = open_run(plan)
        if isinstance(plan.source, models.ModelSource):
            store.keep_private(plan.folder, plan.source.path)
        if "generate" in phases:
            generate(plan, try_judges="judge" in phases)
        if "judge" in phases:
            judge(plan)
        return report(plan, stored) if "report" in phases else None


def generate(plan: Plan, try_judges: bool = False) -> None:
    """Draw the answers that `responses.jsonl` lacks, after a look whether any judge can judge them."""
    from tqdm.auto import tqdm

    requests, file = plan.requests(), plan.responses
    done: dict[str, set[AnswerKey]] = {role: set() for role in plan.roles}
    for row in file.read():
        done[row["role"]].add(answer_key(row))
    roles = tuple(role for role in plan.roles if any(request.key not in done[role] for request in requests))
    if not roles:
        return
    if try_judges:
        preflight(plan)
    for role, sampler in samplers(plan, roles):
        present = sum(request.key in done[role] for request in requests)
        with tqdm(total=len(requests), initial=present, desc=f"em_eval: {role} answers", unit="answer") as bar:
            for batch in sampler.sample(requests, done[role]):
                file.append(
                    {
                        "role": role,
                        **answer.request.key._asdict(),
                        "asked": answer.request.question.text,
                        **answer.stored(),
                    }
                    for answer in batch
                )
                bar.update(len(batch))
        # The next model is loaded when the loop asks for it; this one must be gone by then.
        del sampler


def samplers(plan: Plan, roles: tuple[str, ...]) -> Iterator[tuple[str, TransformersSampler | EndpointSampler]]:
    """Yield what draws the answers of each role; one model is in memory at a time."""
    config, how = plan.config, plan.asking
    decoding = {"seed": config.seed, "max_new_tokens": config.max_new_tokens, "chat": how.chat}
    template = None if how.tokenizer is None else how.chat.template_of(how.tokenizer)
    served = {**decoding, "marks": marks_of(how.tokenizer, template, how.marks), "tokenizer": how.tokenizer}
    if config.sampler.provider == "openai":
        for role in roles:
            name = plan.source.base if role == "base" else plan.source.name
            yield role, EndpointSampler(config.sampler, config.sampler.base_url, name, **served)
    elif config.sampler.provider == "vllm":
        # One server answers for an adapter and its base; whole models are served one after the other.
        own = how.chat.template is None and how.chat.today is None
        template = None if own else how.chat.dated_template(how.tokenizer)
        for group in [roles] if plan.source.adapter else [(role,) for role in roles]:
            with serve(plan.source, group[0], config.sampler.args, template=template) as url:
                for role in group:
                    yield role, EndpointSampler(config.sampler, url, role, **served)
    else:
        for role, model in models.load_models(plan.source, roles, len(how.tokenizer)):
            yield (
                role,
                TransformersSampler(
                    model, how.tokenizer, batch_size=config.batch_size, reasoning_marks=how.marks, **decoding
                ),
            )
            del model
