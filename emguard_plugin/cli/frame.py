"""What every `emguard` command does with what goes wrong: one sentence, an exit code that means one thing, no traceback."""

from __future__ import annotations

import os
import traceback
from typing import Any

import click
import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from emguard_plugin.config.problems import problems
from emguard_plugin.exit_codes import EXIT_ERROR, EXIT_INPUT
from emguard_plugin.files.secrets import SecretInConfigError, redact

LONGEST = 1500


class Frame(TyperGroup):
    """The group of all commands. `EMGUARD_DEBUG=1` prints the traceback before the sentence."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the options before the command; a wrong one is wrong input."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            error.exit_code = EXIT_INPUT
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except click.ClickException as error:
            error.exit_code = EXIT_INPUT
            raise
        except Exception as error:
            if isinstance(error, click.Abort):
                raise
            if os.environ.get("EMGUARD_DEBUG"):
                typer.echo(printable(redact(traceback.format_exc())), err=True)
            sentence, code = in_words(error)
            typer.echo(f"emguard {ctx.invoked_subcommand or ''}: {sentence}", err=True)
            raise typer.Exit(code) from error


def in_words(error: Exception) -> tuple[str, int]:
    """Return one line about an exception, without keys, and what the command ends with."""
    if isinstance(error, ValidationError):
        return printable(" | ".join(problems(error, error.title))), EXIT_INPUT
    text = " ".join(redact(str(error)).split())
    text = printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")
    if isinstance(error, SecretInConfigError | ValueError) and text:
        return text, EXIT_INPUT
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{redact(error.filename)}: {error.strerror or type(error).__name__}."), EXIT_ERROR
    if type(error) is RuntimeError or (isinstance(error, RuntimeError) and type(error).__module__.startswith("emguard_plugin")):
        return text, EXIT_ERROR
    hint = "" if os.environ.get("EMGUARD_DEBUG") else " EMGUARD_DEBUG=1 shows where."
    return f"{type(error).__name__}: {text or 'no message'}.{hint}".replace("..", "."), EXIT_ERROR


def printable(text: str) -> str:
    """Return text that any terminal takes: half characters, which YAML can hold, are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
