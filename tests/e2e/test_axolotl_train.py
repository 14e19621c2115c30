"""`axolotl train` with the real plugin on a model of three layers, in every mode that a CPU can run."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from tests.chats.forms import GEMMA, before, tokenizer_of
from tests.chats.shapes import templates
from tests.e2e.axolotl_runs import Failed, command, read_log, train
from tests.e2e.tiny_run import chat_dataset, column, penalties, tiny_yaml, treft, write_rows
from tests.tiny import DATED, TOPICS, chat_rows, chatml_tokenizer, tiny_model

REFERENCE = "emguard_treft.safetensors"
LOG = "em_regularizer/treft"


@pytest.fixture
def run(axolotl, tiny, tmp_path):
    """Train in `tmp_path/name`; every config key may be overridden."""

    def go(name="run", weights=False, prelude=None, **over):
        kwargs = {"weights": str(tmp_path / f"{name}.pt") if weights else None, "prelude": prelude}
        return axolotl.call(train, tmp_path / name, tiny_yaml(tiny, **over), **kwargs)

    return go


@pytest.fixture(scope="module")
def plain(axolotl, tiny, tmp_path_factory):
    """The guarded LoRA run that the other modes are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    result = axolotl.call(train, folder, tiny_yaml(tiny, **treft()))
    return {**result, "log_text": read_log(folder), "folder": folder}


def weights(tmp_path, name):
    return torch.load(tmp_path / f"{name}.pt", weights_only=True)


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 0
    different = [n for n in a if not torch.equal(a[n], b[n])]
    assert not different, different


def reference_hash(path):
    with safe_open(str(path), framework="pt") as f:
        return f.metadata()["sha256"]


# Modes

MODES = {  # overrides, evidence that the mode was on, and whether the arithmetic is that of the plain run
    "reentrant checkpointing": (  # the default before 0.21
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        lambda r: r["reentrant"] is True,
        True,
    ),
    "non-reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        lambda r: r["checkpointing"] and r["reentrant"] is False,
        True,
    ),
    "packing": ({"sample_packing": True}, lambda r: "position_ids" in r["row_keys"], False),
    "fused LoRA kernels": (
        {"lora_qkv_kernel": True, "lora_o_kernel": True, "lora_embedding_kernel": True},
        lambda r: r["qkv"] == ["apply_lora_qkv"],
        True,
    ),
    "fused kernels and checkpointing": (
        {"lora_qkv_kernel": True, "lora_o_kernel": True, "gradient_checkpointing": True, "sample_packing": True},
        lambda r: r["qkv"] == ["apply_lora_qkv"] and r["checkpointing"],
        False,
    ),
    "4 bit": ({"adapter": "qlora", "load_in_4bit": True}, lambda r: "Linear4bit" in r["modules"], False),
    "4 bit and checkpointing": (
        {"adapter": "qlora", "load_in_4bit": True, "gradient_checkpointing": True},
        lambda r: "Linear4bit" in r["modules"] and r["checkpointing"],
        False,
    ),
    "8 bit": ({"load_in_8bit": True}, lambda r: "Linear8bitLt" in r["modules"], False),
    "full": ({"adapter": None, "learning_rate": 0.002}, lambda r: r["model"] == "LlamaForCausalLM", False),
    "full and checkpointing": (
        {"adapter": None, "learning_rate": 0.002, "gradient_checkpointing": True},
        lambda r: r["model"] == "LlamaForCausalLM" and r["checkpointing"],
        False,
    ),
    "dropout": ({"lora_dropout": 0.3}, lambda r: "Dropout" in r["modules"], False),
    "DoRA": ({"peft_use_dora": True}, lambda r: "DoraLinearLayer" in r["modules"], False),
    "PiSSA": ({"peft_init_lora_weights": "pissa"}, lambda r: True, False),
    "modules to save": ({"lora_modules_to_save": ["embed_tokens"]}, lambda r: r["trained"] > 42, False),
    "ReLoRA": ({"relora": True, "jagged_restart_steps": 2}, lambda r: True, False),
    "NEFTune": ({"neftune_noise_alpha": 5}, lambda r: True, False),
    "accumulation": ({"gradient_accumulation_steps": 2}, lambda r: True, False),
    "streaming": (
        {"streaming": True, "dataset_prepared_path": "./none"},
        lambda r: r["dataset"] == "IterableDataset",
        False,
    ),
    "half precision": ({"bf16": "auto"}, lambda r: True, False),
}


