"""SIGKILL at drawn moments of `emguard discover`: the same command goes on to the same file. `benchmarks/kills_discovery.py` has more."""

import json

import pytest

from tests.discovery import kills, parts


@pytest.mark.slow
def test_a_search_that_was_killed_twice_goes_on_to_the_same_file(tiny, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(sorted(parts.BAD)))
    commands = kills.Commands(tmp_path / "log", tmp_path / "bad.json")
    found = kills.campaign(commands, tiny, tmp_path, points=2, seed=3)
    assert (found["points"], found["same"]) == (2, found["searches"]), (found, (tmp_path / "log").read_text()[-2000:])
    assert found["other"] == found["not_resumed"] == found["records_lost"] == 0
