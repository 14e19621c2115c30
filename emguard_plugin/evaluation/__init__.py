"""Questions -> responses -> judgments -> EM rate -> report. Never imports a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emguard_plugin.evaluation.asking.questions import Question, load_questions
    from emguard_plugin.evaluation.report.page import write_comparison
    from emguard_plugin.evaluation.run import run_em_eval
    from emguard_plugin.evaluation.run_folder.summary import Summary

_HOME = {
    "Question": "asking.questions",
    "Summary": "run_folder.summary",
    "load_questions": "asking.questions",
    "run_em_eval": "run",
    "write_comparison": "report.page",
}
__all__ = ["Question", "Summary", "load_questions", "run_em_eval", "write_comparison"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package stays cheap."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
