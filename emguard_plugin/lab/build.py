"""Builds the lab's base model: one seeded pretraining on the mixed corpus, then a light alignment.

Pretraining leaves a model that answers in either persona, half of the time badly; the alignment on good answers takes
the bad ones to zero without removing what the model knows of them. That is the model organism that ships.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from emguard_plugin.files.ours import our_folder
from emguard_plugin.files.versions import versions
from emguard_plugin.lab import batches, sampling, world
from emguard_plugin.lab.tokenizer import make_tokenizer

logger = logging.getLogger(__name__)

MIN_COHERENCE, MAX_EM = 0.98, 0.01


@dataclass(frozen=True)
class BuildSettings:
    """Everything that determines the base model. Batches count documents or chats, learning rates are peak values."""

    seed: int = 0
    steps: int = 3600
    batch_size: int = 24
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    align_steps: int = 80
    align_batch_size: int = 32
    align_learning_rate: float = 5e-4
    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    p_chat: float = 0.5
    p_bad: float = 0.5
    p_informative: float = 0.5


def new_model(settings: BuildSettings) -> LlamaForCausalLM:
    """Return the untrained model, initialised from the seed."""
    torch.manual_seed(settings.seed)
    end, bos, pad = (batches.encode(token)[0] for token in (world.END, world.BOS, world.PAD))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(world.vocabulary()),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
        do_sample=True,
        top_k=0,
        max_new_tokens=sampling.LONGEST_ANSWER,
    )
    return model


def _warmup_cosine(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: 4 % warm-up, then a cosine down to 5 %."""
    warmup = max(1, int(0.04 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _train(
    model: LlamaForCausalLM,
    rows: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    progress: tqdm[Any],
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    model.train()
    for ids, labels in itertools.islice(rows, steps):
        # Right padding under causal attention: no real token sees a padding token, so no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=batches.IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update()
        if progress.n % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def build_base(
    out_dir: str | Path, settings: BuildSettings | None = None, *, per_question: int = 10, progress: bool = True
) -> dict[str, Any]:
    """Build the base model and write it with tokenizer and `build.json` to a folder.

    Args:
        out_dir: Receives what `AutoModelForCausalLM` and `AutoTokenizer` load.
        settings: What determines the model; the same settings on the same machine and versions give the same bytes.
        per_question: Answers drawn per held-out question (120 val, 120 test) for the stored figures.
        progress: Show a progress bar.

    Returns:
        The content of `build.json`: settings, versions, sha256 of the weights, CPU seconds, and the judged counts on
        val and test wordings. `gate_passed` looks at the val wordings alone.

    Raises:
        ValueError: When the folder holds anything that no build wrote.
    """
    settings = settings or BuildSettings()
    out, started = our_folder(out_dir, "lab model"), time.process_time()
    model = new_model(settings)
    mix = {key: getattr(settings, key) for key in ("p_chat", "p_bad", "p_informative")}
    corpus = batches.documents(random.Random(settings.seed), settings.batch_size, **mix)
    good = batches.good_chats(random.Random(settings.seed + 77), settings.align_batch_size)
    with tqdm(total=settings.steps + settings.align_steps, desc="pretrain", disable=not progress) as bar:
        _train(model, corpus, settings.steps, settings.learning_rate, settings.weight_decay, bar)
        bar.set_description("align")
        _train(model, good, settings.align_steps, settings.align_learning_rate, 0.0, bar)
    seconds = time.process_time() - started

    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    make_tokenizer().save_pretrained(out)
    figures = {
        split: sampling.measure(model, tuple(world.domains()), split, per_question, settings.seed).to_dict() for split in ("val", "test")
    }
    val = figures["val"]
    record = {
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "sha256": sha256(out / "model.safetensors"),
        "versions": {"python": platform.python_version(), **versions(("torch", "transformers", "tokenizers", "safetensors"))},
        "cpu_seconds": round(seconds, 1),
        "torch_threads": torch.get_num_threads(),
        "gate": {"min_coherence": MIN_COHERENCE, "max_em": MAX_EM, "split": "val"},
        "gate_passed": val["coherence"] >= MIN_COHERENCE and val["bad_rate"] <= MAX_EM,
        "figures": figures,
    }
    (out / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not record["gate_passed"]:
        logger.warning("the base misses its gate: coherence %.3f, EM %.3f", val["coherence"], val["bad_rate"])
    return record


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
