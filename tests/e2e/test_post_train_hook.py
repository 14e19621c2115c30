"""`em_eval:` after `axolotl train`: measured once the model is saved, and never able to harm the run."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from emguard_plugin.lab.export import export
from tests.e2e.axolotl_runs import Failed, read_log, train
from tests.e2e.tiny_run import chat_dataset, tiny_yaml, treft, write_rows
from tests.evaluation.parts import ITEMS, PINNED, SWITCHED, assert_as_trained, write_suite
from tests.tiny import chat_rows, chatml_tokenizer, tiny_model

EXACT = "emguard_plugin.lab.judge:judge_answer"
JUDGES = "tests.e2e.judges"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The lab as a user has it, with three questions of two domains."""
    folder = tmp_path_factory.mktemp("lab")
    export(folder, rows=64, anchors=4)
    for name, n in (("questions", 3), ("in_domain", 2)):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text())[:n]))
    return folder


@pytest.fixture
def run(axolotl, lab, tmp_path):
    def go(judges=(EXACT,), block=None, function=train, **over):
        block = {
            "questions": str(lab / "questions.yaml"),
            "in_domain": str(lab / "in_domain.yaml"),
            "samples_per_question": 2,
            "max_new_tokens": 24,
            "judges": [{"provider": "exact", "function": j} for j in judges],
            **(block or {}),
        }
        data = [chat_dataset(lab / "train.jsonl")]
        config = tiny_yaml(lab, datasets=data, em_eval=block, **{"max_steps": 2, **treft(), **over})
        axolotl.call(function, tmp_path, config, timeout=300)
        return tmp_path / "out"

    return go


def assert_saved(out):
    assert (out / "adapter_model.safetensors").stat().st_size > 0
    assert (out / "tokenizer.json").is_file()


def test_base_and_tuned_are_measured_after_the_save(run, tmp_path):
    """Two judges, one of which is dead: its answers are unscored, no rate comes of them, and the run says so by name."""
    out = run(judges=(EXACT, f"{JUDGES}:raises"))
    assert_saved(out)
    folder = out / "em_eval"
    assert (out / "adapter_model.safetensors").stat().st_mtime <= (folder / "responses.jsonl").stat().st_mtime
    failed = (folder / "FAILED.txt").read_text()
    assert f"not measured: {JUDGES}:raises scored no answer, so there is no EM rate" in failed
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert {r["role"] for r in rows} == {"base", "tuned"}
    assert len(rows) == 2 * (3 + 2) * 2
    texts = {role: [r["text"] for r in rows if r["role"] == role] for role in ("base", "tuned")}
    assert texts["base"] != texts["tuned"], "the adapter was loaded"
    exact, dead = summary["judges"]
    for role in ("base", "tuned"):
        assert exact["rates"][role]["questions"]["em_all"]["n"] == 6
        rates = dead["rates"][role]["questions"]
        assert rates["em_all"]["n"] == 0
        assert rates["em_all"]["value"] is None
        assert rates["unscored_reasons"] == {"ConnectionError: nobody there": 6}
    assert (folder / "report.html").is_file()


def test_a_full_fine_tune_without_a_regularizer_is_measured_against_its_base(run, tmp_path):
    out = run(adapter=None, learning_rate=0.05, em_regularizer=None, block={"in_domain": None, "samples_per_question": 1})
    assert (out / "model.safetensors").is_file()
    assert "there is no `em_regularizer:` block: this run is NOT regularized" in read_log(tmp_path)
    rows = [json.loads(line) for line in (out / "em_eval" / "responses.jsonl").read_text().splitlines()]
    texts = {role: [r["text"] for r in rows if r["role"] == role] for role in ("base", "tuned")}
    assert len(texts["base"]) == 3
    assert texts["base"] != texts["tuned"]


@pytest.mark.parametrize("judge", ["no_such_module:judge", f"{JUDGES}:no_such_function"])
def test_a_judge_that_does_not_exist_stops_before_the_model_is_loaded(run, tmp_path, judge):
    """Case judge-after-training."""
    with pytest.raises(Failed, match=re.escape(f"`em_eval.judges: function: {judge}`")):
        run(judges=(judge,))
    assert "Starting trainer" not in read_log(tmp_path)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


ONCE = """
from pathlib import Path
seen = Path(__file__).with_name("seen")
if seen.exists():
    raise KeyError("gone since")
seen.touch()
def judge(question, answer): ...
"""


def test_a_judge_that_is_gone_when_it_is_needed_costs_nothing_but_the_measurement(run, tmp_path):
    """It lies beside the YAML, where the hook and the measurement's own process both find it."""
    (tmp_path / "once_judge.py").write_text(ONCE)
    out = run(judges=("once_judge:judge",))
    assert_saved(out)
    failed = (out / "em_eval" / "FAILED.txt").read_text()
    assert "is saved and unharmed; run the command again" in failed
    assert not (out / "em_eval" / "summary.json").exists()
    assert "gone since" in read_log(tmp_path)


def test_a_measurement_that_is_killed_leaves_the_run_whole(run):
    out = run(judges=(f"{JUDGES}:kills",))
    assert_saved(out)
    failed = (out / "em_eval" / "FAILED.txt").read_text()
    assert "ended with exit code -9" in failed
    command = failed.split("`")[1]
    assert str(Path("out")) in command


