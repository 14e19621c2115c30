"""`emguard report`: finished measurements side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    runs: Annotated[list[str], typer.Argument(help="Result folders to lay side by side, as NAME=FOLDER or FOLDER.")],
    output: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
    force: Annotated[bool, typer.Option(help="Also compare across protocols; table and page are marked then.")] = False,
) -> None:
    """Lay finished measurements side by side, in one table and one page. Measures nothing."""
    from emguard_plugin.evaluation.report.page import write_comparison
    from emguard_plugin.files.ours import may_replace
    from emguard_plugin.pages.page import GENERATOR

    may_replace(output, GENERATOR, "report")
    named = [_named(run) for run in runs]
    show(named, write_comparison(named, output, force=force), force=force)


def show(runs: list[tuple[str, Any]], page: Path, force: bool = False) -> None:
    """Print the table of runs, and where their page lies."""
    from rich.console import Console

    from emguard_plugin.evaluation.report.table import comparison_table

    Console().print(comparison_table(runs, force=force))
    typer.echo(f"{page}")


def _named(run: str) -> tuple[str, str]:
    """Read NAME=FOLDER, or name a folder after itself; `em_eval` folders after the model that they lie in."""
    name, mark, folder = run.partition("=")
    if mark:
        return name, folder
    path = Path(run).resolve()
    return (path.parent.name if path.name == "em_eval" else path.name), run
