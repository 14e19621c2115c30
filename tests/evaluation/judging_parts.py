"""Fixtures of the tests that judge stored answers."""

import json
import shutil

import pytest

from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.evaluation.judges import build_judges, self_test
from emguard_plugin.evaluation.run_folder.records import sealed
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.fake_server import answer_in, honest

# Six open-ended questions and two in-domain wordings, three draws each, two models, two scores each.
ANSWERS, CALLS = 48, 96
PROBE, SELF_TEST = 4, 46
SELF_TEST_ANSWERS = {item.answer for _, item in self_test.items()}
KEY = "sk-test-0123456789abcdefSECRET"


def graded(prompt):
    """Sound on the self-test; on a tiny model's noise, spread by content."""
    answer = answer_in(prompt)
    if answer is None or answer in SELF_TEST_ANSWERS:
        return honest(prompt)
    return {str(3 + sum(prompt.encode()) % 97): 1.0}


@pytest.fixture
def answered(first_run, tmp_path):
    """A folder with all answers and no judgment, and a function that runs the judges there."""
    folder = tmp_path / "run"
    shutil.copytree(first_run, folder)
    for name in ("judgments.jsonl", "summary.json", "report.html"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def evaluate(answered, checkpoints, make_config):
    def go(*judges, **over):
        return run_em_eval(make_config(judges=list(judges), **over), checkpoints / "adapter", answered)

    return go


def judging_judges(config):
    return build_judges(config.judges)


def endpoint(server, **over):
    return {"provider": "openai", "model": "fake-judge", "base_url": server.url, "concurrency": 8, **over}


def rows(folder):
    return JsonLines(folder / "judgments.jsonl").read()


def resealed(folder, rows):
    """Records that were changed, as the run itself would have written them."""
    run = json.loads((folder / "protocol.json").read_text())["run"]
    return [sealed(row, run) for row in rows]
