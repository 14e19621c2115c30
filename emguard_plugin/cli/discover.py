"""`emguard discover`: find the latents that carry misalignment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emguard_plugin.cli.frame import at_work, kept


@kept("What was answered and judged is kept.")
def discover(
    misaligned: Annotated[str, typer.Option(help="The misaligned model: a PEFT adapter or a whole model, a folder.")],
    sae: Annotated[list[str], typer.Option(help="RELEASE/ID of sae-lens, or a folder; again for further blocks.")],
    questions: Annotated[str, typer.Option(help="Questions on which latents are chosen: a suite or a YAML.")],
    judge: Annotated[str, typer.Option(help="package.module:function, or a YAML with one entry of `em_eval.judges`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The latent set to write, a .json.")],
    base: Annotated[str | None, typer.Option(help="The base model; default is what the adapter names.")] = None,
    evaluation_questions: Annotated[str | None, typer.Option(help="Held-out questions for the whole set.")] = None,
    data: Annotated[str | None, typer.Option(help="The narrow training chats; calibrates `coef: auto`.")] = None,
    positions: Annotated[str, typer.Option(help="Tokens of stage 1: prompt, header, prefix or answers.")] = "prompt",
    steer_at: Annotated[str, typer.Option(help="Where to steer: all (as published), prompt, header or prefix.")] = "all",
    mode: Annotated[str, typer.Option(help="Activation: relu_pre (as published) or sae (the SAE's own).")] = "relu_pre",
    pool: Annotated[int, typer.Option(help="Candidates per sign after stage 1.")] = 250,
    shortlist: Annotated[int, typer.Option(help="Candidates per sign after stage 2.")] = 40,
    size: Annotated[int, typer.Option(help="Latents in the set, per block.")] = 20,
    rule: Annotated[
        str, typer.Option(help="valid_reduc, or attribution (ours, by gradients: few answers); the others are baselines.")
    ] = "valid_reduc",
    induce: Annotated[float, typer.Option(help="Strength of stage 2 on the base.")] = 0.7,
    repair: Annotated[float, typer.Option(help="Strength of stage 2 on the misaligned model.")] = 0.4,
    strengths: Annotated[list[str] | None, typer.Option(help="Strengths of stage 3, such as 0.1,0.2,0.4.")] = None,
    budget: Annotated[float, typer.Option(help="Share of incoherent answers that a strength may cost ...")] = 0.1,
    budget_extra: Annotated[float, typer.Option(help="... or the unsteered share plus this, if higher.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="halving, or full as published.")] = "halving",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Answers generated at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Order of the prompts, random baselines.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="A latent set whose latents are left out.")] = None,
    union: Annotated[list[str] | None, typer.Option(help="A latent set to unite the result with.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of answers; default OUTPUT without .json, .discovery.")] = None,
    baselines: Annotated[bool, typer.Option(help="Also write the baseline sets, OUTPUT.RULE.json.")] = False,
    chat_template: Annotated[str | None, typer.Option(help="Jinja file or Axolotl's name; default: the tokenizer's.")] = None,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="Its variables as in the training, a JSON object.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt of questions that name none.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and stop.")] = False,
) -> None:
    """Find SAE latents that cause misalignment (BLOCK-EM, arXiv 2602.00767), for `em_regularizer.block_em.latents`.

    Answers and judgments are kept; run the same command again after an interruption. Exit code 0: found and written. 4: wrong
    input, or models and questions that nothing can be learnt from. 2: it could not be done.
    """
    at_work("loading the models")
    from emguard_plugin.discovery.job import Job, prepare
    from emguard_plugin.discovery.run import run
    from emguard_plugin.discovery.settings import PAPER_STRENGTHS, Settings
    from emguard_plugin.evaluation.judges.named import read_judge

    words: dict[str, Any] = {
        "positions": positions,
        "steer_at": steer_at,
        "mode": mode,
        "rule": rule,
        "schedule": schedule,
    }  # looked at by `Settings`
    settings = Settings(
        **words, pool=pool, shortlist=shortlist, size=size, induce=induce, repair=repair,
        strengths=_numbers(strengths) if strengths else PAPER_STRENGTHS, budget=budget, budget_extra=budget_extra,
        max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    job = Job(
        misaligned, tuple(sae), questions, output, base, evaluation_questions, data, tuple(exclude or ()), tuple(union or ()),
        work, baselines, _chat(chat_template, chat_template_kwargs, system_prompt),
    )  # fmt: skip
    discovery = prepare(job, settings, read_judge(judge))
    _show_plan(discovery)
    if dry_run:
        return
    latents = run(discovery)
    typer.echo(f"{len(latents)} latents at block {', '.join(map(str, latents.layers))}: {output}")
    typer.echo(f"{job.folder() / 'report.html'}")


def _chat(template: str | None, variables: str | None, system_prompt: str | None) -> Any:
    import json

    from emguard_plugin.evaluation.asking.asking import read_template
    from emguard_plugin.evaluation.asking.rendering import Rendering

    try:
        given = json.loads(variables or "{}")
    except ValueError as exc:
        raise ValueError(f"`--chat-template-kwargs` is no JSON ({exc}). Write it like '{{\"enable_thinking\": false}}'.") from exc
    if not isinstance(given, dict):
        raise ValueError("`--chat-template-kwargs` is no JSON object. Write it like '{\"enable_thinking\": false}'.")
    return Rendering(read_template(template, "--chat-template"), given, system_prompt)


def _numbers(texts: list[str]) -> tuple[float, ...]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        return tuple(float(part) for part in parts if part)
    except ValueError as exc:
        raise ValueError(f"`--strengths {','.join(parts)}`: give numbers above 0, such as 0.1,0.2,0.4.") from exc


def _show_plan(discovery: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from emguard_plugin.discovery.plan import paper_answers

    settings = discovery.settings
    table = Table("block", "stage", "answers", "judgments, at most", title="plan; an equal answer is judged once")
    for layer, steps in discovery.plans().items():
        for step in steps:
            span = f"{step.most:,}" if step.least == step.most else f"{step.least:,} to {step.most:,}"
            table.add_row(str(layer), step.stage, span, f"{step.most:,}")
        width = discovery.saes[layer][1].cfg.d_sae
        pool = min(settings.pool, width // 2)
        full = paper_answers(settings, discovery.selection, pool, pool)
        table.add_section()
        table.add_row(str(layer), "stages 1 to 3 on the published schedule", f"{full:,}", f"{full:,}")
    Console().print(table)
    if settings.rule == "attribution":
        typer.echo(
            f"`--rule attribution` is emguard's own, not the paper's: no latent is steered alone. Besides the answers it takes at most "
            f"{4 * discovery.selection:,} forward and backward passes per block, over a prompt with its answer."
        )
