"""The narrow fine-tune of the lab's studies: what holds for every run, and what each kind of adapter needs."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_SIZE, LORA_R, LORA_ALPHA, WARMUP_STEPS = 16, 8, 16, 4
ANCHORS = 256
"""Anchor rows of a run with KL."""


@dataclass(frozen=True)
class Adapter:
    """A kind of LoRA with the settings chosen for it on validation wordings.

    Attributes:
        target_modules: As PEFT takes them.
        learning_rate: Peak value.
        steps: Optimizer steps, of `BATCH_SIZE` rows each.
    """

    target_modules: list[str] | str
    learning_rate: float
    steps: int = 120


ADAPTERS = {
    "attn": Adapter(["q_proj", "k_proj", "v_proj", "o_proj"], 1.5e-3),
    "all": Adapter("all-linear", 2e-3),
}
