"""`emguard demo`: the main job, start to end."""

from __future__ import annotations

from typing import Annotated

import typer

from emguard_plugin.cli.frame import at_work, kept


@kept("./demo keeps what was finished.", "--no-fresh")
def demo(
    fresh: Annotated[bool, typer.Option(help="Start anew, in place of what an earlier `emguard demo` left in ./demo.")] = True,
) -> None:
    """Train the lab model with and without TReFT through Axolotl, measure both, show one table. About 4 minutes."""
    at_work("two trainings and two measurements of a small model, about 4 minutes; files go to ./demo")
    from emguard_plugin.demo import run_demo

    raise typer.Exit(run_demo(fresh=fresh))
