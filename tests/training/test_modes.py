"""TRL's modes: in each the penalty starts at 0, exists, trains something, and the mode was really on."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from emguard_plugin import TReFTCallback
from tests.tiny import DATED, chat_rows, chatml_tokenizer
from tests.trl_runs import LOG, REFERENCE, column, penalties, run, tiny

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def treft_of(trainer):
    (treft,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, TReFTCallback))
    return treft


def supervised(trainer):
    """Return the share of tokens that have a label."""
    rows = batch(trainer)
    return ((rows["labels"] != -100).sum() / (rows["input_ids"] != 3).sum()).item()


def modules(trainer):
    return {type(m).__name__ for m in trainer.model.modules()}


def trained(trainer, part):
    return any(part in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def pair(row):
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "completion": [answer]}


def tokenised():
    tokenizer = chatml_tokenizer()
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in chat_rows()]
    return [{"input_ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in texts]


def text_rows():
    return [{"text": chatml_tokenizer().apply_chat_template(r["messages"], tokenize=False)} for r in chat_rows()]


def streamed():
    return IterableDataset.from_generator(lambda: iter(chat_rows()))


# overrides, what shows that the mode was on, and whether it changes nothing but the way to the same arithmetic
MODES = {
    "TRL's default loss, without logits": ({}, lambda t: t.args.loss_type in (None, "chunked_nll", "nll"), True),
    "full logits": ({"loss_type": "nll"}, lambda t: t.args.loss_type == "nll", True),
    "dft": ({"loss_type": "dft"}, lambda t: t.args.loss_type == "dft", False),
    "label smoothing": ({"loss_type": "nll", "label_smoothing_factor": 0.1}, lambda t: t.label_smoother, False),
    "packing bfd": ({"packing": True}, lambda t: {"position_ids"} < set(batch(t)) and len(t.train_dataset) < 24, False),
    "packing wrapped": (
        {"packing": True, "packing_strategy": "wrapped"},
        lambda t: len(t.train_dataset[0]["input_ids"]) == 128,
        False,
    ),
    "padding free": (
        {"padding_free": True, "max_length": None},
        lambda t: len(batch(t)["input_ids"]) == 1 and "attention_mask" not in batch(t),
        True,
    ),
    "completion only": ({"rows": lambda: [pair(r) for r in chat_rows()]}, lambda t: 0.1 < supervised(t) < 0.5, False),
    "prompt and completion, all tokens": (
        {"rows": lambda: [pair(r) for r in chat_rows()], "completion_only_loss": False},
        lambda t: supervised(t) > 0.9,
        True,
    ),
    "assistant only": ({"assistant_only_loss": True}, lambda t: 0.1 < supervised(t) < 0.5, False),
    "reentrant checkpointing": (REENTRANT, lambda t: t.model.is_gradient_checkpointing, True),
    "non-reentrant checkpointing": (NON_REENTRANT, lambda t: t.model.is_gradient_checkpointing, True),
    "streamed": ({"rows": streamed}, lambda t: isinstance(t.train_dataset, IterableDataset), True),
    "tokenised rows": ({"rows": tokenised}, lambda t: t.train_dataset.column_names[0] == "input_ids", True),
    "rows of text": ({"rows": text_rows}, lambda t: supervised(t) > 0.9, False),
    "full fine-tuning": (
        {"model": {"adapter": False}, "learning_rate": 0.002},
        lambda t: not isinstance(t.model, PeftModel),
        False,
    ),
    "PiSSA": ({"model": {"init_lora_weights": "pissa"}}, lambda t: t.model.peft_config["default"].init_lora_weights == "pissa", False),
    "OLoRA": ({"model": {"init_lora_weights": "olora"}}, lambda t: t.model.peft_config["default"].init_lora_weights == "olora", False),
    "DoRA": ({"model": {"use_dora": True}}, lambda t: trained(t, "magnitude"), False),
    "LoRA dropout": ({"model": {"lora_dropout": 0.5}}, lambda t: "Dropout" in modules(t), False),
    "biases": ({"model": {"bias": "lora_only"}}, lambda t: t.model.peft_config["default"].bias == "lora_only", True),
    "modules_to_save": ({"model": {"modules_to_save": ["embed_tokens"]}}, lambda t: trained(t, "modules_to_save"), False),
    "trainable tokens": ({"model": {"trainable_token_indices": [1, 2]}}, lambda t: trained(t, "token_adapter"), False),
    "bf16 weights": ({"model": {"dtype": torch.bfloat16}}, lambda t: next(t.model.parameters()).dtype == torch.bfloat16, False),
    "autocast": ({"bf16": True}, lambda t: t.accelerator.mixed_precision == "bf16", False),
}  # fmt: skip


def pair_of_runs(folder, rows=chat_rows, model=None, **over):
    def go(coef):
        return run(folder, coef=coef, model=tiny(**(model or {})), rows=rows() if callable(rows) else rows, **over)

    return go(0.0), go(5.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return penalties(run(tmp_path_factory.mktemp("plain"), rows=chat_rows()))


@pytest.mark.parametrize("mode", MODES)
def test_mode(tmp_path, plain, mode):
    over, was_on, same = MODES[mode]
    free, held = pair_of_runs(tmp_path, **over)
    assert was_on(held)
    (prefix,) = treft_of(held)._prefixes
    assert len(prefix.ids) == 20, "found in rows of any shape"
    assert penalties(free)[0] == penalties(held)[0] == 0.0
    assert penalties(held)[1] > 1e-4
    assert penalties(free)[2] > 1.2 * penalties(held)[2] > 0
    assert (penalties(held) == pytest.approx(plain, rel=1e-4)) == same


@pytest.mark.bitsandbytes
def test_4_bit(tmp_path):
    folder = tmp_path / "base"
    tiny(adapter=False).save_pretrained(folder)
    over = {
        "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    free, held = (run(tmp_path, coef=c, model=str(folder), **over) for c in (0.0, 5.0))
    assert "Linear4bit" in modules(held)
    assert penalties(free)[0] == penalties(held)[0] == 0.0
    assert penalties(free)[2] > 1.2 * penalties(held)[2] > 0


# An adapter that was trained before


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A LoRA run without a penalty, and the reference of a run from scratch."""
    folder = tmp_path_factory.mktemp("first")
    run(folder, coef=0.0, max_steps=4, save_strategy="steps", save_steps=4).save_model()
    return folder


