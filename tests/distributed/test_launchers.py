"""`emguard sft` under torchrun and `accelerate launch`: what one process trains at the same global batch, measured once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emguard_plugin.lab.export import export

pytestmark = pytest.mark.slow

HERE = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [HERE / "torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port={port}", HERE / "emguard"],
    "accelerate launch": [
        HERE / "accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        "--main_process_ip=127.0.0.1", "--main_process_port={port}", HERE / "emguard",
    ],
}  # fmt: skip
CONFIG = {
    "model_name_or_path": "./lab/model", "dtype": "float32", "datasets": [{"path": "json", "data_files": "./lab/train.jsonl"}],
    "use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear", "seed": 7, "max_steps": 4, "learning_rate": 2e-3, "optim": "sgd", "lr_scheduler_type": "constant",
    "max_length": 128, "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": "sequential", "disable_tqdm": True,
    "em_regularizer": {"kl": {"coef": 10.0, "ratio": 1.0, "anchors": "./lab/anchors.jsonl"}},
    "em_eval": {
        "questions": "./lab/in_domain.yaml", "samples_per_question": 1, "max_new_tokens": 32, "evaluate_base": False,
        "judges": [{"function": "emguard_plugin.lab.judge:judge_answer"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    export(folder / "lab")
    return folder


def trained(lab, name, launcher, processes):
    """Return the training log, how many processes said that a method is active, and the folder."""
    config = {**CONFIG, "output_dir": f"./{name}", "per_device_train_batch_size": 8 // processes}
    (lab / f"{name}.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(part).format(port=port) for part in launcher] + ["sft", "--config", f"{name}.yaml"]
    done = subprocess.run(command, cwd=lab, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    log = json.loads((lab / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "task_loss" in row], done.stdout.count("em_regularizer active"), lab / name


@pytest.fixture(scope="module")
def alone(lab):
    return trained(lab, "alone", [HERE / "emguard"], 1)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_train_what_one_does_and_measure_once(lab, alone, name):
    log, told, folder = trained(lab, name.replace(" ", "-"), LAUNCHERS[name], 2)
    assert len(log) == 4
    assert told == 1
    for key in ("task_loss", "em_regularizer/kl/penalty", "em_regularizer/kl/tokens"):
        assert [row[key] for row in log] == pytest.approx([row[key] for row in alone[0]], rel=1e-4, abs=1e-7), key
    assert log[-1]["em_regularizer/kl/penalty"] > 0
    here, there = (json.loads((f / "em_eval" / "summary.json").read_text()) for f in (folder, alone[2]))
    assert here["judges"][0]["rates"].keys() == there["judges"][0]["rates"].keys()
    assert len((folder / "em_eval" / "responses.jsonl").read_text().splitlines()) == len(
        (alone[2] / "em_eval" / "responses.jsonl").read_text().splitlines()
    )
