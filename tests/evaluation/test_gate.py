"""`emguard eval` as a pipeline uses it: phases alone, exit codes, comparisons."""

import itertools
import json
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.evaluation import Summary, run_em_eval
from emguard_plugin.evaluation.asking import sources as models
from emguard_plugin.evaluation.gate import ending
from emguard_plugin.evaluation.judges import ExactJudge
from emguard_plugin.evaluation.post_train import measure_saved_model
from emguard_plugin.evaluation.statistics.figures import Verdict
from emguard_plugin.files.result_folder import HOLD_ANSWERS, JsonLines

BY_HASH = "tests.evaluation.parts:by_hash"


@pytest.fixture
def emguard(make_config, tmp_path):
    """Run `emguard` with the block of the finished run, or with another one."""

    def call(command, *arguments, **over):
        options = []
        if command == "eval":
            config = tmp_path / "run.yaml"
            config.write_text(json.dumps({"em_eval": make_config(**over).model_dump(exclude_unset=True), "other": 1}))
            options = ["--config", str(config)]
        return CliRunner().invoke(app, [command, *map(str, arguments), *options])

    return call


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(models, "_load", lambda name: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(("limit", "code"), [(0.001, 1), (0.999, 0), (0.3, 3)])
def test_the_exit_code_is_the_verdict_and_all_is_saved_before(finished, checkpoints, emguard, no_model, limit, code):
    folder = finished.folder
    (folder / "summary.json").unlink()
    result = emguard("eval", checkpoints / "adapter", "--output-dir", folder, "--fail-above", limit)
    assert result.exit_code == code, result.output
    outcome = {0: "pass", 1: "fail", 3: "inconclusive"}[code]
    assert f"{outcome}: by tests.evaluation.parts:by_hash" in result.output
    assert ("is not a pass" in result.output) == (code == 3)
    summary = Summary.load(folder)
    assert summary.verdict() == outcome
    assert summary.fingerprint == finished.fingerprint
    assert f'class="verdict {outcome}"' in (folder / "report.html").read_text()


def test_a_gate_may_stand_in_the_file_and_without_one_there_is_no_verdict(finished, checkpoints, emguard, no_model):
    arguments = ("eval", checkpoints / "adapter", "--output-dir", finished.folder)
    assert emguard(*arguments).exit_code == 0
    assert Summary.load(finished.folder).verdict() is None
    assert emguard(*arguments, fail_above=0.001).exit_code == 1


def test_what_cannot_be_measured_has_an_exit_code_of_its_own(checkpoints, emguard, tmp_path):
    for over, says in (({"judge": "nobody"}, "has no `nobody`"), ({"questions": "gone.yaml"}, "gone.yaml")):
        result = emguard("eval", checkpoints / "adapter", "--output-dir", tmp_path / "new", **over)
        assert (result.exit_code, says in result.output) == (4, True), result.output
    result = emguard("eval", checkpoints / "adapter", "--output-dir", tmp_path / "new", "--phase", "guess")
    assert (result.exit_code, "generate, judge, report" in result.output) == (4, True)


def test_a_dead_judge_passes_no_gate(checkpoints, emguard, tmp_path):
    result = emguard("eval", checkpoints / "adapter", "--output-dir", tmp_path / "o", "--fail-above", 0.99, judge="dead")
    assert result.exit_code == 2, "not measured, whatever the gate would say of no answers"
    assert "not measured: tests.evaluation.parts:dead scored no answer" in result.output
    assert Summary.load(tmp_path / "o").verdict() == "inconclusive"


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"judge": "dead"}, "ConnectionError: nobody there"),
        ({"judge": "five"}, "the judge returned int"),
        ({"judges": [{"provider": "mock"}]}, "is for dry runs"),
    ],
)
def test_nothing_measured_is_no_success(finished, checkpoints, emguard, no_model, over, reason):
    """Case `nothing-measured`."""
    result = emguard("eval", checkpoints / "adapter", "--output-dir", finished.folder, **over)
    assert (result.exit_code, reason in result.output) == (2, True), result.output


