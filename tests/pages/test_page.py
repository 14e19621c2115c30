"""Pages from templates: whatever stands in a fact, it is shown and does nothing."""

import re
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import emguard_plugin
from emguard_plugin.pages import page as pages
from emguard_plugin.pages.curves import Curves, Line, Point
from emguard_plugin.pages.text import bounds, cell, clean, number, percent
from tests.pages.html import Page

SOURCES = Path(emguard_plugin.__file__).parent
ACTIVE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def rendered(source, **facts):
    """Render a template of this test by the environment that every page is made in."""
    environment = pages._environment("emguard_plugin.pages")
    return environment.from_string('{% import "marks.html.jinja" as marks %}' + source).render(facts)


def test_text_that_acts_is_made_to_show():
    assert clean("a\x1b[31m\x07\tb\nc\x7f\x9b\u202e\ud800") == "a␛[31m␇\tb\nc\ufffd\ufffd\ufffd\ufffd"


@given(st.text(st.characters(), max_size=60) | st.text("<>&\"'\x00\x1b\u202e\ud800={}%#", max_size=20))
def test_no_text_acts_in_an_element_an_attribute_or_a_macro(text):
    raw = rendered('<p title="{{ text }}">{{ text }}</p>{{ marks.cards(["a", text], [(text, [(text, text)])]) }}', text=text)
    page = Page(raw)
    assert page.tags == ["p", "table", "thead", "tr", "th", "th", "tbody", "tr", "th", "td", "span", "small"]
    assert [name for name, _ in page.attributes] == ["title", "class", "data-label"]
    assert not re.search(ACTIVE, raw)
    assert page.text.count(clean(text)) >= 5 or not text


def test_what_is_missing_is_an_error_and_none_a_dash():
    with pytest.raises(jinja2.UndefinedError):
        rendered("{{ nowhere }}")
    with pytest.raises(jinja2.UndefinedError):
        rendered("{{ thing.nowhere }}", thing=Point(0, 0))
    assert rendered("{{ thing }}", thing=None) == "–"


def test_no_template_and_no_code_switches_the_escaping_off():
    """Autoescape is the one mechanism; who goes around it must change this test."""
    templates = list(SOURCES.rglob("*.jinja"))
    assert len(templates) >= 4
    for path in templates:
        assert not re.search(r"\|\s*safe|autoescape", path.read_text()), path
    for path in SOURCES.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bMarkup\b|markupsafe|__html__\s*\(", text), path
        assert ("autoescape" in text) == (path == SOURCES / "pages" / "page.py"), path
        assert not re.search(r"</(p|td|div|span|h\d|table)>", text), f"{path} writes HTML by hand"


def test_curves_are_drawn_where_they_are_said_to_run():
    line = Line(3, [Point(0.25, 0.5, (0.4, 0.6), "of <2>"), Point(0.75, 0.0)], 4.5)
    page = Page(rendered("{{ marks.curves(drawn) }}", drawn=Curves(90, [line], [(0, "100 %")], [(0.25, "<1>")])))
    assert page.tags.count("circle") == 2
    assert [value for name, value in page.attributes if name == "cx"] == ["25.00%", "75.00%"]
    assert [value for name, value in page.attributes if name == "cy"] == ["50.00%", "0.00%"]
    assert {"25.00%", "75.00%", "50.00%", "0.00%", "40.00%", "60.00%"} >= {v for n, v in page.attributes if n in ("y1", "y2", "x1", "x2")}
    assert "of <2>" in page.text
    assert "<1>" in page.text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =1", "\t=1", "＝1", "\ufeff=1", "\u200b=1", "\u00a0\u200b＋1", "﹣1"])
def test_a_cell_is_never_a_formula(text):
    assert cell(text).startswith("'")


@pytest.mark.parametrize("text", ["plain - text", "1-1", "", " ", "\ttabbed", "ö=1"])
def test_a_cell_that_is_none_stays_as_it_is(text):
    assert cell(text) == text


def test_numbers_are_written_for_readers():
    assert (percent(0.1234), percent(None), bounds((0.1, 0.2)), bounds(None)) == ("12.3 %", "–", "10.0 to 20.0", "–")
    assert (number(-0.5, ".2f"), number(None, ".2f")) == ("−0.50", "–")
