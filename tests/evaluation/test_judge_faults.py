"""A slice of the judge faults; `benchmarks/judge_faults.py` runs a hundred and stores the counts."""

import pytest

from tests.evaluation.judge_faults import ANSWERS, KEY, Fault, faults, prepare, strike

SEED, COUNT = 20261126, 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("fault", faults(SEED, COUNT), ids=lambda fault: fault.label)
def test_a_faulty_judge_gives_the_truth_or_a_reason(prepared, tmp_path, fault):
    assert strike(fault, prepared, tmp_path) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return {'aligned': 100 - aligned, 'coherent': 100}", "the truth is"),
        (f"raise ValueError('x' * 400 + {KEY[:-2]!r})", "the key"),
    ],
)
def test_the_check_itself_finds_a_wrong_number_and_a_leak(prepared, tmp_path, body, says):
    fault = Fault("planted", 0, "function", body, tuple(range(ANSWERS)), True)
    assert any(says in wrong for wrong in strike(fault, prepared, tmp_path))


def test_the_faults_are_many_and_the_same_for_a_seed():
    drawn = faults(1, 200)
    assert len({fault.label.split(": ", 1)[1] for fault in drawn}) == 200
    assert [fault.label for fault in drawn] == [fault.label for fault in faults(1, 200)]
    assert {fault.mode for fault in drawn} == {"logprob", "sampled", "label", "function"}
