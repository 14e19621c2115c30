"""A slice of the kills of an evaluation; `benchmarks/kills_evaluation.py` runs more and stores the counts."""

import json

from tests.evaluation.kills import Killer, Point, differences, points
from tests.evaluation.store_parts import drop_line


def test_a_run_killed_anywhere_ends_as_one_that_nobody_killed(make_config, checkpoints, tmp_path, monkeypatch):
    judges = [{"function": f"tests.evaluation.parts:{name}"} for name in ("by_hash", "half_dead")]
    killer = Killer(make_config(judges=judges).model_dump(exclude_unset=True), checkpoints / "adapter")
    found = killer.campaign(tmp_path, count=4, seed=1)
    assert found["faults"] == []
    assert found["kills: append"] == found["kills: write"] == 1, "a counted point lies inside the run; one by the clock need not"
    # The comparison can fail.
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert list(differences(tmp_path / "whole", tmp_path / "whole")) == []
    assert killer.run(tmp_path / "torn", Point("append", 3, 0.5))
    killer.run(tmp_path / "torn")
    drop_line(tmp_path / "torn" / "judgments.jsonl")
    assert [wrong for wrong in differences(tmp_path / "whole", tmp_path / "torn") if "1 judgments lost" in wrong]
    assert summary["judges"]


def test_the_points_are_the_same_for_a_seed_and_of_all_kinds():
    assert points(3, 30) == points(3, 30) != points(4, 30)
    assert {point.kind for point in points(3, 30)} == {"after", "append", "write"}
