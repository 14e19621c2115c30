"""What a run needs of its reference goes where its checkpoints go: other output folders, links, copies, folders that were lost."""

import shutil

import pytest
from datasets import Dataset

from tests.tiny import chat_rows
from tests.training.test_reference_of_another_base import FILES, base, go, method
from tests.trl_runs import build, column

BESIDE = ["kl", "block_em"]
"""Methods whose reference lies beside the checkpoints in full fine-tuning."""


def penalties(trainer, name):
    return column(trainer, f"em_regularizer/{name}/penalty")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Per method: a run of two steps, and its whole course."""
    folder = tmp_path_factory.mktemp("first")
    found = {}
    for name in FILES:
        (folder / name).mkdir()
        go(folder / name / "a", name, base(), steps=2)
        found[name] = (folder / name / "a", penalties(go(folder / name / "whole", name, base(), steps=6), name))
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_goes_on_in_another_output_folder_can_be_resumed_from_there(tmp_path, first, name):
    start, whole = first[name]
    go(tmp_path / name, name, base(), str(start / "checkpoint-2"), steps=4)
    again = go(tmp_path / name, name, base(), True, steps=6)
    assert penalties(again, name) == whole


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path, first, name):
    start, whole = first[name]
    (tmp_path / "latest").symlink_to(start / "checkpoint-2", target_is_directory=True)
    assert penalties(go(tmp_path / name, name, base(), str(tmp_path / "latest"), steps=4), name) == whole[:4]


@pytest.mark.parametrize("name", BESIDE)
def test_a_copied_checkpoint_names_what_was_not_copied_and_goes_on_once_it_is(tmp_path, first, name):
    start, whole = first[name]
    shutil.copytree(start / "checkpoint-2", tmp_path / name / "checkpoint-2")
    beside = {"kl": "emguard_kl_reference", "block_em": "emguard_block_em"}[name]
    with pytest.raises(ValueError, match=r"Restore .*run that recorded it.*start afresh without `resume_from_checkpoint`") as error:
        go(tmp_path / name, name, base(), True, steps=4)
    assert str(tmp_path / name / beside) in str(error.value)
    assert "Delete" not in str(error.value), "nothing is there to be deleted"
    shutil.copytree(start / beside, tmp_path / name / beside)
    assert penalties(go(tmp_path / name, name, base(), True, steps=4), name) == whole[:4]


@pytest.mark.parametrize("name", BESIDE)
def test_a_damaged_reference_of_a_checkpoint_is_not_to_be_deleted(tmp_path, name):
    go(tmp_path / name, name, base(), steps=2)
    for path in tmp_path.glob(f"{name}/emguard_*/*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cut|changed|readable") as error:
        go(tmp_path / name, name, base(), True, steps=4)
    assert "Restore" in str(error.value)
    assert "Delete the folder" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_an_evaluation_before_training_and_between_two_trainings(tmp_path, name):
    rows = Dataset.from_list(chat_rows(4))
    trainer = build(tmp_path, model=base(), callbacks=[method(name, tmp_path)], max_steps=1, learning_rate=0.0, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before)
    trainer.train()
    assert penalties(trainer, name) == pytest.approx([0.0], abs=1e-9)
