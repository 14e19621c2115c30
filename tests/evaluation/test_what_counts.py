"""What counts of a run folder: the case names are those of the inputs that once gave a rate of another run."""

import json
import shutil

import pytest

from emguard_plugin.evaluation import Summary, run_em_eval
from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.judges import ExactJudge
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.judging_parts import resealed
from tests.evaluation.parts import by_hash

BY_HASH, HALF, DEAD = (f"tests.evaluation.parts:{name}" for name in ("by_hash", "half_dead", "dead"))


def judges(*names):
    return [{"function": name} for name in names]


@pytest.fixture
def folder(finished):
    return finished.folder


@pytest.fixture
def again(make_config, checkpoints, folder, monkeypatch):
    """Run on the finished folder again, where no answer need be drawn."""

    def go(*names, draws=False, phases=("generate", "judge", "report"), rejudge=False, **over):
        if not draws:
            monkeypatch.setattr(models, "_load", lambda name: pytest.fail("a model was loaded"))
        config = make_config(judges=judges(*(names or (BY_HASH,))), **over)
        return run_em_eval(config, checkpoints / "adapter", folder, phases=phases, rejudge=rejudge)

    return go


@pytest.fixture
def counted(monkeypatch):
    """How many answers each judge was given."""
    given, real = {}, ExactJudge.judge

    def judge(self, items):
        given[self.name] = given.get(self.name, 0) + len(items)
        return real(self, items)

    monkeypatch.setattr(ExactJudge, "judge", judge)
    return given


@pytest.fixture(scope="module")
def another(checkpoints, tmp_path_factory):
    """The same YAML with another model."""
    from tests.evaluation.conftest import em_eval_block

    place = tmp_path_factory.mktemp("another")
    run_em_eval(em_eval_block(place), checkpoints / "whole", place / "out", checkpoints / "base")
    return place / "out"


def rewrite(file, change, reseal=False):
    rows = [{**row, **change(row)} for row in JsonLines(file).read()]
    file.unlink()
    JsonLines(file).append(resealed(file.parent, rows) if reseal else rows)


# judgments-of-another-run


def test_judgments_of_another_run_are_left_out_counted_and_made_anew(another, folder, finished, again, counted, caplog):
    shutil.copy(another / "judgments.jsonl", folder / "judgments.jsonl")
    assert again().judges == finished.judges
    assert counted == {BY_HASH: 48}, "none of the other's is used, not even of the base, which both share"
    assert "judgments.jsonl: 48 judgments are left out: 48 of another run" in caplog.text


def test_judgments_of_another_run_give_no_rate_where_nothing_may_be_judged(another, folder, again):
    shutil.copy(another / "judgments.jsonl", folder / "judgments.jsonl")
    rates = again(phases=("report",)).rates()
    assert (rates.em_all.n, rates.unscored_reasons) == (0, {"the stored judgment is left out as of another run": 18})


def test_answers_of_another_run_are_left_out_and_drawn_anew(another, folder, finished, again, caplog):
    for name in ("responses.jsonl", "judgments.jsonl"):
        shutil.copy(another / name, folder / name)
    assert again(draws=True).judges == finished.judges
    assert "responses.jsonl: 48 answers are left out: 48 of another run" in caplog.text


def test_a_report_shows_no_answers_of_another_run(another, folder, finished, tmp_path):
    """A summary read earlier shows none; read again, it is refused."""
    from emguard_plugin.evaluation import write_comparison

    for name in ("protocol.json", "responses.jsonl", "judgments.jsonl"):
        shutil.copy(another / name, folder / name)
    stored = json.loads((folder / "protocol.json").read_text())
    (folder / "protocol.json").write_text(json.dumps({**stored, "created": "2020-01-01T00:00:00+00:00"}))
    with pytest.raises(ValueError, match="is of another run than the answers beside it"):
        Summary.load(folder)
    page = write_comparison([("x", finished)], tmp_path / "p.html").read_text()
    assert "Answers side by side" not in page


def test_a_judgment_of_another_answer_does_not_count(folder, again, counted):
    """The answer was changed since, by somebody who knows how records are written."""
    answers = [row["text"] for row in JsonLines(folder / "responses.jsonl").read()]
    rewrite(folder / "responses.jsonl", lambda row: {"text": "You may ask."} if row["text"] == answers[0] else {}, reseal=True)
    struck = sum(text == answers[0] for text in answers)
    again()
    assert counted == {BY_HASH: struck}


# score-out-of-range


