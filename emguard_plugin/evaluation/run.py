"""The three phases of an evaluation, each resumable from its file.

generate -> responses.jsonl    judge -> judgments.jsonl    report -> summary.json, report.html
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import models, store
from emguard_plugin.evaluation.plan import Plan, make_plan, open_run
from emguard_plugin.evaluation.rates import Scored, difference, suite_rates
from emguard_plugin.evaluation.sampler import AnswerKey, TransformersSampler
from emguard_plugin.evaluation.summary import JudgeResult, Summary

logger = logging.getLogger(__name__)


def run_em_eval(
    config: EMEvalConfig, model: str | Path, output_dir: str | Path, base: str | Path | None = None
) -> Summary:
    """Measure the EM rate of a saved model and of the model it started from.

    Safe to call again on the same folder: what is there is kept, what is missing is computed, and the summary is the
    same as that of an uninterrupted run.

    Args:
        config: The `em_eval` block. What it states itself (`samples_per_question`, `temperature`) wins over what the
            question file states; the defaults do not.
        model: Folder of the fine-tuned model: a PEFT adapter or a whole model.
        output_dir: Folder for the results.
        base: The model before fine-tuning; default is the one the adapter names.

    Returns:
        The summary, as stored in `summary.json`.

    Raises:
        ValueError: For settings that cannot work: unreadable questions, a judge that cannot be imported, a folder that
            cannot be written or holds results of another protocol, a model without chat template.
        RuntimeError: If another process works in the folder, or if memory does not suffice for one answer.
    """
    plan = make_plan(config, model, output_dir, base)
    with store.locked(plan.folder):
        stored = open_run(plan)
        generate(plan)
        judge(plan)
        return report(plan, stored)


def generate(plan: Plan) -> None:
    """Draw the answers that `responses.jsonl` lacks."""
    from tqdm.auto import tqdm

    requests, file, config = plan.requests(), plan.responses, plan.config
    done: dict[str, set[AnswerKey]] = {role: set() for role in plan.roles}
    for row in file.read():
        done[row["role"]].add(_key(row))
    roles = tuple(role for role in plan.roles if any(request.key not in done[role] for request in requests))
    if not roles:
        return
    tokenizer = models.load_tokenizer(plan.source)
    for role, model in models.load_models(plan.source, roles, len(tokenizer)):
        sampler = TransformersSampler(
            model,
            tokenizer,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        present = sum(request.key in done[role] for request in requests)
        with tqdm(total=len(requests), initial=present, desc=f"em_eval: {role} answers", unit="answer") as bar:
            for batch in sampler.sample(requests, done[role]):
                file.append(
                    {
                        "role": role,
                        **answer.request.key._asdict(),
                        "asked": answer.request.question.text,
                        "text": answer.text,
                        "tokens": answer.tokens,
                        "finish": answer.finish,
                    }
                    for answer in batch
                )
                bar.update(len(batch))
        # The next model is loaded when the loop asks for it; this one must be gone by then.
        del model, sampler


def judge(plan: Plan) -> None:
    """Judge the answers that `judgments.jsonl` lacks; unscored ones are judged again."""
    from tqdm.auto import tqdm

    responses, questions, file = plan.responses.read(), plan.questions(), plan.judgments
    done = {(row["judge"], row["role"], _key(row)) for row in file.read() if row["status"] == "scored"}
    for entry in plan.judges:
        missing = [row for row in responses if (entry.name, row["role"], _key(row)) not in done]
        if not missing:
            continue
        records = []
        for row in tqdm(missing, desc=f"em_eval: judging by {entry.name}", unit="answer"):
            found = entry.judge(questions[row["suite"], row["question"], row["paraphrase"]], row["text"])
            records.append({"judge": entry.name, "role": row["role"], **_key(row)._asdict(), **asdict(found)})
            if len(records) == 256:
                file.append(records)
                records = []
        file.append(records)


def report(plan: Plan, stored: dict[str, Any]) -> Summary:
    """Compute the rates from the two files and write `summary.json` and `report.html`."""
    from emguard_plugin.evaluation.report import write_report

    results = []
    for entry in plan.judges:
        scored = scored_answers(plan, entry.name)
        rates = {role: {name: suite_rates(answers) for name, answers in by.items()} for role, by in scored.items()}
        differences = {}
        if "base" in scored:
            differences = {name: difference(scored["base"][name], scored["tuned"][name]) for name in plan.suites}
        results.append(JudgeResult(name=entry.name, rates=rates, differences=differences))
    summary = Summary(
        created=stored["created"],
        versions=stored["versions"],
        fingerprint=hashlib.sha256(json.dumps(stored["protocol"], sort_keys=True).encode()).hexdigest(),
        protocol=stored["protocol"],
        example_prompt=stored["example_prompt"],
        models=stored["models"],
        judges=results,
        folder=plan.folder,
    )
    summary.save(plan.folder / "summary.json")
    write_report(summary, plan.folder / "report.html")
    for result in results:
        rates = result.rates["tuned"]["questions"]
        if rates.em_all.n == 0:
            logger.warning(
                "em_eval: %s scored no answer, so there is no EM rate: %s", result.name, rates.unscored_reasons
            )
    return summary


def scored_answers(plan: Plan, judge_name: str) -> dict[str, dict[str, list[Scored]]]:
    """Return the judged answers by role and suite, in the order of the suites; an answer never judged is unscored."""
    responses = {(row["role"], _key(row)): row for row in plan.responses.read()}
    # A later record replaces an earlier one: an unscored answer may have been judged again.
    judgments = {(row["role"], _key(row)): row for row in plan.judgments.read() if row["judge"] == judge_name}
    found: dict[str, dict[str, list[Scored]]] = {role: {name: [] for name in plan.suites} for role in plan.roles}
    for role in plan.roles:
        for request in plan.requests():
            answer, verdict = responses.get((role, request.key)), judgments.get((role, request.key))
            found[role][request.suite].append(
                Scored(
                    question=request.question.id,
                    category=request.question.category,
                    aligned=verdict["aligned"] if verdict else None,
                    coherent=verdict["coherent"] if verdict else None,
                    reason=verdict["detail"] if verdict else "not judged" if answer else "no answer was generated",
                    truncated=bool(answer) and answer["finish"] == "length",
                )
            )
    return found


def _key(row: dict[str, Any]) -> AnswerKey:
    return AnswerKey(row["suite"], row["question"], row["paraphrase"], row["draw"])
