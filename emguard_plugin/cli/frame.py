"""What every `emguard` command does with what goes wrong: one sentence, an exit code that means one thing, no traceback."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import typer
from typer.core import TyperGroup

from emguard_plugin.exit_codes import EXIT_ERROR, EXIT_INPUT, EXIT_INTERRUPTED
from emguard_plugin.files.secrets import SecretInConfigError, redact

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST = 1500
F = TypeVar("F", bound=Callable[..., None])
# Of click, or of typer itself, which holds its own copy in later versions: what its commands raise under either.
_UsageError: Any = typer.BadParameter.__bases__[0]
_ClickException: Any = _UsageError.__bases__[0]


def at_work(doing: str) -> None:
    """Say on stderr what a command is about to do, before it imports what takes seconds."""
    typer.echo(f"emguard: {printable(redact(doing))} ...", err=True)


def kept(words: str, option: str = "") -> Callable[[F], F]:
    """Mark a command with what an interruption leaves.

    Args:
        words: A sentence.
        option: What the command that goes on has besides what was given.

    Returns:
        A decorator that returns the command itself, marked.
    """

    def mark(command: F) -> F:
        command.kept = (words, option)  # type: ignore[attr-defined]  # a mark on the function
        return command

    return mark


class Frame(TyperGroup):
    """The group of all commands. `EMGUARD_DEBUG=1` prints the traceback before the sentence."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the options before the command; a wrong one is wrong input."""
        try:
            return super().make_context(*args, **kwargs)
        except _UsageError as error:
            error.exit_code = EXIT_INPUT  # click reads it from the error
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except (KeyboardInterrupt, typer.Abort):
            typer.echo(self._interrupted(ctx), err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except _ClickException as error:
            error.exit_code = EXIT_INPUT  # click reads it from the error
            raise
        except Exception as error:
            if os.environ.get("EMGUARD_DEBUG"):
                typer.echo(printable(redact(traceback.format_exc())), err=True)
            sentence, code = in_words(error)
            typer.echo(f"emguard {ctx.invoked_subcommand or ''}: {sentence}", err=True)
            raise typer.Exit(code) from error

    def _interrupted(self, ctx: Any) -> str:
        name = ctx.invoked_subcommand or ""
        words, option = getattr(getattr(self.commands.get(name), "callback", None), "kept", ("", ""))
        given = ["emguard", *sys.argv[1:]]
        again = redact(shlex.join([*given, option] if option and option not in given else given))
        return printable(f"emguard {name}: interrupted. {words}{' ' * bool(words)}To go on: {again}")


def is_validation_error(error: Exception) -> TypeGuard[ValidationError]:
    """Return whether pydantic raised an error; a command that never loads pydantic pays nothing for the question."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(error, pydantic.ValidationError)


def in_words(error: Exception) -> tuple[str, int]:
    """Return one line about an exception, without keys, and what the command ends with."""
    if is_validation_error(error):
        from emguard_plugin.config.problems import problems

        return printable(" | ".join(problems(error, error.title))), EXIT_INPUT
    text = " ".join(redact(str(error)).split())
    text = printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")
    if isinstance(error, SecretInConfigError | ValueError) and text:
        return text, EXIT_INPUT
    if type(error) is RuntimeError or (isinstance(error, RuntimeError | OSError) and type(error).__module__.startswith("emguard_plugin")):
        return text, EXIT_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{redact(error.filename)}: {error.strerror or type(error).__name__}."), EXIT_ERROR
    hint = "" if os.environ.get("EMGUARD_DEBUG") else " EMGUARD_DEBUG=1 shows where."
    return f"{type(error).__name__}: {text or 'no message'}.{hint}".replace("..", "."), EXIT_ERROR


def printable(text: str) -> str:
    """Return text that any terminal takes: half characters, which YAML can hold, are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
