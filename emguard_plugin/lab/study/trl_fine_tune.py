"""One narrow LoRA on a base of the lab, through the real TRL trainers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from emguard_plugin.lab.study.settings import BATCH_SIZE, LORA_ALPHA, LORA_R, WARMUP_STEPS, Adapter
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.training.trl_trainer import EMGuardSFTTrainer


@dataclass(frozen=True)
class FineTuned:
    """A run that has ended.

    Attributes:
        model: With its adapter, in eval mode.
        log: What the trainer logged every ten steps.
        cpu_s: CPU seconds of the training alone.
        wall_s: Seconds of the training alone.
    """

    model: nn.Module
    log: list[dict[str, Any]]
    cpu_s: float
    wall_s: float

    @property
    def task_loss(self) -> float:
        """The last task loss; without a regularizer the trainer's loss is that."""
        return self.log[-1].get("task_loss", self.log[-1]["loss"])


def fine_tune(
    base: Path,
    adapter: Adapter,
    rows: list[dict[str, Any]],
    seed: int,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    layers: list[int] | None = None,
) -> FineTuned:
    """Train one LoRA; without a regularizer among the callbacks by `trl.SFTTrainer` itself.

    Args:
        base: Folder of model and tokenizer.
        adapter: Where it sits, how fast and how long it learns.
        rows: Chats, such as `export.narrow_rows`.
        seed: Seeds the adapter and the order of the rows.
        output_dir: The trainer's; no checkpoint is written.
        callbacks: Regularizers, and what is to happen on the way.
        schedule: Of the learning rate, as transformers names it.
        weight_decay: Of AdamW.
        layers: 0-based, the decoder layers that get an adapter; default all.

    Returns:
        The model with its adapter, and what was logged and measured on the way.
    """
    args = SFTConfig(
        output_dir=str(output_dir), max_steps=adapter.steps, learning_rate=adapter.learning_rate, seed=seed,
        per_device_train_batch_size=BATCH_SIZE, lr_scheduler_type=schedule, warmup_steps=WARMUP_STEPS, weight_decay=weight_decay,
        assistant_only_loss=True, max_length=128, gradient_checkpointing=False, bf16=False, use_cpu=True,
        logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    guarded = any(isinstance(callback, EMRegularizerCallback) for callback in callbacks)
    # The LoRA is created in the trainer's __init__, before the trainer seeds anything.
    torch.manual_seed(seed)
    trainer = (EMGuardSFTTrainer if guarded else SFTTrainer)(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=adapter.target_modules, layers_to_transform=layers,
            task_type="CAUSAL_LM",
        ),
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    wall, cpu = time.time(), time.process_time()
    trainer.train()
    spent = {"cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.time() - wall, 2)}
    return FineTuned(trainer.model.eval(), [log for log in trainer.state.log_history if "loss" in log], **spent)
