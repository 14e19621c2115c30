import json
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emguard_plugin.evaluation import Summary, run_em_eval, write_comparison
from emguard_plugin.evaluation.report.columns import columns_of
from emguard_plugin.evaluation.report.table import comparison_table
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.judging_parts import resealed
from tests.pages.html import Page, outline, with_texts
from tests.pages.test_page import ACTIVE

HOSTILE = "<script>alert(1)</script> <img src=//evil.example/x> \x1b[31mred\x1b[0m \u202eevil\x00 [bold]x[/bold] & \"'"


@pytest.fixture
def hostile(finished):
    """The folder of a run all of whose answers attack their reader."""
    file = JsonLines(finished.folder / "responses.jsonl")
    rows = [{**row, "text": HOSTILE} for row in file.read()]
    file.path.unlink()
    file.append(resealed(finished.folder, rows))
    return finished


def test_hostile_answers_and_names_stay_text(hostile, tmp_path):
    path = write_comparison([(HOSTILE, hostile)], tmp_path / "page.html", extra={HOSTILE: {HOSTILE: HOSTILE}})
    raw = path.read_text()
    page = Page(raw)
    assert not {"script", "img", "iframe", "link", "object", "form", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", raw)
    assert "<script>alert(1)</script>" in page.text


LITERAL = {"pass", "fail", "inconclusive", "base", "tuned"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.text(st.characters(), max_size=12) | st.sampled_from(["<b>", '" onload="x', "</style>", "{{ 1 }}", "-->", "]]>"]))
def test_no_field_of_a_summary_acts_on_its_page(finished, tmp_path, before):
    """All that a stored result says may have been written by another: the page is built the same whatever it is."""
    stated = json.loads(finished.model_dump_json())

    def change(text):
        return text if text in LITERAL else before + text

    plain, hostile = Summary.model_validate(stated), Summary.model_validate(with_texts(stated, change))
    name = before + "fine-tuned"
    found = write_comparison([(name, hostile)], tmp_path / "a.html", extra={name: {before: before}}, title=before + "T").read_text()
    assert outline(found) == outline(
        write_comparison([("fine-tuned", plain)], tmp_path / "b.html", extra={"fine-tuned": {"": ""}}).read_text()
    )
    assert not re.search(ACTIVE, found)


def test_the_page_asks_nothing_of_the_network(finished, tmp_path):
    raw = write_comparison([("tuned", finished)], tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|src=|href=", raw)
    assert "default-src 'none'" in raw
    assert len(raw) < 200_000


def test_the_page_shows_each_model_with_counts_and_intervals(finished, tmp_path):
    page = Page(write_comparison([("naive", finished)], tmp_path / "p.html").read_text())
    rates = finished.rates()
    assert f"{100 * rates.em_all.value:.1f} %" in page.text
    assert f"{rates.em_all.count} of {rates.em_all.n} answers misaligned" in page.text
    assert f"{100 * rates.em_all.interval[0]:.1f} to {100 * rates.em_all.interval[1]:.1f}" in page.text
    assert finished.fingerprint[:16] in page.text
    assert "Answers side by side" in page.text


def test_a_summary_without_its_folder_gives_a_page_without_answers(finished, tmp_path):
    shutil.copy(finished.folder / "summary.json", tmp_path / "alone.json")
    page = Page(write_comparison([("x", tmp_path / "alone.json")], tmp_path / "p.html").read_text())
    assert "Answers side by side" not in page.text


def other_run(finished, make_config, checkpoints, tmp_path, **over):
    return run_em_eval(make_config(**over), checkpoints / "whole", tmp_path / "other", checkpoints / "base")


def test_runs_on_one_base_share_its_row(finished, make_config, checkpoints, tmp_path):
    runs = [("naive", finished.folder), ("TReFT", other_run(finished, make_config, checkpoints, tmp_path))]
    page = Page(write_comparison(runs, tmp_path / "p.html", extra={"TReFT": {"s / step": "0.12"}}).read_text())
    assert "TReFT has an EM rate of" in page.text
    assert "0.12" in page.text
    table = comparison_table(runs, extra={"TReFT": {"s / step": "0.12"}})
    assert [str(cell) for cell in table.columns[0].cells] == ["base", "naive", "TReFT"]
    assert [str(cell) for cell in table.columns[-1].cells] == ["–", "–", "0.12"]


def test_runs_by_different_protocols_are_laid_side_by_side_only_by_force(finished, make_config, checkpoints, tmp_path):
    runs = [("a", finished), ("b", other_run(finished, make_config, checkpoints, tmp_path, seed=5))]
    with pytest.raises(ValueError, match=r"another protocol .* differ in decoding"):
        write_comparison(runs, tmp_path / "p.html")
    with pytest.raises(ValueError, match="another protocol"):
        comparison_table(runs)
    assert "Not comparable" in write_comparison(runs, tmp_path / "p.html", force=True).read_text()
    assert "NOT COMPARABLE" in comparison_table(runs, force=True).caption


def test_runs_need_names_of_their_own(finished, tmp_path):
    for runs in ([], [("a", finished), ("a", finished)]):
        with pytest.raises(ValueError, match="name of its own"):
            write_comparison(runs, tmp_path / "p.html")
    with pytest.raises(ValueError, match="does not exist"):
        Summary.load(tmp_path / "nowhere")


def test_a_run_named_base_is_told_from_the_base(finished):
    columns, _ = columns_of([("base", finished)])
    assert [(column.name, column.role) for column in columns] == [("base model", "base"), ("base", "tuned")]


def test_terminal_output_of_a_hostile_name_has_no_escape(hostile):
    from rich.console import Console

    console = Console(width=200, force_terminal=True)
    with console.capture() as captured:
        console.print(comparison_table([(HOSTILE, hostile)]))
    assert "\x1b[31mred" not in captured.get()
    assert "[bold]x[/bold]" in captured.get()


def test_importing_the_package_is_cheap():
    code = "import emguard_plugin.evaluation, sys; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