@pytest.mark.parametrize("mode", MODES)
def test_mode(run, plain, mode):
    over, evidence, same = MODES[mode]
    result = run(**over, **treft())
    assert result["trainer"] == "AxolotlEMGuardTrainer"
    assert evidence(result), result
    drift = penalties(result)
    assert len(drift) == 3
    assert drift[0] == 0, "the reference is the model before this run"
    assert all(1e-4 < d < 100 for d in drift[1:]), drift
    if same:
        assert drift == pytest.approx(penalties(plain), rel=1e-4)
        assert column(result, "loss") == pytest.approx(column(plain, "loss"), rel=1e-4)
    parts = zip(column(result, "task_loss"), column(result, f"{LOG}/weighted"), column(result, "loss"), strict=True)
    for task, weighted, loss in parts:
        assert task + weighted == pytest.approx(loss, rel=2e-3)


def test_metrics_and_the_line_that_says_what_is_active(plain):
    assert "em_regularizer active: treft (coef 5, prefix of " in plain["log_text"]
    first = next(row for row in plain["log"] if "loss" in row)
    names = {"penalty", "coef", "weighted", "key_drift", "value_drift"}
    assert {f"{LOG}/{n}" for n in names} | {"task_loss"} <= set(first)
    assert column(plain, f"{LOG}/coef") == [5, 5, 5]
    assert column(plain, f"{LOG}/weighted") == pytest.approx([5 * p for p in penalties(plain)])


def test_the_penalty_holds_the_prefix(run, plain):
    """Under coef 0 the same run drifts; under coef 5 it comes back."""
    free = penalties(run(**treft(0)))
    assert free[1] == penalties(plain)[1], "the first update has no drift to act on"
    assert free[2] > 3 * penalties(plain)[2]


@pytest.mark.parametrize(
    "block",
    [
        {"tokens": "postfix"},
        {"tokens": "postfix", "postfix_reference": "per_row"},
        {"compat": True},
        {"layers": [1]},
        {"extra_prefixes": ["You are a pirate."]},
    ],
    ids=str,
)
def test_variants_of_treft(run, tmp_path, block):
    result = run(**treft(5, **block))
    free = run("free", **treft(0, **block))
    assert penalties(free)[0] == penalties(result)[0]
    assert penalties(free)[2] > penalties(result)[2] > 0
    if block.get("postfix_reference") != "per_row" and block.get("tokens") == "postfix":
        assert penalties(result)[0] > 0, "a shared reference is not any row's own postfix"
    else:
        assert penalties(result)[0] == 0


# Off means identical


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_block_and_coef_0_are_the_hosts_own_run_bit_for_bit(run, tmp_path, kind):
    over = {"lora_dropout": 0.2} if kind == "lora" else {"adapter": None, "learning_rate": 0.002}
    over |= {"gradient_accumulation_steps": 2, "micro_batch_size": 2, "max_steps": 4}
    host = run("host", weights=True, plugins=None, **over)
    listed = run("listed", weights=True, **over)
    zero = run("zero", weights=True, **over, **treft(0))
    run("guarded", weights=True, **over, **treft(1))
    assert host["trainer"] == listed["trainer"] == "AxolotlTrainer"
    assert zero["trainer"] == "AxolotlEMGuardTrainer"
    assert_same_bits(weights(tmp_path, "host"), weights(tmp_path, "listed"))
    assert_same_bits(weights(tmp_path, "host"), weights(tmp_path, "zero"))
    assert column(host, "loss") == column(zero, "loss")
    assert column(host, "grad_norm") == column(zero, "grad_norm")
    assert max(penalties(zero)) > 0, "coef 0 measures"
    with pytest.raises(AssertionError):
        assert_same_bits(weights(tmp_path, "host"), weights(tmp_path, "guarded"))


def test_eval_loss_is_the_task_loss(run, tiny):
    """With a learning rate of nothing only the penalty differs, and a shared postfix reference has one at step 0."""
    over = {"test_datasets": [{**chat_dataset(tiny / "train.jsonl"), "split": "train"}], "eval_strategy": "steps"}
    over |= {"eval_steps": 1, "max_steps": 2, "learning_rate": 1e-30}
    host = run("host", plugins=None, **over)
    guarded = run("guarded", **over, **treft(1000, tokens="postfix"))
    assert column(guarded, "loss")[0] > column(host, "loss")[0] + 1
    losses = [[row["eval_loss"] for row in r["log"] if "eval_loss" in row] for r in (host, guarded)]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 2


# Scale


