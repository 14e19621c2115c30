"""Figures are kept beside the answers, and taken only for these very answers and this very code."""

import json

import pytest

from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.evaluation.run_folder import computed
from emguard_plugin.evaluation.statistics.rates import Scored

ANSWERS = [Scored(f"q{n % 4}", "c", 10.0 if n % 3 == 0 else 90.0, 80.0) for n in range(24)]
JUDGED = {name: {role: {"questions": ANSWERS} for role in ("base", "tuned")} for name in ("a", "b")}
ALL, NONE = dict.fromkeys(JUDGED, True), dict.fromkeys(JUDGED)


@pytest.fixture
def counted(monkeypatch):
    calls, real = [], computed._computed
    monkeypatch.setattr(computed, "_computed", lambda *given: calls.append(1) or real(*given))
    return calls


def asked(folder, judged=JUDGED, measured=ALL, stopped=NONE, gate=0.5):
    return computed.figures_of(folder, judged, measured, stopped, gate)


def test_the_same_answers_are_counted_once_and_read_back_to_the_last_bit(tmp_path, counted):
    first = asked(tmp_path)
    assert asked(tmp_path) == first
    assert asked(tmp_path).model_dump_json() == first.model_dump_json()
    assert len(counted) == 1


CHANGES = {
    "an answer": {"judged": {**JUDGED, "a": {**JUDGED["a"], "tuned": {"questions": [*ANSWERS[:-1], Scored("q3", "c", 0.0, 80.0)]}}}},
    "the order of the judges": {"judged": dict(reversed(JUDGED.items()))},
    "the gate": {"gate": 0.4},
    "no gate": {"gate": None},
    "a mock judge": {"measured": {**ALL, "a": False}},
    "a judge that stopped": {"stopped": {**NONE, "a": "no quota"}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_a_figure_depends_on_makes_it_anew(tmp_path, counted, change):
    asked(tmp_path)
    changed = asked(tmp_path, **change)
    assert len(counted) == 2
    (tmp_path / computed.KEPT).unlink()
    assert asked(tmp_path, **change) == changed


@pytest.mark.parametrize("what", ["code", "package", "figure", "cut", "empty", "a list"])
def test_other_code_and_a_changed_file_make_it_anew(tmp_path, counted, monkeypatch, what):
    first = asked(tmp_path)
    file = tmp_path / computed.KEPT
    if what == "code":
        monkeypatch.setattr(computed, "_code", lambda: "another")
    elif what == "package":
        monkeypatch.setattr(computed, "versions", lambda names: {"scipy": "9"})
    elif what == "figure":
        said = json.loads(file.read_text())
        said["figures"]["judges"][0]["rates"]["tuned"]["questions"]["em_all"].update(value=0.0, count=0)
        file.write_text(json.dumps(said))
    else:
        file.write_text({"cut": file.read_text()[:200], "empty": "", "a list": "[]"}[what])
    assert asked(tmp_path) == first
    assert len(counted) == 2


def test_a_finished_folder_is_not_counted_again(finished, make_config, checkpoints, counted):
    before = (finished.folder / "summary.json").read_bytes()
    again = run_em_eval(make_config(), checkpoints / "adapter", finished.folder)
    assert counted == []
    assert again.model_dump() == finished.model_dump()
    assert (finished.folder / "summary.json").read_bytes() == before