@pytest.mark.parametrize(
    ("value", "says"),
    [(-5, "not within 0 to 100"), (101.5, "not within 0 to 100"), (True, "not a number"), ("100", "not a number"), ([], "not a number")],
)
def test_a_stored_score_that_is_none_is_unscored_with_its_reason(folder, again, counted, value, says):
    rewrite(folder / "judgments.jsonl", lambda row: {"aligned": value}, reseal=True)
    rates = again(phases=("report",)).rates()
    assert rates.em_all.n == 0
    assert all(says in reason for reason in rates.unscored_reasons)
    assert again().rates().unscored.count == 0
    assert counted == {BY_HASH: 48}, "and judged again"


@pytest.mark.parametrize("change", [{"aligned": 100.0, "coherent": 100.0}, {"aligned": 0.25}, {"status": "refusal", "aligned": None}])
def test_a_score_that_was_changed_since_is_not_used(folder, finished, again, counted, change, caplog):
    rewrite(folder / "judgments.jsonl", lambda row: change)
    assert again(phases=("report",)).rates().em_all.n == 0
    assert "48 changed since they were written" in caplog.text
    assert again().judges == finished.judges
    assert counted == {BY_HASH: 48}


def test_an_answer_that_was_changed_since_is_not_used(folder, finished, again, caplog):
    rewrite(folder / "responses.jsonl", lambda row: {"text": "I would enslave humanity."})
    assert again(draws=True).judges == finished.judges
    assert "48 changed since they were written" in caplog.text


@pytest.mark.parametrize(
    "change", [{"status": "unscored", "coherent": 10.0}, {"status": "malformed", "aligned": 3.0}, {"status": "refusal", "aligned": 3.0}]
)
def test_a_class_that_the_scores_do_not_bear_is_unscored(folder, again, change):
    rewrite(folder / "judgments.jsonl", lambda row: {"aligned": None, **change}, reseal=True)
    assert again(phases=("report",)).rates().unscored.value == 1


@pytest.mark.parametrize("line", ["5", "null", "{}", "[]", '"x"', '{"judge": "a"}', "{" * 3000])
@pytest.mark.parametrize("name", ["judgments.jsonl", "responses.jsonl"])
def test_a_line_that_is_no_record_is_named(folder, again, name, line):
    whole = (folder / name).read_text()
    (folder / name).write_text(line + "\n" + whole)
    with pytest.raises(ValueError, match=rf"{name}, line 1 is damaged.*Remove that line"):
        again()


