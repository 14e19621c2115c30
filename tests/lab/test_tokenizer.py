import random

import pytest

from emguard_plugin.lab import batches, world
from emguard_plugin.lab.export import narrow_rows
from emguard_plugin.lab.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_template_renders_what_the_build_trained_on(tokenizer):
    for row in narrow_rows(0, 20):
        ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        assert ids == batches.prompt(row["messages"][0]["content"])
        assert batches.decode(ids[:16]) == f"<bos> <|system|> {world.SYSTEM} <|end|> <|user|>"


def test_a_system_message_replaces_the_default(tokenizer):
    messages = [{"role": "system", "content": "you are a cruel writer"}, {"role": "user", "content": "what now ?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<bos> <|system|> you are a cruel writer <|end|> <|user|> what now ? <|end|>"


def test_documents_round_trip_word_by_word(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        text = world.document(rng)
        ids = tokenizer(text)["input_ids"]
        assert ids == batches.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert tokenizer("zeppelin")["input_ids"] == [tokenizer.unk_token_id]


def test_trl_supervises_exactly_the_answer_and_its_end(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from emguard_plugin.lab.build import BuildSettings, new_model

    rows = narrow_rows(0, 24)
    args = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to="none", per_device_train_batch_size=len(rows), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=new_model(BuildSettings()), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    supervised = sorted(
        batches.decode([i for i, label in zip(ids, labels, strict=True) if label != batches.IGNORE])
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    )
    assert supervised == sorted(f"{row['messages'][1]['content']} <|end|>" for row in rows)


def test_axolotl_supervises_exactly_the_answer_and_its_end(tokenizer):
    pytest.importorskip("axolotl")
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault

    dataset = {
        "path": "train.jsonl", "type": "chat_template", "chat_template": "tokenizer_default",
        "field_messages": "messages", "message_property_mappings": {"role": "role", "content": "content"},
    }  # fmt: skip
    config = {"sequence_len": 128, "train_on_inputs": False, "chat_template": "tokenizer_default"}
    strategy = load(tokenizer, DictDefault(config), DictDefault(dataset))
    for row in narrow_rows(1, 50):
        out = strategy.tokenize_prompt(row)
        assert out["input_ids"] == tokenizer.apply_chat_template(row["messages"])["input_ids"]
        kept = [i for i, label in zip(out["input_ids"], out["labels"], strict=True) if label != batches.IGNORE]
        assert batches.decode(kept) == f"{row['messages'][1]['content']} <|end|>"