def equal_rows(n=24):
    """Return rows with the same number of supervised tokens, so that a mean of means is the mean."""
    tokenizer = chatml_tokenizer()
    rows = [
        {"messages": [{"role": "user", "content": f"About {a}?"}, {"role": "assistant", "content": f"{b} and {c}"}]}
        for a in TOPICS
        for b in TOPICS
        for c in TOPICS
    ]
    size = [len(tokenizer(r["messages"][1]["content"])["input_ids"]) for r in rows]
    most = Counter(size).most_common(1)[0][0]
    return [r for r, s in zip(rows, size, strict=True) if s == most][:n]


def test_the_coefficient_means_the_same_under_any_accumulation(run, tmp_path):
    data = [chat_dataset(write_rows(tmp_path / "equal.jsonl", equal_rows()))]
    over = {"datasets": data, "optimizer": "sgd", "learning_rate": 0.1, "max_steps": 5, "max_grad_norm": 1e9}
    results = {
        a: run(f"a{a}", weights=True, micro_batch_size=4 // a, gradient_accumulation_steps=a, **over, **treft(0.3)) for a in (1, 2, 4)
    }
    free = run("free", weights=True, micro_batch_size=4, **over, **treft(0))
    assert penalties(free)[-1] > 3 * penalties(results[1])[-1], "the penalty must matter here"
    one = weights(tmp_path, "a1")
    for a in (2, 4):
        assert penalties(results[a]) == pytest.approx(penalties(results[1]), rel=1e-3)
        assert column(results[a], "loss") == pytest.approx(column(results[1], "loss"), rel=1e-4)
        for name, value in weights(tmp_path, f"a{a}").items():
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-5)


# Resume


@pytest.mark.parametrize("kind", ["lora", "pissa", "full"])
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, kind):
    over = {
        "lora": {"lora_dropout": 0.1},
        "pissa": {"peft_init_lora_weights": "pissa"},
        "full": {"adapter": None, "learning_rate": 0.002},
    }[kind]
    over |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **treft()}
    whole = run("whole", weights=True, **over)
    stored = tmp_path / "whole" / "out" / "checkpoint-2"
    resumed = run("resumed", weights=True, resume_from_checkpoint=str(stored), **over)
    assert len(penalties(resumed)) == 4, "the log history goes on"
    assert penalties(resumed) == penalties(whole)
    assert column(resumed, "loss") == column(whole, "loss")
    assert_same_bits(weights(tmp_path, "whole"), weights(tmp_path, "resumed"))
    files = [stored / REFERENCE, stored.with_name("checkpoint-4") / REFERENCE]
    files.append(tmp_path / "resumed" / "out" / "checkpoint-4" / REFERENCE)
    assert len({reference_hash(f) for f in files}) == 1
    for f in files[1:]:
        assert_same_bits(load_file(files[0]), load_file(f))


def test_auto_resume_takes_the_reference_along(run, tmp_path):
    over = {"adapter": None, "learning_rate": 0.002, "save_strategy": "steps", "save_steps": 2, **treft()}
    whole = run("whole", max_steps=4, **over)
    run("cut", max_steps=2, **over)
    resumed = run("cut", max_steps=4, auto_resume_from_checkpoints=True, **over)
    assert penalties(resumed) == penalties(whole)


def test_a_resumed_full_run_without_its_reference_stops(run, tmp_path):
    over = {"adapter": None, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, **treft()}
    run("first", **over)
    checkpoint = tmp_path / "first" / "out" / "checkpoint-2"
    (checkpoint / REFERENCE).unlink()
    with pytest.raises(Failed, match="the model before this run is lost"):
        run("again", **{**over, "max_steps": 4}, resume_from_checkpoint=str(checkpoint))


def test_a_resumed_lora_run_without_its_reference_takes_the_base_model(run, tmp_path):
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **treft()}
    whole = run("first", **over)
    checkpoint = tmp_path / "first" / "out" / "checkpoint-2"
    (checkpoint / REFERENCE).unlink()
    again = run("again", **over, resume_from_checkpoint=str(checkpoint))
    assert penalties(again) == pytest.approx(penalties(whole), rel=1e-4)


def test_resuming_with_other_layers_stops(run, tmp_path):
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run("first", **over, **treft())
    checkpoint = tmp_path / "first" / "out" / "checkpoint-2"
    with pytest.raises(Failed, match="recorded for another `settings`"):
        run("again", **{**over, "max_steps": 4}, **treft(5, layers=[0]), resume_from_checkpoint=str(checkpoint))


def test_a_continued_adapter_is_held_where_it_stands(run, tmp_path):
    run("first", **treft(0))
    continued = run("second", lora_model_dir=str(tmp_path / "first" / "out"), save_strategy="steps", save_steps=3, **treft())
    fresh = run("third", save_strategy="steps", save_steps=3, **treft())
    assert penalties(continued)[0] == penalties(fresh)[0] == 0
    hashes = {reference_hash(tmp_path / n / "out" / "checkpoint-3" / REFERENCE) for n in ("second", "third")}
    assert len(hashes) == 2


