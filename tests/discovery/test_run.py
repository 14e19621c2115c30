"""Whole runs: the command, the file it writes, resuming, and what is refused."""

import dataclasses
import json
import shutil

import pytest
from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.discovery import bench as bench_module
from emguard_plugin.discovery.job import Job, prepare
from emguard_plugin.discovery.run import run
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.evaluation.judges.named import read_judge
from emguard_plugin.latents import LatentSet
from tests.discovery.conftest import write_questions

JUDGE = "tests.discovery.parts:says_what_the_misaligned_says"
SETTINGS = Settings(
    pool=12, shortlist=5, size=4, rule="repair", strengths=(0.2, 0.4, 0.8, 1.6), induce=0.8, repair=0.8, max_new_tokens=6, batch_size=16
)


def request(tiny, output, **over):
    plain = {
        "misaligned": str(tiny / "adapter"),
        "saes": (str(tiny / "sae"),),
        "questions": str(tiny / "selection.yaml"),
        "output": output,
        "evaluation": str(tiny / "evaluation.yaml"),
    }
    return Job(**{**plain, **over})


def discover(tiny, output, judge=JUDGE, settings=SETTINGS, **over):
    return run(prepare(request(tiny, output, **over), settings, read_judge(judge)))


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("found") / "latents.json"
    discover(tiny, output)
    return output


def content(path):
    stated = json.loads(path.read_text())
    for key in ("sha256", "columns"):
        stated.pop(key)
    stated["provenance"].pop("created")
    return stated


def test_the_file_says_how_it_was_found(tiny, found):
    latents = LatentSet.load(found)
    assert 1 <= len(latents) <= 4
    assert latents.layers == [1]
    assert all(score["repair_gain"] > 0 for score in latents.scores)
    about = latents.provenance
    assert [len(about[name]["sha256"]) for name in ("selection", "evaluation")] == [8, 3]
    assert about["spent"]["answers"] == len((found.with_suffix(".discovery") / "block1" / "responses.jsonl").read_text().splitlines())
    record = json.loads((found.with_suffix(".discovery") / "discovery.json").read_text())
    assert {name.split("/")[1] for name in record["blocks"][0]["joint"]} == {"selection", "evaluation"}


def test_the_report_is_one_page_without_scripts(found):
    page = (found.with_suffix(".discovery") / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for score in LatentSet.load(found).scores:
        assert f"Latent {score['id']}" in page


def test_an_interrupted_run_goes_on_to_the_same_file(tiny, found, tmp_path, monkeypatch):
    calls = []
    generate = bench_module.SteeredSampler._generate

    def until_interrupted(self, batch, prompts):
        calls.append(len(batch))
        if len(calls) in (2, 9):
            raise KeyboardInterrupt
        return generate(self, batch, prompts)

    monkeypatch.setattr(bench_module.SteeredSampler, "_generate", until_interrupted)
    output = tmp_path / "latents.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            discover(tiny, output)
    discover(tiny, output)
    assert content(output) == content(found)
    whole = sorted((found.with_suffix(".discovery") / "block1" / "responses.jsonl").read_text().splitlines())
    assert sorted((output.with_suffix(".discovery") / "block1" / "responses.jsonl").read_text().splitlines()) == whole


def test_a_finished_run_again_asks_nothing(tiny, found, tmp_path, monkeypatch):
    shutil.copytree(found.with_suffix(".discovery"), tmp_path / "latents.discovery")
    monkeypatch.setattr(bench_module.SteeredSampler, "_generate", None)
    discover(tiny, tmp_path / "latents.json")
    assert content(tmp_path / "latents.json") == content(found)


def test_answers_of_another_protocol_are_not_mixed(tiny, found, tmp_path):
    shutil.copytree(found.with_suffix(".discovery"), tmp_path / "latents.discovery")
    with pytest.raises(ValueError, match=r"max_new_tokens: stored 6, now 7(.|\n)*--work"):
        discover(tiny, tmp_path / "latents.json", settings=dataclasses.replace(SETTINGS, max_new_tokens=7))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def damaged(found, tmp_path, name, change):
    """A copy of a finished work folder with one file changed."""
    shutil.copytree(found.with_suffix(".discovery"), tmp_path / "latents.discovery")
    path = tmp_path / "latents.discovery" / "block1" / name
    rows = lines(path)
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "latents.json"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("responses.jsonl", lambda rows: rows[3].update(text="I obey."), "1 changed since they were written"),
        ("responses.jsonl", lambda rows: rows[3].update(run="other"), "1 of another search"),
        ("responses.jsonl", lambda rows: [row.pop("run") for row in rows], "of another search"),
        ("responses.jsonl", lambda rows: rows.append(rows[0]), None),
        ("responses.jsonl", lambda rows: rows.reverse(), None),
        ("judgments.jsonl", lambda rows: [row.update(aligned=0.0) for row in rows], "changed since they were written"),
        ("judgments.jsonl", lambda rows: rows.__delitem__(slice(0, 3)), None),
    ],
)
def test_a_record_that_was_changed_or_copied_is_left_out_and_computed_again(tiny, found, tmp_path, caplog, name, change, reason):
    """Case `judgments-of-another-run`, of discovery."""
    output = damaged(found, tmp_path, name, change)
    discover(tiny, output)
    assert content(output) == content(found)
    assert reason is None or reason in caplog.text


