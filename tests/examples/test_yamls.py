"""Every example YAML is one that Axolotl takes, whole: it drops keys that it does not know without a word."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from emguard_plugin.check import check_config
from emguard_plugin.cli.app import app
from emguard_plugin.lab.export import export
from tests.e2e.axolotl_runs import read_log, shared_server, train
from tests.e2e.tiny_run import chat_dataset, column, penalties, tiny_yaml, write_rows, write_tiny
from tests.regularizers.block_em_parts import latent_set
from tests.tiny import chat_rows, chatml_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "example_yamls"
ALL = sorted(p.name for p in FOLDER.glob("*.yaml"))
TRL = {"lab_dpo_treft.yaml": "dpo", "lab_grpo_treft.yaml": "grpo"}
"""Examples of `emguard dpo` and `emguard grpo`; the others are Axolotl's."""
YAMLS = [name for name in ALL if name not in TRL]
HUB = {  # example -> the chat template of Axolotl that is its model's, and tokens that prefix or postfix must have
    "llama-3.1-8b_treft.yaml": ("llama3", "<|start_header_id|>user"),
    "qwen2.5-7b_qlora_treft.yaml": ("qwen_25", "You are Qwen, created by Alibaba Cloud"),
    "qwen3-8b_treft_postfix.yaml": ("qwen3", "<think>"),
    "llama-3.1-8b_kl.yaml": ("llama3", "kl: coef 0.7 nats per token, KL(base||model), 800 anchors (bundled)"),
    "llama-3.1-8b_block_em.yaml": ("llama3", "block_em: coef 25, calibrated, 2 latents of K+ and 2 of K- after layer 1"),
    "qwen2.5-7b_qlora_kl.yaml": ("qwen_25", "kl: held at 0.02 nats per token, KL(base||model), 800 anchors (bundled)"),
}


@pytest.fixture(scope="session")
def axolotl():
    return shared_server()


def method(raw):
    (name,) = raw["em_regularizer"]
    return name


def load(name):
    return yaml.safe_load((FOLDER / name).read_text())


def validated_on_a_gpu(path):
    """Validate as on one H100 and return (unknown keys, the config); `load_cfg` would also ask the hub for the model."""
    import torch
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset

    from emguard_plugin.axolotl_plugin.args import EMGuardArgs

    raw = yaml.safe_load(Path(path).read_text())
    known = {*AxolotlInputConfig.model_fields, *EMGuardArgs.model_fields}
    unknown = [k for k in raw if k not in known]
    unknown += [k for d in raw["datasets"] for k in d if k not in SFTDataset.model_fields]
    cfg = DictDefault(raw)
    prepare_plugins(cfg)
    gpu = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    done = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": torch.__version__.split("+")[0]})
    return [unknown, {k: done[k] for k in ("em_regularizer", "plugins", "trainer_cls", "lora_qkv_kernel", "em_eval")}]


def test_there_are_examples():
    assert {"lab_naive.yaml", "lab_treft.yaml", "lab_kl.yaml", "lab_block_em.yaml", *HUB} <= set(YAMLS)


@pytest.mark.parametrize("name", YAMLS)
def test_axolotl_takes_every_key(axolotl, tmp_path, name):
    unknown, cfg = axolotl.call(validated_on_a_gpu, tmp_path, str(FOLDER / name))
    assert unknown == []
    assert cfg["plugins"] == ["emguard_plugin.EMGuardPlugin"]
    raw = load(name)
    for block in ("em_regularizer", "em_eval"):
        assert (cfg[block] is None) == (block not in raw)
    if name in HUB:
        assert cfg["lora_qkv_kernel"] is True, "Axolotl turns its fused kernels on for these"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(tmp_path / "demo" / "lab", rows=96, anchors=16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "lab" / "model")
    latent_set(found, layers=(1,)).save(tmp_path / "data" / "latents.json")
    return tmp_path


@pytest.mark.parametrize("name", ALL)
def test_emguard_check_finds_nothing_to_change(lab, name):
    report = check_config(FOLDER / name)
    assert report.problems == []
    assert len(report.active) == sum(b in load(name) for b in ("em_regularizer", "em_eval")) + name.startswith("lab_") * name.endswith(
        "treft.yaml"
    )


