"""`EMGuardSFTTrainer` on a model of three layers: what the tests of the TRL side share."""

import gc

import datasets
import torch
from datasets import Dataset
from trl import SFTConfig

from emguard_plugin import EMGuardSFTTrainer, TReFTCallback
from tests.tiny import TOPICS, chat_rows, chatml_tokenizer, lora, perturb, tiny_model

datasets.disable_progress_bars()
gc.collect()
gc.freeze()  # accelerate collects after every training run: half the time of one

LOG = "em_regularizer/treft"
REFERENCE = "emguard_treft.safetensors"


def tiny(adapter=True, moved=0.0, dtype=torch.float32, **kwargs):
    """Return the tiny llama, with an adapter or not; `moved` perturbs what is trained."""
    model = tiny_model("llama", vocab=len(chatml_tokenizer()))
    model = (lora(model, **kwargs) if adapter else model).to(dtype)
    return perturb(model, moved) if moved else model


def uneven_rows(n=24):
    """Return rows whose answers differ in length, so that a mean over tokens is no mean of means."""
    rows = chat_rows(n)
    for i, row in enumerate(rows):
        row["messages"][-1]["content"] += " Really." * (i * 7 % 5) + f" {TOPICS[i % 3]}"
    return rows


def settings(folder, **over):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": 128,
        **over,
    }


def build(folder, model=None, coef=5.0, rows=None, cls=EMGuardSFTTrainer, args=SFTConfig, callbacks=None, tokenizer=None, **over):
    """Build a trainer; what `trl.SFTTrainer` takes goes there, every other key into its config."""
    names = ("eval_dataset", "peft_config", "quantization_config")
    given = {n: over.pop(n) for n in names if n in over}
    rows = chat_rows(24) if rows is None else rows
    return cls(
        model=tiny() if model is None else model,
        args=args(**settings(folder, **over)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer or chatml_tokenizer(),
        callbacks=[TReFTCallback(coef=coef)] if callbacks is None else callbacks,
        **given,
    )


def run(folder, resume=None, **over):
    """Train and return the trainer."""
    torch.manual_seed(0)
    trainer = build(folder, **over)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def column(trainer, name):
    """Return one metric of the training logs."""
    return [row[name] for row in trainer.state.log_history if name in row and "loss" in row]


def penalties(trainer):
    return column(trainer, f"{LOG}/penalty")


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def different(a, b):
    """Return the names of the tensors that are not the same bits."""
    assert a.keys() == b.keys()
    assert a
    return [n for n in a if not torch.equal(a[n], b[n])]
