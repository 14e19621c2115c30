"""A tiny model, its data and the YAML that trains on them, as files."""

import json
from pathlib import Path

from tests.tiny import chat_rows, chatml_tokenizer, tiny_model

PLUGIN = "emguard_plugin.EMGuardPlugin"


def treft(coef=5.0, **more):
    return {"em_regularizer": {"treft": {"coef": coef, **more}}}


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def write_tiny(folder):
    folder = Path(folder)
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = tiny_model("llama", vocab=len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", chat_rows(24, system=None))
    return folder


def tiny_yaml(folder, **over):
    """Return a config that trains on `write_tiny`'s files; a value of None removes a key."""
    folder = Path(folder)
    config = {
        "base_model": str(folder / "model"),
        "tokenizer_type": "AutoTokenizer",
        "datasets": [chat_dataset(folder / "train.jsonl")],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": "./out",
        "sequence_len": 128,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False),
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        **dict.fromkeys(("bf16", "fp16", "tf32", "gradient_checkpointing", "dataloader_pin_memory"), False),
        "attn_implementation": "sdpa",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "seed": 42,
        "plugins": [PLUGIN],
    }
    return {k: v for k, v in {**config, **over}.items() if v is not None}


def chat_dataset(path):
    return {
        "path": str(path),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }


def column(result, name):
    """Return one metric of a run's training logs, by step."""
    return [row[name] for row in result["log"] if name in row and "loss" in row]


def penalties(result):
    return column(result, "em_regularizer/treft/penalty")
