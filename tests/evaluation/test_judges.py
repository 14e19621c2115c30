import asyncio
import sys

import numpy as np
import pytest

from emguard_plugin.config.judges import ExactJudgeConfig
from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.judges import ExactJudge, Item, build_judges, read_scores

HERE = "tests.evaluation.parts"
QUESTION = Question("q", 0, "Why?")


def test_a_function_by_dotted_path_scores_and_is_identified_by_its_source():
    judge = ExactJudge(f"{HERE}:by_hash")
    ((_, found),) = judge.judge([Item(QUESTION, "Because.")])
    assert found.status == "scored"
    assert found.detail == "hashed"
    assert judge.identity()["function"] == f"{HERE}:by_hash"
    assert len(judge.identity()["source_sha256"]) == 64


def test_a_judge_that_raises_leaves_the_answer_unscored_with_the_reason():
    ((_, found),) = ExactJudge(f"{HERE}:dead").judge([Item(QUESTION, "Because.")])
    assert (found.status, found.aligned, found.coherent) == ("unscored", None, None)
    assert "nobody there" in found.detail


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, "NoneType"),
        (7, "int"),
        ({}, "coherent is missing"),
        ({"aligned": 10}, "coherent is missing"),
        ({"coherent": 90}, "aligned is missing"),
        ({"aligned": float("nan"), "coherent": 90}, "aligned is nan"),
        ({"aligned": float("inf"), "coherent": 90}, "aligned is inf"),
        ({"aligned": 101, "coherent": 90}, "not within 0 to 100"),
        ({"aligned": 10, "coherent": -1}, "not within 0 to 100"),
        ({"aligned": "10", "coherent": 90}, "not a number"),
        ({"aligned": True, "coherent": 90}, "not a number"),
    ],
)
def test_whatever_is_no_valid_score_is_unscored_and_never_aligned(returned, reason):
    found = read_scores(returned)
    assert (found.status, found.aligned, found.coherent) == ("unscored", None, None)
    assert reason in found.detail


def test_valid_scores_are_taken_as_they_are():
    assert read_scores({"aligned": np.float32(30), "coherent": 100}).aligned == 30.0
    assert read_scores({"aligned": None, "coherent": 0}).status == "scored"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no.such.module:f", "importing no.such.module failed"),
        (f"{HERE}:nothing", "has no `nothing`. It has:.*by_hash"),
        (f"{HERE}:NOT_A_FUNCTION", "not a function"),
    ],
)
def test_a_function_that_cannot_be_found_is_a_clear_error(function, says):
    with pytest.raises(ValueError, match=says):
        ExactJudge(function)


def test_two_judges_of_one_name_are_refused():
    config = ExactJudgeConfig(function=f"{HERE}:by_hash")
    with pytest.raises(ValueError, match="twice"):
        build_judges([config, config])


def leaves(question, answer):
    sys.exit(3)


def leaves_harder(question, answer):
    raise asyncio.CancelledError


@pytest.mark.parametrize("name", ["leaves", "leaves_harder"])
def test_a_judge_function_that_leaves_the_program_is_a_failed_judgment(name):
    judge = ExactJudge(f"{__name__}:{name}")
    (found,) = [verdict for _, verdict in judge.judge([Item(Question("q", 0, "What now?"), "Rest.")])]
    assert found.status == "unscored"
    assert found.detail.startswith(("SystemExit: 3", "CancelledError"))


def test_a_judge_module_that_leaves_the_program_when_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "leaving_judge.py").write_text("raise SystemExit(5)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="importing leaving_judge failed: SystemExit: 5"):
        ExactJudge("leaving_judge:f")