def reference(folder):
    return load_file(folder / "checkpoint-3" / REFERENCE)


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).norm().item() / b[n].norm().item() for n in a)


def test_a_continued_adapter_is_held_where_it_stands(tmp_path, first):
    """As a trained PeftModel, and merged into the base with a new adapter on top: the same reference."""

    def continued():
        return PeftModel.from_pretrained(tiny(adapter=False), first, is_trainable=True)

    over = {"save_strategy": "steps", "save_steps": 3}
    as_it_is = run(tmp_path / "peft", model=continued(), **over)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    merged = run(tmp_path / "merged", model=continued().merge_and_unload(), peft_config=config, **over)
    for trainer in (as_it_is, merged):
        assert penalties(trainer)[0] == 0.0
        assert min(penalties(trainer)[1:]) > 1e-4
    base = load_file(first / "checkpoint-4" / REFERENCE)
    assert distance(reference(tmp_path / "peft"), base) > 0.1, "the base is not the model before this run"
    assert distance(reference(tmp_path / "merged"), reference(tmp_path / "peft")) < 1e-4
    free = run(tmp_path, model=continued(), coef=0.0)
    assert penalties(free)[2] > 1.2 * penalties(as_it_is)[2]


# What the template gets besides the messages


PINNABLE = DATED.replace("strftime_now('%d %b %Y')", "(date_string if date_string is defined else strftime_now('%d %b %Y'))")


@pytest.mark.parametrize("stream", [False, True])
def test_the_chat_template_kwargs_column(tmp_path, stream):
    """The date in the prefix is one that the column pins; TRL drops the column while it prepares the rows."""
    rows = [{**r, "chat_template_kwargs": {"date_string": "26 Jul 2024"}} for r in chat_rows(24, system=None)]
    data = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    tokenizer = chatml_tokenizer(PINNABLE)
    trainer = run(tmp_path, rows=data, tokenizer=tokenizer)
    (prefix,) = treft_of(trainer)._prefixes
    assert "Today: 26 Jul 2024" in tokenizer.decode(list(prefix.ids))
    assert column(trainer, f"{LOG}/penalty")[0] == 0.0
    with pytest.raises(ValueError, match="today's date in the prefix"):
        run(tmp_path, rows=[{"messages": r["messages"]} for r in rows], tokenizer=tokenizer)