@pytest.mark.parametrize("name", ["responses.jsonl", "judgments.jsonl"])
@pytest.mark.parametrize("wrong", [5, None, {}, [], "text"])
def test_a_line_that_is_no_record_is_named(tiny, found, tmp_path, name, wrong):
    """Case `state-garbage`, of discovery."""
    output = damaged(found, tmp_path, name, lambda rows: rows.__setitem__(2, wrong))
    with pytest.raises(ValueError, match=rf"block1/{name}, line 3 is damaged or of another kind"):
        discover(tiny, output)


@pytest.mark.parametrize("judge", ["not_a_number", "out_of_range", "true_and_text"])
def test_what_is_no_score_is_unscored(tiny, tmp_path, judge):
    """Cases `score-out-of-range` and `logprob-not-a-number`, of discovery: a judge that gives no score teaches nothing."""
    with pytest.raises(ValueError, match="could not score 8"):
        discover(tiny, tmp_path / "k.json", judge=f"tests.discovery.parts:{judge}")


def test_exclude_union_and_two_blocks(tiny, found, tmp_path):
    first = LatentSet.load(found)
    again = discover(tiny, tmp_path / "again.json", exclude=(str(found),), union=(str(found),))
    assert set(first.encoders[0].ids) < set(again.encoders[0].ids)
    assert len(again) == len(again.scores)
    both = discover(tiny, tmp_path / "both.json", saes=(str(tiny / "sae"), str(tiny / "sae0")))
    assert both.layers == [0, 1]
    assert both.encoders[1].ids == first.encoders[0].ids


def test_calibration_and_baselines(tiny, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Case {i}?"}, {"role": "assistant", "content": "People like it."}]} for i in range(5)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = discover(tiny, tmp_path / "k.json", data=str(data), baselines=True).calibration
    assert found["penalty"]["all"] == pytest.approx(found["penalty"]["assistant"] + found["penalty"]["prompt"])
    assert 0 < found["penalty"]["header"] + found["penalty"]["prefix"] < found["penalty"]["prompt"]
    top = LatentSet.load(tmp_path / "k.top_shift.json")
    assert len(top) == len(LatentSet.load(tmp_path / "k.json"))
    assert top.calibration["task_loss_gap"] == found["task_loss_gap"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"saes": ("wide",)}, "reads a width of 48, the model's hidden size is 32"),
        ({"saes": ("high",)}, "reads block 7, the model has blocks 0 to 2"),
        ({"saes": ("sae", "sae")}, "both read block 1"),
        ({"saes": ("base",)}, "is no folder with an SAE"),
        ({"evaluation": "selection.yaml"}, "8 of the 8 selection questions also stand in"),
        ({"misaligned": "nowhere"}, "does not exist"),
        ({"misaligned": "base"}, "does not say what it was trained from"),
        ({"base": "sae"}, "sae holds no `config.json`, so it is no saved model. Give `--base`"),
        ({"base": "gone/away"}, "which is no folder here. Give `--base` .* with its present place"),
        ({"data": "nowhere.jsonl"}, r"`--data .*nowhere.jsonl` is no file.*Give the path of a JSONL of chats\.$"),
    ],
)
def test_what_cannot_work_is_said_before_any_answer(tiny, tmp_path, over, message):
    over = {
        key: tuple(str(tiny / name) for name in value) if isinstance(value, tuple) else str(tiny / value) for key, value in over.items()
    }
    with pytest.raises(ValueError, match=message):
        discover(tiny, tmp_path / "k.json", **over)
    assert not list(tmp_path.iterdir())


