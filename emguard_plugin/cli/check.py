"""`emguard check`: what would be active and what conflicts, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.cli.frame import at_work
from emguard_plugin.exit_codes import EXIT_INPUT


def check(config: Annotated[Path, typer.Argument(help="An Axolotl or TRL YAML.")]) -> None:
    """Say what would be active and what conflicts, without training. Exit code 4 when something must change."""
    at_work(f"reading {config}")
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
