"""One HTML page without scripts and without a network request, from a jinja2 template beside its facts.

Whatever a template prints is made inert: `clean` takes what acts on a reader, autoescape what acts in a browser. No template
switches that off and no code marks text as safe, which a test looks after.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from emguard_plugin.files.writing import write_text
from emguard_plugin.pages.text import bounds, clean, number, percent

GENERATOR = 'name="generator" content="emguard"'
"""Every page of ours holds this."""


def page(template: str, package: str, facts: Mapping[str, Any]) -> str:
    """Return a page.

    Args:
        template: Its template, in the folder `templates` of `package`; it extends `base.html.jinja`.
        package: The room whose report it is.
        facts: What the template shows.

    Raises:
        jinja2.UndefinedError: If the template shows what is not there.
    """
    return _environment(package).get_template(template).render(facts)


def write_page(path: str | Path, template: str, package: str, facts: Mapping[str, Any]) -> Path:
    """Write a page, in one piece, and return its path."""
    path = Path(path)
    write_text(path, page(template, package, facts))
    return path


def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "bounds": bounds, "number": number, "at": _at}
    return environment


def _shown(value: Any) -> Any:
    """What is printed of a value; what a macro returns is escaped already."""
    if value is None:
        return "–"
    return clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _at(share: float) -> str:
    """A share as a place on a lane: positions are percentages, so that a lane stretches with the page and text does not."""
    return f"{100 * share:.2f}%"
