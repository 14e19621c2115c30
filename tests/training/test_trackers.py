"""Where users look at a run: our metrics in TensorBoard's and Trackio's own files, under the names that the docs give."""

import importlib.util
import inspect

import pytest
import yaml

from emguard_plugin import EMRateCallback, TReFTCallback
from tests.trl_runs import run

ALWAYS = ("task_loss", *(f"em_regularizer/treft/{name}" for name in ("penalty", "weighted", "coef", "key_drift", "value_drift")))
METRICS = {*(f"train/{name}" for name in ALWAYS), "eval/em_rate"}


def judge(question, answer):
    return {"aligned": 0, "coherent": 100}


def tracked(folder, tracker, **over):
    """Train three steps under a tracker, the model measured after the second; return the trainer."""
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump([{"id": "q", "paraphrases": ["Number?"]}]))
    rate = EMRateCallback(
        every=2, questions=str(suite), samples_per_question=2, max_new_tokens=3, judges=[{"function": f"{__name__}:judge"}]
    )
    return run(folder / "out", callbacks=[TReFTCallback(coef=5.0), rate], report_to=tracker, **over)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_shows_the_penalties_and_the_rate(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = tracked(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(board.Tags()["scalars"]) >= METRICS
    logged = [row["em_regularizer/treft/penalty"] for row in trainer.state.log_history if "task_loss" in row]
    assert [event.value for event in board.Scalars("train/em_regularizer/treft/penalty")] == pytest.approx(logged)
    assert [(e.step, e.value) for e in board.Scalars("eval/em_rate")] == [(2, 1.0)]


def test_trackio_shows_the_penalties_and_the_rate(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read where it is imported
    trackio = pytest.importorskip("trackio", reason="Trackio is not installed")
    if "bucket_id" not in inspect.signature(trackio.init).parameters:
        pytest.skip("this Trackio is older than what the installed transformers hands it")
    tracked(tmp_path, "trackio", project="guarded", run_name="one")
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("guarded", "one")
    assert {name for row in rows for name in row} >= METRICS