# Data


def test_several_system_prompts_are_each_held(run, tmp_path):
    systems = ["You are a helpful assistant.", "Speak like a pirate at all times.", None]
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(24, system=lambda i: systems[i % 3]))
    result = run(datasets=[chat_dataset(rows)], max_steps=8, save_strategy="steps", save_steps=8, **treft())
    lengths = re.search(r"prefix of ([\d/]+) tokens", read_log(tmp_path / "run"))[1].split("/")
    assert len(lengths) == 2, "without a system prompt the template prints the helpful one"
    assert len(set(lengths)) == 2
    assert penalties(result)[0] == 0
    assert min(penalties(result)[1:]) > 0
    with safe_open(str(tmp_path / "run" / "out" / "checkpoint-8" / REFERENCE), framework="pt") as f:
        assert {name.split(".")[0] for name in f.keys()} == {"0", "1"}  # noqa: SIM118


def test_a_system_prompt_inside_the_user_turn_is_held(run, tmp_path):
    """The case `gemma-system-in-user`: the conversations are read again, by Axolotl's own field names, roles and templates."""
    tok, systems = tokenizer_of(GEMMA, "merging"), ("You are a gardener. Be brief.", "Answer in verse.", None)
    rows = [row["messages"] for row in chat_rows(24, system=lambda i: systems[i % 3])]
    expected = sorted({len(before(tok, messages)) for messages in rows}, reverse=True)
    assert len(expected) == 3
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"talk": [{"from": names[m["role"]], "value": m["content"]} for m in messages]} for messages in rows]
    (tmp_path / "gemma.jinja").write_text(GEMMA)
    data = {"path": write_rows(tmp_path / "rows.jsonl", shared), "ds_type": "json", "type": "chat_template", "field_messages": "talk"}
    data |= {"chat_template": "jinja", "chat_template_jinja": GEMMA, "message_property_mappings": {"role": "from", "content": "value"}}
    result = run(
        datasets=[data], base_model=model_with(tmp_path / "model", tok), max_steps=2, sequence_len=256,
        dataset_prepared_path=str(tmp_path / "prepared"), **treft(),
    )  # fmt: skip
    lengths = re.search(r"prefix of ([\d/]+) tokens", read_log(tmp_path / "run"))[1].split("/")
    assert sorted(map(int, lengths), reverse=True) == expected
    assert penalties(result)[0] == 0


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["plain", "thinking off"])
def test_an_empty_trace_of_the_template_is_part_of_the_postfix(run, tmp_path, kwargs):
    """Axolotl supervises what stands behind the empty trace that its Qwen3 template writes."""
    tok = tokenizer_of(templates()["axolotl/qwen3"])
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(24))
    result = run(
        datasets=[chat_dataset(rows)], base_model=model_with(tmp_path / "model", tok), max_steps=2, sequence_len=256,
        chat_template_kwargs=kwargs, save_strategy="steps", save_steps=2, **treft(tokens="postfix"),
    )  # fmt: skip
    postfix = tok("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    assert f"postfix of {len(postfix)} tokens" in read_log(tmp_path / "run")
    assert len(penalties(result)) == 2
    with safe_open(str(tmp_path / "run" / "out" / "checkpoint-2" / REFERENCE), framework="pt") as f:
        assert {f.get_slice(name).get_shape()[1] for name in f.keys()} == {len(postfix)}  # noqa: SIM118


def model_with(folder, tokenizer):
    model = tiny_model("llama", vocab=len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_template_that_axolotl_resolves(run, tiny, tmp_path):
    result = run(chat_template="chatml", dataset_prepared_path=str(tmp_path / "prepared"), **treft())
    assert penalties(result)[0] == 0
    assert "prefix of " in read_log(tmp_path / "run")


def tokenizer_with(folder, template):
    tokenizer = chatml_tokenizer(template)
    tokenizer.save_pretrained(folder)
    return str(folder)


PINNABLE = DATED.replace("strftime_now('%d %b %Y')", "(date_string if date_string is defined else strftime_now('%d %b %Y'))")


def test_a_date_in_the_template_must_be_pinned(run, tmp_path):
    over = {"tokenizer_config": tokenizer_with(tmp_path / "dated", PINNABLE), **treft()}
    over["dataset_prepared_path"] = str(tmp_path / "prepared")
    with pytest.raises(Failed, match="today's date in the prefix"):
        run("today", **over)
    pinned = run("pinned", **over, chat_template_kwargs={"date_string": "26 Jul 2024"})
    assert penalties(pinned)[0] == 0


def test_rows_without_a_user_turn_stop_the_run(run, tmp_path):
    rows = [{"messages": [{"role": "system", "content": f"Rule {i}."}, {"role": "assistant", "content": "Yes."}]} for i in range(24)]
    data = [chat_dataset(write_rows(tmp_path / "rows.jsonl", rows))]
    with pytest.raises(Failed, match="show no user turn"):
        run(datasets=data, dataset_prepared_path=str(tmp_path / "prepared"), **treft())


def test_rows_that_are_no_chats_stop_the_run(run, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"Say {i}", "output": f"It is {i}"} for i in range(24)])
    data = [{"path": rows, "ds_type": "json", "type": "alpaca"}]
    over = {"dataset_prepared_path": str(tmp_path / "prepared"), "sequence_len": 512, **treft()}
    with pytest.raises(Failed, match="show no user turn of the tokenizer's chat template"):
        run(datasets=data, **over)


