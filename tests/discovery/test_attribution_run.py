"""`--rule attribution`: whole runs, and that no latent is steered alone."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.discovery.job import prepare
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.evaluation.judges.named import read_judge
from emguard_plugin.latents import LatentSet
from tests.discovery import test_run
from tests.discovery.test_run import JUDGE, request

SETTINGS = dataclasses.replace(test_run.SETTINGS, rule="attribution")


def discover(tiny, output, settings=SETTINGS, **over):
    return test_run.discover(tiny, output, settings=settings, **over)


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("attributed") / "latents.json"
    discover(tiny, output, saes=(str(tiny / "sae"), str(tiny / "sae0")), baselines=True)
    return output


def test_one_file_for_all_blocks_with_shift_and_attribution(found):
    latents = LatentSet.load(found)
    assert latents.layers == [0, 1]
    assert [len(encoder.ids) for encoder in latents.encoders] == [4, 4]
    assert all(score["attribution"] > 0 and score["sign"] * score["shift"] > 0 for score in latents.scores)
    assert {score["repair_gain"] for score in latents.scores} == {None}
    assert "emguard's own" in latents.provenance["method"]


def test_what_is_asked_is_what_the_plan_says(tiny, found):
    saes = (str(tiny / "sae"), str(tiny / "sae0"))
    steps = prepare(request(tiny, found, saes=saes), SETTINGS, read_judge(JUDGE)).plans()
    planned = sum(step.most for block in steps.values() for step in block)
    assert planned == sum(step.least for block in steps.values() for step in block)
    assert planned == LatentSet.load(found).provenance["spent"]["answers"]
    record = json.loads((found.with_suffix(".discovery") / "discovery.json").read_text())
    for block in record["blocks"]:
        assert [step.stage for step in steps[block["layer"]]] == [e["stage"] for e in block["funnel"] if "stage 1" not in e["stage"]]


def test_no_latent_is_steered_alone(found):
    for layer in (0, 1):
        file = found.with_suffix(".discovery") / f"block{layer}" / "responses.jsonl"
        steered = {json.loads(line)["steer"] for line in file.read_text().splitlines()} - {""}
        assert len(steered) == 1
        assert steered.pop().startswith("set:")


def test_the_page_shows_attribution_and_no_curve_of_a_latent(found):
    page = (found.with_suffix(".discovery") / "report.html").read_text()
    assert "<th>Attribution</th>" in page
    assert "<th>Repairs</th>" not in page
    assert page.count("<svg") == 8  # two blocks, two models, two suites: the whole set


def test_baselines_are_of_the_same_size_and_blocks(found):
    for rule in ("top_shift", "random", "shuffled_signs"):
        other = LatentSet.load(found.with_suffix(f".{rule}.json"))
        assert (other.layers, len(other)) == ([0, 1], 8)
        assert all("attribution" in score for score in other.scores)


def test_a_second_round_leaves_out_the_first_and_unites(tiny, found, tmp_path):
    first = LatentSet.load(found)
    again = discover(tiny, tmp_path / "k.json", exclude=(str(found),), union=(str(found),))
    assert again.layers == [0, 1]
    assert again.encoders[0].ids == first.encoders[0].ids
    assert again.encoders[1].ids[:4] == first.encoders[1].ids
    assert len(again.encoders[1].ids) == 8
    assert len(again.scores) == 12


def test_when_all_that_carries_it_is_known_the_set_is_empty(tiny, tmp_path):
    settings = dataclasses.replace(SETTINGS, size=64, pool=64)
    discover(tiny, tmp_path / "all.json", settings=settings)
    with pytest.raises(ValueError, match=r"block 1: no latent has a positive attribution \(of 64; \d+ excluded\)"):
        discover(tiny, tmp_path / "k.json", settings=settings, exclude=(str(tmp_path / "all.json"),))


def test_answers_have_no_tokens_in_common():
    with pytest.raises(ValueError, match="`--positions answers` gives it none"):
        Settings(rule="attribution", positions="answers")


def arguments(tiny, output, *more):
    given = [
        "discover", "--misaligned", tiny / "adapter", "--sae", tiny / "sae", "--questions", tiny / "selection.yaml", "--judge", JUDGE,
        "-o", output, "--max-new-tokens", 6, *more,
    ]  # fmt: skip
    return [str(a) for a in given]


def test_the_plan_says_what_is_left_out(tiny, tmp_path):
    printed = CliRunner().invoke(app, arguments(tiny, tmp_path / "k.json", "--rule", "attribution", "--dry-run"), env={"COLUMNS": "200"})
    assert printed.exit_code == 0, printed.output
    assert "attribution, instead of stages 2 and 3" in printed.output
    assert "stage 2: induce" not in printed.output
    assert "at most 32 forward and backward passes per block" in printed.output


@pytest.mark.parametrize("given", [("--strengths", "0.2,0.4"), ("--strengths", "0.2", "--strengths", "0.4"), ("--strengths", " 0.2, 0.4,")])
def test_strengths_in_one_or_several_options(tiny, tmp_path, given):
    printed = CliRunner().invoke(app, arguments(tiny, tmp_path / "k.json", "--rule", "attribution", *given))
    assert printed.exit_code == 0, printed.output
    assert LatentSet.load(tmp_path / "k.json").provenance["settings"]["strengths"] == [0.2, 0.4]


@pytest.mark.parametrize("given", ["0.1,a", "0.1;0.2", ",", "0", "0.1,0.1"])
def test_strengths_that_are_none(tiny, tmp_path, given):
    printed = CliRunner().invoke(app, arguments(tiny, tmp_path / "k.json", "--strengths", given))
    assert printed.exit_code == 4
    assert "`--strengths" in printed.output
    assert "such as 0.1,0.2,0.4" in printed.output
