"""`emguard eval`: the EM rate of a saved model and of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from emguard_plugin.cli.frame import at_work, kept
from emguard_plugin.cli.report import show


class Rejudging(TyperCommand):
    """`--rejudge` may stand alone, for all judges, or name one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the option without a value an empty one."""
        following = [*args[1:], "-"]
        alone = [word == "--rejudge" and after.startswith("-") for word, after in zip(args, following, strict=True)]
        return super().parse_args(ctx, ["--rejudge=" if bare else word for word, bare in zip(args, alone, strict=True)])


@kept("What was answered and judged is kept.")
def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model or adapter folder; with --adapter, the base model.")],
    config: Annotated[Path, typer.Option(help="A YAML or JSON with an `em_eval:` block, or the block itself.")],
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter folder, trained on MODEL.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where results go; default MODEL/em_eval.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model of an adapter, when it has moved.")] = None,
    phase: Annotated[list[str] | None, typer.Option(help="generate, judge or report; may be given again. Default: all three.")] = None,
    fail_above: Annotated[float | None, typer.Option(help="The highest EM rate that is accepted; wins over the file.")] = None,
    rejudge: Annotated[
        list[str] | None, typer.Option(help="Judge anew what was judged: all judges, or with a name this one.", metavar="[NAME]")
    ] = None,
) -> None:
    """Measure the EM rate of a saved model, and of its base.

    Answers, scores and summary are saved as they come; run the same command again after an interruption. Answers are kept:
    with another judge, or one more, only its judgments are made. Exit code 0: measured, and no gate or one that is passed.
    1: the EM rate is above `fail_above`. 2: not measured, or not in full. 3: the answers cannot tell, which is no pass. 4: wrong
    input. Several judges end as the worst of them: 1, else 2, else 3, else 0.
    """
    from emguard_plugin.evaluation.ready import read_eval_file
    from emguard_plugin.evaluation.report.exports import model_name
    from emguard_plugin.evaluation.run import PHASES, run_em_eval

    tuned, start = (model, base) if adapter is None else (str(adapter), base or model)
    block = read_eval_file(config, {} if fail_above is None else {"fail_above": fail_above}, model=tuned)
    block.check_files()
    out = output_dir or Path(block.output_dir or Path(tuned) / "em_eval")
    at_work(f"measuring; what is found lies in {out}")
    summary = run_em_eval(block, tuned, out, base=start, phases=phase or PHASES, rejudge="" in (rejudge or ()) or rejudge or ())
    if summary is None:
        typer.echo(f"{out}: {', '.join(phase or ())} done")
        return
    show([(model_name(summary), summary)], out / "report.html")
    _gate(summary)


def _gate(summary: Any) -> None:
    from emguard_plugin.evaluation.gate import ending
    from emguard_plugin.exit_codes import EXIT_PASS
    from emguard_plugin.pages.text import clean

    found = ending(summary)
    for code, line in found.lines:
        typer.echo(clean(line), err=code != EXIT_PASS)
    if found.code != EXIT_PASS:
        raise typer.Exit(found.code)
