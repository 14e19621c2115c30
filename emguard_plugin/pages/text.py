"""Answers are hostile input: nothing in them may act on a page, a terminal or a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

# Control characters but newline and tab; C1; bidirectional overrides, which reorder what a reader sees; surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@")


def clean(text: str) -> str:
    """Replace every character that acts instead of showing by one that shows, such as ESC by ␛."""
    return _ACTIVE.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 0x20 else "\ufffd", text)


def cell(text: object) -> str:
    """Return text that a spreadsheet shows instead of running it as a formula.

    A spreadsheet looks past spaces and characters without a width, and takes a full-width sign for the sign.
    """
    shown = clean(str(text))
    first = next((sign for sign in shown if not sign.isspace() and unicodedata.category(sign) != "Cf"), "")
    return f"'{shown}" if unicodedata.normalize("NFKC", first).startswith(_FORMULA) else shown


def percent(value: float | None) -> str:
    """Write a share as `12.3 %`, or a dash for none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def bounds(interval: tuple[float, float] | None) -> str:
    """Write an interval in percent as `10.1 to 14.9`, or a dash for none."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def number(value: float | None, form: str) -> str:
    """Write a number by a format such as `.2f`, its minus as a minus; a dash for none."""
    return "–" if value is None else format(value, form).replace("-", "−")
