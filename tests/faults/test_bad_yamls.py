"""Generated YAMLs that ask for what cannot be: refused by every entry point, in a sentence, without a key. `benchmarks/bad_yamls.py` runs 500."""

import logging

import pytest

from tests.faults import bad_yamls

SEED, NUMBER = 20261126, 102


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad").resolve()
    bad_yamls.write(folder)
    return folder


@pytest.mark.slow
def test_every_generated_fault_is_refused_and_nothing_is_repeated(folder, caplog, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    caplog.set_level(logging.DEBUG, logger="emguard_plugin")
    wrong, secrets, faults = [], [], 0
    for case in bad_yamls.generate(folder, SEED, NUMBER):
        wrong += bad_yamls.run(case, folder)
        faults += case.fault
        secrets += [case.secret] if case.secret else []
    assert wrong == []
    assert (faults, len(secrets)) == (97, 18)
    printed = capfd.readouterr()
    for secret in secrets:
        assert not bad_yamls.leaked(secret, caplog.text + printed.out + printed.err)
        for file in (f for f in folder.rglob("*") if f.is_file() and f.name not in ("axolotl.yaml", "trl.yaml")):
            assert secret.encode() not in file.read_bytes(), file


def test_the_generator_can_find_a_fault(folder, monkeypatch):
    """What is wrong would show: an entry point that accepts everything, one that raises, and one that repeats a key."""
    case = next(c for c in bad_yamls.generate(folder, 1, 60) if c.secret and c.of_eval)
    for function, said in (
        (lambda path: None, "accepted it"),
        (lambda path: 1 / 0, "crashed: ZeroDivisionError"),
        (leak(case.secret), "repeated the secret"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(bad_yamls, "_eval", function)
            assert [w for w in bad_yamls.run(case, folder) if w.split(": eval ")[-1].startswith(said)]


def leak(secret):
    def function(path):
        raise ValueError(f"found {secret}")

    return function