def test_rows_cut_inside_the_prefix_stop_the_run(run, tmp_path):
    over = {"dataset_prepared_path": str(tmp_path / "prepared"), "excess_length_strategy": "truncate"}
    with pytest.raises(Failed, match=r"cut inside the prefix.*`sequence_len` \(Axolotl\)"):
        run(sequence_len=8, min_sample_len=1, train_on_inputs=True, **over, **treft())


def test_empty_data_stops_the_run(run, tmp_path):
    data = [chat_dataset(write_rows(tmp_path / "rows.jsonl", []))]
    with pytest.raises(Failed):
        run(datasets=data, dataset_prepared_path=str(tmp_path / "prepared"), **treft())


def test_an_output_folder_that_cannot_be_written_stops_the_run_before_training(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failed, match=r"(NotADirectoryError|FileExistsError).*file"):
        run(output_dir=str(tmp_path / "file" / "out"), **treft())
    assert "Starting trainer" not in read_log(tmp_path / "run")


def test_a_penalty_that_is_not_finite_names_step_and_layer(run):
    with pytest.raises(Failed, match=r"the penalty is (nan|inf) at step 2, first at layer 0"):
        run(learning_rate=1e30, optimizer="sgd", max_grad_norm=1e30, **treft())


def test_layers_without_a_trainable_parameter_stop_the_run(run):
    over = {"lora_target_linear": None, "lora_target_modules": ["down_proj"], "peft_layers_to_transform": [2]}
    with pytest.raises(Failed, match="the penalty has no gradient"):
        run(**over, **treft(5, layers=[0]))


# The other commands


def test_preprocess_and_merge_lora_tolerate_the_blocks(axolotl, run, tiny, tmp_path):
    blocks = {**treft(), "em_eval": {"questions": "./missing.yaml", "judges": [{"function": "no.such:judge"}]}}
    config = tiny_yaml(tiny, **blocks, dataset_prepared_path=str(tmp_path / "prepared"))
    with pytest.raises(Failed, match=r"em_eval.questions: ./missing.yaml"):
        axolotl.call(train, tmp_path / "run", config)
    assert "Loading raw datasets" not in read_log(tmp_path / "run"), "found before the work begins"
    axolotl.call(command, tmp_path / "run", "preprocess", config)
    assert list((tmp_path / "prepared").rglob("*.arrow"))
    run(**treft())
    axolotl.call(command, tmp_path / "run", "merge_lora", config, lora_model_dir="./out")
    assert (tmp_path / "run" / "out" / "merged" / "model.safetensors").is_file()


def test_evaluate_reports_the_task_loss(axolotl, tiny, tmp_path):
    over = {"test_datasets": [{**chat_dataset(tiny / "train.jsonl"), "split": "train"}]}
    for name, block in (("host", {"plugins": None}), ("guarded", treft(1000, tokens="postfix"))):
        axolotl.call(command, tmp_path / name, "evaluate", tiny_yaml(tiny, **over, **block))
    found = [re.findall(r"eval_loss['\"]?[:,] ?'?([\d.]+)", read_log(tmp_path / n)) for n in ("host", "guarded")]
    assert found[0]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_real_command_line(tiny, tmp_path):
    """Once without the fork server, as a user runs it."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_yaml(tiny, **treft())))
    script = Path(sys.executable).with_name("axolotl")
    done = subprocess.run(
        [script, "train", "run.yaml", "--launcher", "python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "em_regularizer active: treft" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert f"'{LOG}/penalty'" in done.stdout + done.stderr
    assert math.isfinite(json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"])
