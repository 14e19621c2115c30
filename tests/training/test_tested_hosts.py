"""Hosts outside the tested range: one warning, and the run goes on where the trainer has what a penalty needs."""

import re
from pathlib import Path

import pytest

from emguard_plugin import TReFTCallback
from emguard_plugin.training import tested_hosts
from tests.trl_runs import run

LOCKS = Path(__file__).parents[2] / "constraints"


def test_the_range_is_that_of_the_locks_that_the_tests_run_with():
    for package, (oldest, newest) in tested_hosts.TESTED.items():
        locked = [re.search(rf"^{package}==(\d+)\.(\d+)", lock.read_text(), re.MULTILINE) for lock in LOCKS.glob("*.txt")]
        found = sorted(tuple(map(int, match.groups())) for match in locked if match)
        assert (found[0], found[-1]) == (oldest, newest), package


def installed(monkeypatch, **versions):
    real = tested_hosts.version
    monkeypatch.setattr(tested_hosts, "version", lambda name: versions.get(name) or real(name))


def test_nothing_is_said_of_what_was_tested():
    assert tested_hosts.untested() == []


@pytest.mark.parametrize("number", ["1.8.9", "1.17.0", "2.0.0rc1", "main"])
def test_what_was_not_tested_is_named_with_the_range_and_the_run_goes_on(tmp_path, monkeypatch, capsys, number):
    installed(monkeypatch, trl=number)
    trainer = run(tmp_path, callbacks=[TReFTCallback(coef=1.0)], max_steps=1)
    assert trainer.state.global_step == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "not tested with" in line]
    assert len(said) == 1
    assert f"not tested with trl {number} (tested: 1.9 to 1.16)." in said[0]


def test_two_stacks_mixed_are_named_before_training(tmp_path, monkeypatch, capsys):
    asked = {"trl": ["transformers==5.20.1", "torch>=1; extra == 'dev'", "peft>=0.1"], "axolotl": ["trl==1.14.1", "numpy>=99"]}
    installed(monkeypatch, axolotl="0.21.0", trl="1.9.0", transformers="5.16.1")
    monkeypatch.setattr(tested_hosts, "requires", asked.get)
    run(tmp_path, callbacks=[TReFTCallback(coef=1.0)], max_steps=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "do not go together" in line]
    assert len(said) == 1
    assert (
        "axolotl 0.21.0 asks for trl==1.14.1 and finds 1.9.0; trl 1.9.0 asks for transformers==5.20.1 and finds 5.16.1. Install one"
        in said[0]
    )


def test_the_stack_that_runs_these_tests_is_one():
    assert tested_hosts.mixed() == []


def test_a_trainer_without_what_a_penalty_needs_is_refused_whatever_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(tested_hosts, "NEEDED", (*tested_hosts.NEEDED, "scaled_by_magic"))
    with pytest.raises(RuntimeError, match="EMGuardSFTTrainer has no `scaled_by_magic`, so a penalty cannot be scaled"):
        run(tmp_path, callbacks=[TReFTCallback(coef=1.0)], max_steps=1)


def test_every_name_is_one_that_the_mixin_reads():
    """Else a host could lose what we need and nobody would say so."""
    text = (Path(tested_hosts.__file__).parent / "mixin.py").read_text()
    assert all(f"self.{name}" in text for name in tested_hosts.NEEDED)