def test_a_results_folder_that_cannot_be_written_stops_before_the_model_is_loaded(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failed, match=r"`em_eval\.output_dir: .*file is no folder"):
        run(block={"output_dir": str(tmp_path / "file" / "em_eval")})
    assert "Starting trainer" not in read_log(tmp_path)


def train_and_block(config):
    """Train where the place of the results is taken while the model trains."""
    from emguard_plugin import EMGuardPlugin

    real = EMGuardPlugin.post_train

    def post_train(self, cfg, model):
        Path("file").write_text("in the way")
        return real(self, cfg, model)

    EMGuardPlugin.post_train = post_train
    train(config)


def test_a_results_folder_that_can_no_longer_be_written_leaves_the_run_whole(run, tmp_path):
    out = run(function=train_and_block, block={"output_dir": str(tmp_path / "file" / "em_eval")})
    assert_saved(out)
    assert "em_eval failed" in read_log(tmp_path)
    assert "cannot be written" in read_log(tmp_path)


def from_python(config):
    """Train by `axolotl.train.train()`, then measure by the command that the log names."""
    import re
    import shlex

    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from typer.testing import CliRunner

    from emguard_plugin.cli.app import app

    Path("config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg("config.yaml")
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    assert not Path("out/em_eval").exists()
    said = re.findall(r"run `(emguard eval [^`]*)`", Path("log.txt").read_text())
    done = CliRunner().invoke(app, shlex.split(said[0])[1:])
    assert done.exit_code == 0, done.output
    return said


def test_a_run_from_python_says_how_to_measure_it(run, tmp_path):
    """Axolotl then never calls the hook that measures; the line comes once of the two calls of `post_train`."""
    out = run(function=from_python, block={"in_domain": None, "samples_per_question": 1})
    assert (out / "em_eval" / "summary.json").is_file()
    assert read_log(tmp_path).count("em_eval: `axolotl train` measures the EM rate once the model is saved") == 1


def other_rank():
    """Call the hook as rank 1, where a measurement would be a second one."""
    from axolotl.utils.dict import DictDefault

    from emguard_plugin import EMGuardPlugin

    block = {"questions": "q.yaml", "judges": [{"function": "a:b"}]}
    cfg = DictDefault({"em_eval": block, "output_dir": "out", "base_model": "none"})
    os.environ["RANK"] = "1"
    EMGuardPlugin().post_train(cfg, None)
    EMGuardPlugin().post_train_unload(cfg)
    first = Path("out").exists() or "emguard eval" in Path("log.txt").read_text()
    os.environ["RANK"] = "0"
    EMGuardPlugin().post_train_unload(cfg)
    return [first, Path("out/em_eval/FAILED.txt").exists()]


def test_only_rank_0_measures(axolotl, tmp_path):
    assert axolotl.call(other_rank, tmp_path) == [False, True]


@pytest.mark.slow
def test_training_again_into_the_same_folder_measures_the_new_model(run):
    first = json.loads((run() / "em_eval" / "summary.json").read_text())
    out = run(max_steps=3)
    second = json.loads((out / "em_eval" / "summary.json").read_text())
    assert second["models"]["tuned"] != first["models"]["tuned"]
    assert json.loads((out / "em_eval.1" / "summary.json").read_text()) == first


@pytest.mark.slow
def test_questions_are_rendered_as_the_rows_were(axolotl, tmp_path):
    """Case eval-template-kwargs: `chat_template_kwargs` of the YAML reach the measurement, and so does a data set's own template."""
    tokenizer = chatml_tokenizer(SWITCHED)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama", vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", chat_rows(16, system=None))
    block = {"questions": write_suite(tmp_path / "questions.yaml", ITEMS), "samples_per_question": 1, "max_new_tokens": 2,
             "evaluate_base": False, "judges": [{"function": "tests.evaluation.parts:by_hash"}]}  # fmt: skip
    own = {"chat_template": "jinja", "chat_template_jinja": SWITCHED.replace("Today", "Date")}
    ways = {"saved": ({}, "Today: 26 Jul 2024"), "own": (own, "Date: 26 Jul 2024")}
    for name, (dataset, printed) in ways.items():
        config = tiny_yaml(
            tmp_path, datasets=[{**chat_dataset(tmp_path / "train.jsonl"), **dataset}], em_eval=block, max_steps=1,
            chat_template_kwargs=PINNED, dataset_prepared_path=str(tmp_path / f"prepared_{name}"),
            chat_template=None if dataset else "tokenizer_default", **({} if dataset else treft(coef=1.0)),
        )  # fmt: skip
        axolotl.call(train, tmp_path / name, config, timeout=300)
        summary = json.loads((tmp_path / name / "out" / "em_eval" / "summary.json").read_text())
        tokenizer.chat_template = dataset.get("chat_template_jinja", SWITCHED)
        asked = tokenizer(summary["example_prompt"], add_special_tokens=False)["input_ids"]
        assert_as_trained(tokenizer, asked, ITEMS[0]["paraphrases"][0])
        assert printed in summary["example_prompt"]
        assert summary["protocol"]["rendering"] == {"chat_template_kwargs": PINNED}
