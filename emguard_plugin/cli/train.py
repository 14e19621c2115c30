"""`emguard sft`, `dpo`, `kto` and `grpo`: TRL's scripts with a guard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from emguard_plugin.cli.frame import at_work, kept

if TYPE_CHECKING:
    from emguard_plugin.training.trl_script import Kind

_SAVED = "Checkpoints that were saved are whole."
_GO_ON = "--resume_from_checkpoint=true"


def _run(arguments: list[str], kind: Kind) -> None:
    at_work("loading TRL")
    from emguard_plugin.training.trl_script import parse, train

    script, training, model, data = parse(arguments, kind)
    train(script, training, model, data, kind)


@kept(_SAVED, _GO_ON)
def sft(context: typer.Context) -> None:
    """Train like `trl sft`, with `em_regularizer:` and `em_eval:` in the file: emguard sft --config run.yaml.

    Every key of the file is an option as well; `emguard sft -h` lists them.
    """
    _run(context.args, "sft")


@kept(_SAVED, _GO_ON)
def dpo(context: typer.Context) -> None:
    """Train like `trl dpo`, on pairs of answers, with both blocks in the file: emguard dpo --config run.yaml."""
    _run(context.args, "dpo")


@kept(_SAVED, _GO_ON)
def kto(context: typer.Context) -> None:
    """Train like `trl kto`, on wanted and unwanted answers, with both blocks in the file: emguard kto --config run.yaml."""
    _run(context.args, "kto")


@kept(_SAVED, _GO_ON)
def grpo(context: typer.Context) -> None:
    """Train like `trl grpo`, on answers that the model draws, with both blocks in the file: emguard grpo --config run.yaml."""
    _run(context.args, "grpo")