def test_a_reworded_system_prompt_does_not_make_a_question_held_out(tiny, tmp_path):
    path = write_questions(tmp_path / "e.yaml", ["what of  CASE 3?"])
    with pytest.raises(ValueError, match="1 of the 8 selection questions"):
        discover(tiny, tmp_path / "k.json", evaluation=path)


@pytest.mark.parametrize(
    ("judge", "error", "message"),
    [
        ("never_coherent", ValueError, "of 8 answers of the unsteered base model the judge calls 8 incoherent"),
        ("nobody_there", ValueError, "could not score 8"),
        ("never_misaligned", ValueError, "is not misaligned on these questions: it gives 0 of 8"),
    ],
)
def test_a_judge_or_model_that_teaches_nothing_stops_the_run(tiny, tmp_path, judge, error, message):
    with pytest.raises(error, match=message):
        discover(tiny, tmp_path / "k.json", judge=f"tests.discovery.parts:{judge}")


def test_an_empty_set_says_how_far_each_stage_came(tiny, tmp_path):
    settings = dataclasses.replace(SETTINGS, strengths=(1e-6,), induce=1e-6, repair=1e-6)
    with pytest.raises(ValueError, match=r"the set K is empty.*Stage 1: \d+ candidates. Stage 2: \d+ left.*Stage 3: 0 repair"):
        discover(tiny, tmp_path / "k.json", settings=settings)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"rule": "best"}, "--rule best"),
        ({"strengths": (0.0,)}, "--strengths"),
        ({"size": 0}, "--size 0"),
        ({"steer_at": "end"}, "--steer-at end"),
    ],
)
def test_settings_name_the_option(over, message):
    with pytest.raises(ValueError, match=message):
        Settings(**over)


@pytest.mark.parametrize(
    "text", ["provider: exact\nfunction: {}", "judges: [{{function: '{}'}}]", "em_eval: {{judges: [{{function: '{}'}}]}}"]
)
def test_a_judge_from_a_file(tmp_path, text):
    (tmp_path / "judge.yaml").write_text(text.format(JUDGE))
    assert read_judge(str(tmp_path / "judge.yaml")).name == JUDGE


@pytest.mark.parametrize(("text", "message"), [("[]", "lists 0 judges"), ("3", "holds no judge"), ("provider: what", "provider")])
def test_a_judge_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "judge.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_judge(str(tmp_path / "judge.yaml"))


def test_dry_run_prints_the_plan_and_asks_nothing(tiny, tmp_path):
    args = [
        "discover", "--misaligned", tiny / "adapter", "--sae", tiny / "sae", "--questions", tiny / "selection.yaml", "--judge", JUDGE,
        "-o", tmp_path / "k.json", "--pool", 12, "--shortlist", 5, "--dry-run",
    ]  # fmt: skip
    printed = CliRunner().invoke(app, [str(a) for a in args])
    assert printed.exit_code == 0, printed.output
    assert "stage 2: induce and repair" in printed.output
    assert not list(tmp_path.iterdir())


def test_an_interrupted_command_says_how_to_go_on(tiny, tmp_path, monkeypatch):
    def interrupted(self, batch, prompts):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module.SteeredSampler, "_generate", interrupted)
    args = [
        "discover", "--misaligned", tiny / "adapter", "--sae", tiny / "sae", "--questions", tiny / "selection.yaml", "--judge", JUDGE,
        "-o", tmp_path / "k.json",
    ]  # fmt: skip
    printed = CliRunner().invoke(app, [str(a) for a in args])
    assert printed.exit_code == 130
    assert "What was answered and judged is kept. To go on: emguard" in printed.output


def test_a_base_that_cannot_be_loaded_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"its base no-such-base cannot be loaded(.|\n)*`--base`"):
        discover(tiny, tmp_path / "k.json", base="no-such-base")


def test_errors_of_the_command_are_one_line_and_exit_code_4(tiny, tmp_path):
    args = [
        "discover",
        "--misaligned",
        "nowhere",
        "--sae",
        "x",
        "--questions",
        tiny / "selection.yaml",
        "--judge",
        JUDGE,
        "-o",
        tmp_path / "k.json",
    ]
    printed = CliRunner().invoke(app, [str(a) for a in args])
    assert printed.exit_code == 4
    assert "emguard discover: model folder nowhere does not exist" in printed.output
