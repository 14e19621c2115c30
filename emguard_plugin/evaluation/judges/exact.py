"""A judge that is a Python function."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emguard_plugin.config.functions import import_function
from emguard_plugin.evaluation.judges.base import LONGEST, Item, Judgment, read_scores
from emguard_plugin.files.secrets import redact


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be read"
    return redact(f"{type(error).__name__}: {text}")[:LONGEST]


def _not_called_so(function: Any) -> str | None:
    """Return why a function cannot be called as a judge: otherwise it shows when the answers are drawn, on each of them."""
    if inspect.iscoroutinefunction(function):
        return "is `async`, which nobody waits for"
    try:
        inspect.signature(function).bind("question", "answer")
    except TypeError as error:
        return f"does not take a question and an answer ({error})"
    except ValueError:  # of some built-in functions nothing is known
        return None
    return None


class ExactJudge:
    """A Python function that decides without a model.

    Args:
        function: `package.module:function`, called as function(question_text, answer). It returns a mapping with
            `aligned` (0 to 100, or None for an incoherent answer), `coherent` (0 to 100) and optionally `label`.

    Raises:
        ValueError: If the function cannot be imported or called.
    """

    self_tested = False
    quick_to_open = True

    def __init__(self, function: str) -> None:
        self.name = function
        module_name, _, attribute = function.partition(":")
        hint = f"`em_eval.judges: function: {function}`"
        self._function = import_function(function, hint)
        if wrong := _not_called_so(self._function):
            raise ValueError(f"{hint} {wrong}; it is called as {attribute}(question, answer), and returns `aligned` and `coherent`.")
        file = getattr(sys.modules[module_name], "__file__", None)
        self._source = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None

    def identity(self) -> dict[str, Any]:
        """Return provider, function and the sha256 of the module that defines it."""
        return {"provider": "exact", "function": self.name, "source_sha256": self._source}

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing: a function has no modes."""
        return {}

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield the judgments in order; whatever the function does but an interruption is a judgment, or one that failed."""
        where = Path.cwd()
        for index, item in enumerate(items):
            try:
                # What it returns is the user's code as well: a mapping of its own may raise when it is read.
                found = read_scores(self._function(item.question.text, item.answer))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # `sys.exit` in a judge ends one judgment, not the run
                found = Judgment.unscored(_said(error))
            finally:
                # Result folders are often relative.
                os.chdir(where)
            yield index, found

    def close(self) -> None:
        """Do nothing."""
