"""All commands of `emguard`. A command imports what it needs when it runs."""

from __future__ import annotations

import typer

from emguard_plugin.cli.check import check
from emguard_plugin.cli.demo import demo
from emguard_plugin.cli.discover import discover
from emguard_plugin.cli.evaluate import Rejudging, evaluate
from emguard_plugin.cli.frame import Frame
from emguard_plugin.cli.lab import app as lab
from emguard_plugin.cli.report import report
from emguard_plugin.cli.train import dpo, grpo, kto, sft

app = typer.Typer(
    cls=Frame,
    help="Keep a narrow fine-tune narrow, and measure that it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(lab, name="lab")
app.command()(discover)
app.command()(check)
for _train in (sft, dpo, kto, grpo):
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_train)
app.command("eval", cls=Rejudging)(evaluate)
app.command()(report)
app.command()(demo)
