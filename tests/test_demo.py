"""What `emguard demo` makes of what a run tells, and what it does to a folder that is not its own. The demo itself runs in tests/e2e."""

import pytest

from emguard_plugin import demo
from emguard_plugin.demo import RUNS, examples, percent, seconds_per_step
from emguard_plugin.files.ours import MARK
from emguard_plugin.files.progress import VARIABLE, Told, heard, tell


def test_before_training_the_bar_moves_and_stays_below_a_fifth():
    seen = [percent([], seconds) for seconds in (0, 5, 20, 600)]
    assert {stage for _, stage in seen} == {"loading model and data"}
    assert [p for p, _ in seen][:1] == [0]
    assert seen == sorted(seen)
    assert seen[-1][0] <= 20


@pytest.mark.parametrize("step", [1, 30, 119])
def test_while_training(step):
    assert percent([Told("training", step, 120, 0.0)], 9) == (20 + 40 * step / 120, f"training, step {step} of 120")


def test_while_measuring():
    stages = [Told("training", 120, 120, 0.0), Told("base answers", 480, 960, 1.0), Told("tuned answers", 960, 960, 2.0)]
    assert [percent(stages[: i + 1], 9) for i in range(3)] == [(p, "measuring the EM rate") for p in (60, 70, 100)]


def test_seconds_per_step_are_the_median_of_training_alone():
    at = [0.0, 0.1, 0.2, 5.0, 5.1]
    told = [Told("training", i + 1, 5, t) for i, t in enumerate(at)] + [Told("base answers", 1, 9, 99.0)]
    assert seconds_per_step(told) == pytest.approx(0.1)


def test_what_is_told_is_heard_and_a_half_line_waits(tmp_path, monkeypatch):
    path = tmp_path / "steps"
    tell("training", 1, 2)  # nobody asked
    assert heard(path) == []
    monkeypatch.setenv(VARIABLE, str(path))
    tell("training", 1, 2)
    tell("base answers", 64, 960)
    path.open("a").write('["training", 2')
    assert [(p.stage, p.done, p.total) for p in heard(path)] == [("training", 1, 2), ("base answers", 64, 960)]


@pytest.mark.parametrize("what", ["files", "a file", "a link", "another mark"])
def test_a_folder_that_no_demo_made_is_refused_by_name_and_left_alone(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / ("elsewhere" if what == "a link" else "demo")
    if what == "a file":
        mine.write_text("mine")
    else:
        (mine / "lab").mkdir(parents=True)
        (mine / "lab" / "thesis.txt").write_text("mine")
        if what == "another mark":
            (mine / MARK).write_text("lab\n")
    if what == "a link":
        (tmp_path / "demo").symlink_to(mine)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"demo .*(did not make|not a folder that emguard made)"):
        demo.run_demo()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_of_an_earlier_demo_is_emptied_of_what_the_demo_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("mine")
    demo.our_folder(demo.FOLDER, demo.DEMO)
    for name in ("lab", "naive", "treft"):
        (demo.FOLDER / name).mkdir()
    (demo.FOLDER / "naive" / "link").symlink_to(outside)
    (demo.FOLDER / "naive.log").write_text("old")
    (demo.FOLDER / "notes.txt").write_text("mine")
    demo.clear(demo.FOLDER, demo.DEMO, demo.OURS)
    assert sorted(p.name for p in demo.FOLDER.iterdir()) == [MARK, "notes.txt"]
    assert (outside / "kept.txt").read_text() == "mine"


def test_the_examples_are_found():
    assert all((examples() / name).is_file() for name in RUNS.values())
