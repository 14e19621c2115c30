"""`emguard` on the command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.lab.cli import app as lab

app = typer.Typer(
    help="Keep a narrow fine-tune narrow, and measure that it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(lab, name="lab")


@app.command()
def check(config: Annotated[Path, typer.Argument(help="An Axolotl or TRL YAML.")]) -> None:
    """Say what would be active and what conflicts, without training. Exit code 1 when something must change."""
    from emguard_plugin.check import check_config

    report = check_config(config)
    for line in report.active:
        typer.echo(f"active   {line}")
    for line in report.notes:
        typer.echo(f"note     {line}")
    for line in report.problems:
        typer.echo(f"problem  {line}", err=True)
    if report.problems:
        raise typer.Exit(1)
    typer.echo("ok" if report.active else "ok, and nothing of emguard is active")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sft(context: typer.Context) -> None:
    """Train like `trl sft`, with `em_regularizer:` and `em_eval:` in the file: emguard sft --config run.yaml.

    Every key of the file is an option as well; `emguard sft -h` lists them.
    """
    import yaml

    from emguard_plugin.sft import parse, train

    try:
        arguments = parse(context.args)
    except (ValueError, OSError, yaml.YAMLError) as exc:
        typer.echo(f"emguard sft: {exc}", err=True)
        raise typer.Exit(1) from exc
    train(*arguments)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model or adapter folder.")],
    config: Annotated[Path, typer.Option(help="A YAML or JSON with an `em_eval:` block, or the block itself.")],
    output_dir: Annotated[Path | None, typer.Option(help="Where results go; default MODEL/em_eval.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model of an adapter, when it has moved.")] = None,
) -> None:
    """Measure the EM rate of a saved model, and of its base."""
    import yaml
    from rich.console import Console

    from emguard_plugin.config import EMEvalConfig
    from emguard_plugin.evaluation.run import run_em_eval
    from emguard_plugin.evaluation.table import comparison_table

    try:
        content = yaml.safe_load(config.read_text()) or {}
        block = EMEvalConfig.model_validate(content.get("em_eval", content))
        block.check_files()
        out = output_dir or Path(block.output_dir or Path(model) / "em_eval")
        summary = run_em_eval(block, model, out, base=base)
    except (ValueError, OSError) as exc:
        typer.echo(f"emguard eval: {exc}", err=True)
        raise typer.Exit(1) from exc
    Console().print(comparison_table([(Path(model).name, summary)]))
    typer.echo(f"{out / 'report.html'}")


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


if __name__ == "__main__":
    main()