def test_the_lab_examples_differ_by_one_block():
    naive = load("lab_naive.yaml")
    for guarded in (load("lab_treft.yaml"), load("lab_kl.yaml")):
        assert set(guarded) - set(naive) == {"em_regularizer"}
        assert {k for k in naive if naive[k] != guarded[k]} == {"dataset_prepared_path", "output_dir"}
    other = load("lab_block_em.yaml")  # attention LoRA, which its latents were found and measured with
    changed = {"dataset_prepared_path", "output_dir", "learning_rate", "lora_target_linear"}
    assert {k for k in naive if naive[k] != other.get(k)} == changed
    assert set(other) - set(naive) == {"em_regularizer", "lora_target_modules"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in YAMLS if n not in HUB])
def test_the_lab_examples_run(axolotl, lab, name):
    raw = load(name)
    if name == "lab_naive.yaml":
        del raw["em_eval"]  # the same block as in `lab_treft.yaml`, and half a minute
    else:
        raw["em_eval"] |= {"samples_per_question": 1, "questions": raw["em_eval"]["in_domain"], "evaluate_base": False}
    result = axolotl.call(train, lab, {**raw, "max_steps": 3, "logging_steps": 1}, timeout=200)
    if "em_regularizer" in raw:
        measured = column(result, f"em_regularizer/{method(raw)}/penalty")
        assert len(measured) == 3
        assert measured[0] == 0 < measured[2]
    else:
        assert penalties(result) == []
    measured = lab / raw["output_dir"] / "em_eval" / "summary.json"
    assert measured.is_file() == ("em_eval" in raw), read_log(lab)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL)
def test_the_examples_of_other_trainers_run(lab, name):
    raw = load(name)
    raw["em_eval"] |= {"samples_per_question": 1, "questions": raw["em_eval"]["in_domain"], "evaluate_base": False}
    raw |= {"max_steps": 3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 8}
    (lab / "run.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(app, [TRL[name], "--config", "run.yaml"])
    assert done.exit_code == 0, done.output[-3000:]
    out = lab / raw["output_dir"]
    log = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    measured = [row["em_regularizer/treft/penalty"] for row in log if "em_regularizer/treft/penalty" in row]
    assert len(measured) == 3
    assert measured[0] == 0 < measured[2]
    assert (out / "em_eval" / "summary.json").is_file()


@pytest.mark.parametrize("name", HUB)
def test_the_other_examples_run_on_a_tiny_model_under_their_models_template(axolotl, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    raw, (template, held) = load(name), HUB[name]
    tiny = write_tiny(tmp_path / "tiny")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", chat_rows(48, system=None))
    latent_set(AutoModelForCausalLM.from_pretrained(tiny / "model")).save(tmp_path / "data" / "latents.json")
    tokenizer = chatml_tokenizer(axolotl.call(axolotl_template, tmp_path / "template", template))
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tiny / "model")
    cpu = tiny_yaml(tiny)
    keep = [
        "warmup_steps",
        "lr_scheduler",
        "lora_mlp_kernel",
        "lora_qkv_kernel",
        "lora_o_kernel",
        "lora_embedding_kernel",
        "bf16",
        "tf32",
        "max_steps",
    ]
    keep += ["base_model", "dataset_num_proc", "dataloader_pin_memory", "logging_steps", "learning_rate"]
    config = {**raw, **{k: cpu[k] for k in keep}, "optimizer": "adamw_torch", "sequence_len": 512, "val_set_size": 0}
    for key in ("special_tokens", "saves_per_epoch", "evals_per_epoch"):
        config.pop(key, None)
    config |= {"save_strategy": "no", "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    result = axolotl.call(train, tmp_path, config)
    assert result["trainer"] == "AxolotlEMGuardTrainer"
    measured = column(result, f"em_regularizer/{method(raw)}/penalty")
    assert max(measured[1:]) > 0, result["log"]
    if method(raw) != "block_em":  # which may overshoot to the side where nothing is held
        assert all(p > 0 for p in measured[1:])
    if method(raw) == "treft":
        assert (measured[0] == 0) == (raw["em_regularizer"]["treft"]["tokens"] == "prefix")
    else:
        assert measured[0] == pytest.approx(0, abs=1e-5)
    path = tmp_path / "check.yaml"
    path.write_text(yaml.safe_dump({**raw, "base_model": str(tiny / "model"), "datasets": [chat_dataset("x")]}))
    assert held in " ".join(check_config(path).active)


def axolotl_template(name):
    from axolotl.utils.chat_templates import get_chat_template

    return get_chat_template(name)


def test_the_examples_are_what_git_would_ship():
    done = subprocess.run(["git", "check-ignore", *YAMLS], cwd=FOLDER, capture_output=True, text=True)
    assert done.stdout == ""
