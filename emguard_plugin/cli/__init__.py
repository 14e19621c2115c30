"""`emguard` on the command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from emguard_plugin.cli.discover import discover
from emguard_plugin.cli.frame import Frame
from emguard_plugin.cli.lab import app as lab
from emguard_plugin.exit_codes import EXIT_INPUT

app = typer.Typer(
    cls=Frame,
    help="Keep a narrow fine-tune narrow, and measure that it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(lab, name="lab")
app.command()(discover)


@app.command()
def check(config: Annotated[Path, typer.Argument(help="An Axolotl or TRL YAML.")]) -> None:
    """Say what would be active and what conflicts, without training. Exit code 4 when something must change."""
    from emguard_plugin.check import check_config

    report = check_config(config)
    for line in report.active:
        typer.echo(f"active   {line}")
    for line in report.notes:
        typer.echo(f"note     {line}")
    for line in report.problems:
        typer.echo(f"problem  {line}", err=True)
    if report.problems:
        raise typer.Exit(EXIT_INPUT)
    typer.echo("ok" if report.active else "ok, and nothing of emguard is active")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sft(context: typer.Context) -> None:
    """Train like `trl sft`, with `em_regularizer:` and `em_eval:` in the file: emguard sft --config run.yaml.

    Every key of the file is an option as well; `emguard sft -h` lists them.
    """
    from emguard_plugin.training.trl_script import parse, train

    train(*parse(context.args))


class _Rejudging(TyperCommand):
    """`--rejudge` may stand alone, for all judges, or name one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the option without a value an empty one."""
        following = [*args[1:], "-"]
        alone = [word == "--rejudge" and after.startswith("-") for word, after in zip(args, following, strict=True)]
        return super().parse_args(ctx, ["--rejudge=" if bare else word for word, bare in zip(args, alone, strict=True)])


@app.command("eval", cls=_Rejudging)
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
    summary = run_em_eval(block, tuned, out, base=start, phases=phase or PHASES, rejudge="" in (rejudge or ()) or rejudge or ())
    if summary is None:
        typer.echo(f"{out}: {', '.join(phase or ())} done")
        return
    _show([(model_name(summary), summary)], out / "report.html")
    _gate(summary)


def _show(runs: list, page: Path, force: bool = False) -> None:
    from rich.console import Console

    from emguard_plugin.evaluation.report.table import comparison_table

    Console().print(comparison_table(runs, force=force))
    typer.echo(f"{page}")


def _gate(summary: Any) -> None:
    from emguard_plugin.evaluation.gate import ending
    from emguard_plugin.evaluation.report.text import clean
    from emguard_plugin.exit_codes import EXIT_PASS

    found = ending(summary)
    for code, line in found.lines:
        typer.echo(clean(line), err=code != EXIT_PASS)
    if found.code != EXIT_PASS:
        raise typer.Exit(found.code)


def _named(run: str) -> tuple[str, str]:
    """Read NAME=FOLDER, or name a folder after itself; `em_eval` folders after the model that they lie in."""
    name, mark, folder = run.partition("=")
    if mark:
        return name, folder
    path = Path(run).resolve()
    return (path.parent.name if path.name == "em_eval" else path.name), run


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Result folders to lay side by side, as NAME=FOLDER or FOLDER.")],
    output: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
    force: Annotated[bool, typer.Option(help="Also compare across protocols; table and page are marked then.")] = False,
) -> None:
    """Lay finished measurements side by side, in one table and one page. Measures nothing."""
    from emguard_plugin.evaluation.report.page import write_comparison

    named = [_named(run) for run in runs]
    _show(named, write_comparison(named, output, force=force), force=force)


@app.command()
def demo(
    fresh: Annotated[bool, typer.Option(help="Remove ./demo first.")] = True,
) -> None:
    """Train the lab model with and without TReFT through Axolotl, measure both, show one table. About 4 minutes."""
    from emguard_plugin.demo import run_demo

    raise typer.Exit(run_demo(fresh=fresh))


def main() -> None:
    """Run the command line; Ctrl-C ends it without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
