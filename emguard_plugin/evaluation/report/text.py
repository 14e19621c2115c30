"""Answers are hostile input: nothing in them may act on a page or a terminal."""

from __future__ import annotations

import html
import re

# Control characters but newline and tab; C1; bidirectional overrides, which reorder what a reader sees; surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Replace every character that acts instead of showing by one that shows, such as ESC by ␛."""
    return _ACTIVE.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 0x20 else "\ufffd", text)


def cell(text: object) -> str:
    """Return text that a spreadsheet shows instead of running it as a formula."""
    shown = clean(str(text))
    return f"'{shown}" if shown.lstrip().startswith(("=", "+", "-", "@", "\t")) else shown


def escape(text: object) -> str:
    """Return text that is inert in HTML, inside elements and inside quoted attributes."""
    return html.escape(clean(str(text)), quote=True)
