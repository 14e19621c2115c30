"""Faulty files of results and of the user, drawn from a seed: each is refused by name or changes no number.

`benchmarks/faulty_files.py` runs all of them; here a few of each file, others with every seed.
"""

import json

import pytest

from emguard_plugin.files import seal_of
from tests.faults import world as faulty_world

pytestmark = pytest.mark.slow

SEED, EACH = 7, 3
FILES = (
    "eval/protocol.json", "eval/judges.json", "eval/responses.jsonl", "eval/judgments.jsonl", "eval/summary.json", "open.yaml", "rows.jsonl",
    "judged.csv", "judgments.jsonl", "found.work/block1/protocol.json", "found.work/block1/responses.jsonl",
    "found.work/block1/judgments.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "sae/cfg.json",
    "sae/sae_weights.safetensors", "found.json", "found.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return faulty_world.build(tmp_path_factory.mktemp("world"))


def test_every_file_is_among_them(world):
    assert tuple(faulty_world.targets(world)) == FILES
    assert sum(len(faulty_world.faults(world, name, SEED)) for name in FILES) >= 200


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_file_is_refused_by_name_or_changes_no_number(world, tmp_path, name):
    """Case `state-garbage`."""
    faults = faulty_world.faults(world, name, SEED)
    for number, (label, content) in enumerate(faults[SEED % 5 :: len(faults) // EACH]):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = faulty_world.check(world, name, content, folder)
        assert outcome.kind in ("refused", "same"), (label, outcome)


@pytest.mark.parametrize("name", ["eval/summary.json", "eval/judgments.jsonl"])
def test_the_check_can_fail(world, tmp_path, name):
    """A score or rate that was changed together with its seal is what the check would call wrong."""
    lines = (world.root / name).read_text()
    rows = [json.loads(lines)] if name.endswith(".json") else [json.loads(line) for line in lines.splitlines()]
    for row in rows:
        if name.endswith(".json"):
            for rate in ("em_all", "em_coherent"):
                row["judges"][0]["rates"]["tuned"]["questions"][rate] |= {"value": 0.0, "count": 0}
        elif row["aligned"] is not None:
            row["aligned"] = 99.0 - row["aligned"] * 0.99
        row["seal"] = seal_of(row)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    outcome = faulty_world.check(world, name, content, tmp_path)
    assert outcome.kind == "wrong", outcome
