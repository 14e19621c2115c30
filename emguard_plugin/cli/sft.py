"""`emguard sft`: `trl sft` with a guard."""

from __future__ import annotations

import typer

from emguard_plugin.cli.frame import at_work, kept


@kept("Checkpoints that were saved are whole.", "--resume_from_checkpoint=true")
def sft(context: typer.Context) -> None:
    """Train like `trl sft`, with `em_regularizer:` and `em_eval:` in the file: emguard sft --config run.yaml.

    Every key of the file is an option as well; `emguard sft -h` lists them.
    """
    at_work("loading TRL")
    from emguard_plugin.training.trl_script import parse, train

    train(*parse(context.args))