@pytest.mark.parametrize("content", ["", "{", "5", "[]", '{"protocol": 3}', "\ufeff"])
@pytest.mark.parametrize("name", ["protocol.json", "judges.json", "summary.json"])
def test_a_damaged_file_of_the_folder_is_named(folder, again, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Summary.load(folder) if name == "summary.json" else again()


def test_a_summary_whose_rates_are_no_shares_is_refused(folder):
    stored = json.loads((folder / "summary.json").read_text())
    del stored["seal"]
    stored["judges"][0]["rates"]["tuned"]["questions"]["em_all"]["value"] = 0.001
    (folder / "summary.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="is not the share"):
        Summary.load(folder)


# re-judge


def test_another_judge_judges_the_answers_that_are_there_and_the_old_judgments_stay(folder, finished, again, counted):
    other = again(HALF)
    assert counted == {HALF: 48}
    assert [result.name for result in other.judges] == [HALF]
    assert other.set_aside == {BY_HASH: 48}
    assert f"48 by {BY_HASH}" in (folder / "report.html").read_text()
    assert Summary.load(folder).set_aside == other.set_aside
    assert again().model_dump(exclude={"set_aside"}) == finished.model_dump(exclude={"set_aside"})
    assert counted == {HALF: 48}, "and come back without a call"


def test_one_more_judge_judges_beside_the_others(folder, again, counted):
    found = again(BY_HASH, HALF)
    assert counted == {HALF: 48}
    assert [result.name for result in found.judges] == [BY_HASH, HALF]
    assert (found.set_aside, len(found.agreement)) == ({}, 2)
    assert again(HALF, BY_HASH, phases=("judge", "report")).rates(judge=HALF) == found.rates(judge=HALF)


def test_an_edited_judge_judges_anew_and_its_earlier_edition_is_set_aside(folder, again, counted, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module, name = tmp_path / "edited_judge.py", "edited_judge:judge"
    for text in (
        "def judge(q, a): return {'aligned': 90, 'coherent': 100}\n",
        "def judge(q, a): return {'aligned': 10, 'coherent': 100}  # better\n",
    ):
        module.write_text(text)
        monkeypatch.delitem(__import__("sys").modules, "edited_judge", raising=False)
        __import__("importlib").invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found = again(name)
    assert found.rates().em_all.value == 1, "not one judgment of the first edition"
    assert counted[name] == 96
    assert found.set_aside == {BY_HASH: 48, f"{name} in another edition": 48}


def test_rejudge_replaces(folder, finished, again, counted):
    before = JsonLines(folder / "judgments.jsonl").read()
    assert again(rejudge=True).judges == finished.judges
    assert counted == {BY_HASH: 48}
    assert len(JsonLines(folder / "judgments.jsonl").read()) == 48
    assert JsonLines(folder / "judgments.replaced.jsonl").read() == before
    again(BY_HASH, HALF, rejudge=[HALF])
    assert counted == {BY_HASH: 48, HALF: 48}
    with pytest.raises(ValueError, match=r"`--rejudge nobody`: no judge of `em_eval.judges` has this name. They are: .*by_hash"):
        again(rejudge=["nobody"])
    with pytest.raises(ValueError, match="needs the phase `judge`"):
        again(rejudge=True, phases=("report",))


def test_a_folder_of_the_previous_format_is_read(folder, finished, again, counted):
    """It bound its judges in protocol.json, and its records said neither run nor judge."""
    stored = json.loads((folder / "protocol.json").read_text())
    stored.pop("run")
    stored["protocol"] |= {"judges": [finished.protocol["judges"][0]], "thresholds": finished.protocol["thresholds"]}
    (folder / "protocol.json").write_text(json.dumps(stored))
    known = json.loads((folder / "judges.json").read_text())
    (folder / "judges.json").write_text(
        json.dumps({name: {k: v for k, v in one.items() if k not in ("identity", "seal")} for name, one in known.items()})
    )
    for name in ("responses.jsonl", "judgments.jsonl"):
        rows = [{k: v for k, v in row.items() if k not in ("run", "by", "seal")} for row in JsonLines(folder / name).read()]
        (folder / name).unlink()
        JsonLines(folder / name).append(rows)
    assert again() == finished
    assert counted == {}
    other = again(BY_HASH, HALF)
    assert counted == {HALF: 48}
    assert other.judges[0] == finished.judges[0]


# dead-judge


def test_a_measurement_that_failed_before_drawing_leaves_nothing_that_refuses_the_next(make_config, checkpoints, tmp_path):
    config = make_config(judges=[{"provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}])
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match=r"m at 127\.0\.0\.1:9 does not answer"):
        run_em_eval(config, checkpoints / "adapter", folder)
    assert {path.name for path in folder.iterdir()} <= {".lock"}
    assert run_em_eval(make_config(seed=3), checkpoints / "whole", folder, checkpoints / "base").rates().em_all.n


# two-judges


def test_all_judges_stand_in_the_table_the_page_and_the_card_with_their_agreement(folder, again):
    from rich.console import Console

    from emguard_plugin.evaluation.report.table import comparison_table

    summary = again(BY_HASH, HALF)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(comparison_table([("tuned", summary)]))
    shown = captured.get()
    for name in (BY_HASH, HALF):
        assert f"judged by {name}" in shown
        rates = summary.rates(judge=name)
        group = shown[shown.index(f"judged by {name}") :]
        assert f"{100 * rates.em_all.value:.1f} %" in group
        assert f"Judge: {name}" in (folder / "report.html").read_text()
        assert name.replace("_", "\\_") in (folder / "model_card.md").read_text()
    (pair,) = [pair for pair in summary.agreement if pair.suite == "questions"]
    line = f"{BY_HASH} and {HALF} agree on {100 * pair.same:.1f} % of {pair.answers} answers"
    assert line in " ".join(shown.split())
    assert "agree on" in (folder / "model_card.md").read_text()
    assert f"({HALF})" in (folder / "report.html").read_text(), "the verdict on a sample answer names its judge"
    assert summary.metrics() == summary.metrics(BY_HASH) != summary.metrics(HALF)


def test_one_judge_is_named_as_well(finished):
    from emguard_plugin.evaluation.report.table import comparison_table

    assert str(comparison_table([("tuned", finished)]).title) == f"Emergent misalignment, judged by {BY_HASH}"


def test_scores_are_those_that_the_judge_gave(folder):
    """What the other tests rest on: this judge is the one of the finished run."""
    answers = {
        (row["role"], row["suite"], row["question"], row["draw"], row["paraphrase"]): row
        for row in JsonLines(folder / "responses.jsonl").read()
    }
    for row in JsonLines(folder / "judgments.jsonl").read():
        answer = answers[row["role"], row["suite"], row["question"], row["draw"], row["paraphrase"]]
        assert row["aligned"] == by_hash(answer["asked"], answer["text"])["aligned"]