def ended(finished, **over):
    (result,) = finished.judges
    return result.model_copy(update=over)


def test_several_judges_end_as_the_worst_of_them(finished):
    def gate(outcome):
        return Verdict(outcome=outcome, fail_above=0.1, rate=0.1, interval=None, answers_needed=None, questions_needed=None, reason="why")

    kinds = {
        0: ended(finished, name="good", verdict=gate("pass")),
        1: ended(finished, name="bad", verdict=gate("fail")),
        2: ended(finished, name="stopped", stopped="HTTP 401", verdict=gate("pass")),
        3: ended(finished, name="torn", verdict=gate("inconclusive")),
    }
    assert {code: ending(finished.model_copy(update={"judges": [kind]})).code for code, kind in kinds.items()} == {n: n for n in kinds}
    for first, second in itertools.product(kinds, kinds):
        found = ending(finished.model_copy(update={"judges": [kinds[first], kinds[second]]}))
        assert found.code == next(code for code in (1, 2, 3, 0) if code in (first, second))
        said = " ".join(line for _, line in found.lines)
        assert all(kinds[code].name in said for code in (first, second))
    assert ending(finished).code == 0


def test_judging_alone_ends_with_2_where_a_judge_stopped(finished, checkpoints, emguard, tmp_path):
    judges = [{"provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}]
    result = emguard("eval", "x", "--output-dir", finished.folder, "--phase", "judge", judges=judges)
    assert (result.exit_code, "not all was judged. m: m at 127.0.0.1:9 does not answer" in result.output) == (2, True)


@pytest.mark.parametrize("words", [["--rejudge"], ["--rejudge", BY_HASH], [f"--rejudge={BY_HASH}"], ["--rejudge", "--phase", "judge"]])
def test_rejudge_stands_alone_or_names_a_judge(finished, checkpoints, emguard, words):
    result = emguard("eval", checkpoints / "adapter", "--output-dir", finished.folder, *words)
    assert result.exit_code == 0, result.output
    assert len(JsonLines(finished.folder / "judgments.replaced.jsonl").read()) == 48
    result = emguard("eval", checkpoints / "adapter", "--output-dir", finished.folder, "--rejudge", "nobody")
    assert (result.exit_code, "no judge of `em_eval.judges` has this name" in result.output) == (4, True)


@pytest.mark.parametrize(
    "text",
    ["em_eval:\n  a: [", "em_eval:", "- a", "", "em_eval: 5", "em_eval:\n  questions: a\n  questions: b", b"em_eval: \xff", None],
    ids=repr,
)
def test_a_file_that_holds_no_block_is_said_in_one_sentence(checkpoints, tmp_path, text):
    """Case `yaml-error`; None is a folder."""
    path = tmp_path / "run.yaml"
    path.mkdir() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = CliRunner().invoke(app, ["eval", str(checkpoints / "adapter"), "--config", str(path)])
    assert result.exit_code == 4, result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("emguard eval: ")
    assert len(result.output.strip().splitlines()) == 1


def test_each_phase_runs_alone_and_only_the_first_needs_the_model(finished, checkpoints, emguard, tmp_path, monkeypatch):
    folder = tmp_path / "phases"
    calls = []
    real = ExactJudge.judge
    monkeypatch.setattr(ExactJudge, "judge", lambda self, items: (calls.append(len(items)), real(self, items))[1])

    def phase(name, model):
        return emguard("eval", model, "--output-dir", folder, "--phase", name)

    for name in ("judge", "report"):
        result = phase(name, checkpoints / "adapter")
        assert (result.exit_code, "Run the phase `generate` first" in result.output) == (4, True)
    assert phase("generate", checkpoints / "adapter").exit_code == 0
    assert (calls, (folder / "judgments.jsonl").exists(), (folder / "summary.json").exists()) == ([], False, False)
    monkeypatch.setattr(models, "_load", lambda name: pytest.fail("a model was loaded"))
    assert phase("judge", tmp_path / "not here").exit_code == 0
    assert phase("judge", tmp_path / "not here").exit_code == 0
    assert calls == [48]
    assert phase("report", tmp_path / "not here").exit_code == 0
    assert Summary.load(folder).judges == finished.judges
    assert Summary.load(folder).fingerprint == finished.fingerprint


def test_answers_of_another_protocol_are_not_judged_without_the_model_either(finished, emguard, tmp_path):
    result = emguard("eval", tmp_path / "x", "--output-dir", finished.folder, "--phase", "judge", seed=9)
    assert (result.exit_code, "`em_eval.seed`: stored 0, now 9" in result.output) == (4, True)


def test_an_adapter_may_be_named_beside_its_base(finished, checkpoints, emguard, no_model):
    arguments = ("--adapter", checkpoints / "adapter", "--output-dir", finished.folder)
    assert emguard("eval", checkpoints / "base", *arguments).exit_code == 0
    assert emguard("eval", checkpoints / "whole", *arguments).exit_code == 4


def test_results_of_two_protocols_are_laid_side_by_side_only_by_force(finished, checkpoints, emguard, make_config, tmp_path):
    other = tmp_path / "m" / "em_eval"
    run_em_eval(make_config(max_new_tokens=7), checkpoints / "adapter", other)
    page = tmp_path / "both.html"
    arguments = ("report", f"first={finished.folder}", other, "--output", page)
    refused = emguard(*arguments)
    assert (refused.exit_code, page.exists()) == (4, False)
    assert "'m' was measured by another protocol than 'first'; they differ in decoding" in " ".join(refused.output.split())
    forced = emguard(*arguments, "--force")
    assert forced.exit_code == 0
    assert "NOT COMPARABLE" in forced.output
    assert "Not comparable" in page.read_text()


def test_the_post_train_hook_says_loudly_that_a_gate_was_missed(finished, checkpoints, make_config, capsys):
    """In the process of its own that the hook starts."""
    config = make_config(output_dir=str(finished.folder), fail_above=0.001)
    found = measure_saved_model(config, checkpoints / "adapter")
    assert (found.exit_code, found.summary) == (1, finished.folder / "summary.json")
    failed = (finished.folder / "FAILED.txt").read_text()
    assert "gate NOT PASSED: fail: by tests.evaluation.parts:by_hash" in failed
    assert failed == capsys.readouterr().err.splitlines(keepends=True)[-1]


def test_a_measurement_that_crashes_is_not_taken_for_a_missed_gate(finished, make_config, tmp_path, monkeypatch):
    """Python's own exit code after a crash is 1, and an earlier summary may lie there."""
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nexit 1\n")
    crash.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crash))
    config = make_config(output_dir=str(finished.folder), fail_above=0.001)
    found = measure_saved_model(config, "model")
    assert (found.exit_code, found.summary) == (2, None)
    failed = (finished.folder / "FAILED.txt").read_text()
    assert "em_eval failed" in failed
    assert "ended with exit code 1" in failed


def test_answers_stay_out_of_what_git_and_the_hub_take_from_a_model_folder(finished, checkpoints, make_config, tmp_path):
    model = shutil.copytree(checkpoints / "adapter", tmp_path / "adapter")
    (model / ".gitignore").write_text("*.log")
    shutil.copytree(finished.folder, model / "em_eval")
    for _ in range(2):
        run_em_eval(make_config(), model, model / "em_eval")
    assert (model / ".gitignore").read_text().count("responses.jsonl") == 1
    subprocess.run(["git", "init", "-q", model], check=True)
    taken = subprocess.run(["git", "-C", model, "ls-files", "-o", "--exclude-standard"], capture_output=True, text=True)
    names = set(taken.stdout.split())
    assert {"adapter_model.safetensors", "em_eval/summary.json", "em_eval/model_card.md", "em_eval/rates.csv"} <= names
    answers = [row["text"] for row in JsonLines(model / "em_eval" / "responses.jsonl").read() if len(row["text"]) > 5]
    assert answers
    for name in names:
        assert not name.startswith(tuple(f"em_eval/{held}" for held in HOLD_ANSWERS))
        text = (model / name).read_bytes().decode("utf-8", "replace")
        assert not [answer for answer in answers if answer in text], name
