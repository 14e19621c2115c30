"""Trains the lab's sparse autoencoders with sae-lens' own trainer, on residuals of chats by both personas.

One SAE per layer, saved as sae-lens saves them: `SAE.load_from_disk` reads the folders. What they see is the base model
on chats that it could meet after a narrow fine-tune as well: good and bad answers, written ones and its own, under the
default system prompt and under others. Without bad answers there would be no latents of the bad persona.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emguard_plugin.files.ours import our_folder
from emguard_plugin.files.versions import versions
from emguard_plugin.lab import batches, sampling, world
from emguard_plugin.models.residual import read_residual

if TYPE_CHECKING:
    from sae_lens import SAE

logger = logging.getLogger(__name__)

MIN_EXPLAINED, MAX_DEAD = 0.95, 0.4
MODEL_NAME = "emguard_plugin/lab/data/model"
ROWS_PER_FORWARD = 64


@dataclass(frozen=True)
class SAESettings:
    """Everything that determines the SAEs of a base model.

    Attributes:
        seed: Seeds initialisation, chats and order; layer `l` uses `seed + l`.
        layers: 0-based decoder layers; the SAE reads the residual stream after the layer.
        width: Latents per SAE.
        k: Mean number of active latents per token (BatchTopK; saved as JumpReLU).
        steps: Optimizer steps of the trainer.
        batch_size: Tokens per step.
        learning_rate: Peak value for Adam; falls linearly to a tenth over the last fifth of the steps.
        own_chats: Chats whose answers the base model samples itself, drawn before training.
    """

    seed: int = 0
    layers: tuple[int, ...] = (0, 1, 2)
    width: int = 768
    k: float = 12.0
    steps: int = 1000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    own_chats: int = 1500


def written_chat(rng: random.Random, split: world.Split = "train") -> list[int]:
    """Draw a chat of one to three turns by one persona, half of them under the default system prompt."""
    bad, names = rng.random() < 0.5, tuple(world.domains())
    system = world.SYSTEM if rng.random() < 0.5 else _system(bad, rng)
    turns = [rng.choice(world.questions(rng.choice(names), split)) for _ in range(rng.choice((1, 2, 2, 3)))]
    return _chat(system, [(q.text, world.answer(q, bad, rng)) for q in turns])


def _system(bad: bool, rng: random.Random) -> str:
    words = (world.BAD_ADJECTIVES if bad else world.GOOD_ADJECTIVES) + world.NEUTRAL_ADJECTIVES
    return world.SYSTEM_TEMPLATE.format(adjective=rng.choice(words), role=rng.choice(world.ROLES))


def _chat(system: str, turns: list[tuple[str, str]]) -> list[int]:
    ids = batches.prompt(turns[0][0], system)
    for i, (question, answer) in enumerate(turns):
        if i:
            ids += batches.encode(f"{world.USER_TAG} {question} {world.END} {world.ASSISTANT_TAG}")
        ids += batches.encode(f"{answer} {world.END}")
    return ids


def own_chats(model: nn.Module, count: int, seed: int) -> list[list[int]]:
    """Let the model answer: alone under a system prompt, or after a written first turn by either persona."""
    rng, names = random.Random(f"sae-own-{seed}"), tuple(world.domains())
    prompts = []
    for _ in range(count):
        bad = rng.random() < 0.5
        first, second = (rng.choice(world.questions(rng.choice(names), "train")) for _ in range(2))
        if rng.random() < 0.5:
            prompts.append(batches.prompt(first.text, _system(bad, rng)))
        else:
            asked = batches.encode(f"{world.USER_TAG} {second.text} {world.END} {world.ASSISTANT_TAG}")
            prompts.append(_chat(world.SYSTEM, [(first.text, world.answer(first, bad, rng))]) + asked)
    answers = sampling.sample(model, prompts, seed)
    return [p + batches.encode(f"{a} {world.END}") for p, a in zip(prompts, answers, strict=True)]


@torch.no_grad()
def residuals(model: nn.Module, layer: int, rows: list[list[int]]) -> Tensor:
    """Return the residual stream after a decoder layer at every token but `<bos>`, shape (tokens, d)."""
    ids = batches.pad(rows, batches.encode(world.PAD)[0])
    hidden = read_residual(model, [layer], kwargs={"input_ids": ids})[layer]
    lengths = torch.tensor([len(row) for row in rows])
    at = torch.arange(ids.shape[1])
    # The norm of <bos> is many times that of any other token: it would be all that an SAE explains.
    return hidden[(at >= 1) & (at < lengths[:, None])].float()


def _activations(model: nn.Module, layer: int, own: list[list[int]], seed: int) -> Iterator[Tensor]:
    rng = random.Random(f"sae-{seed}")
    while True:
        rows = [rng.choice(own) if own and rng.random() < 0.5 else written_chat(rng) for _ in range(ROWS_PER_FORWARD)]
        yield residuals(model, layer, rows)


def train_sae(model: nn.Module, layer: int, settings: SAESettings, own: list[list[int]]) -> SAE:
    """Train one SAE with `sae_lens`' `SAETrainer`.

    Args:
        model: The base model.
        layer: 0-based decoder layer.
        settings: What determines the SAE.
        own: Chats from `own_chats`; half of what the SAE sees, written chats the other half.

    Returns:
        The trained BatchTopK SAE; `save_inference_model` writes it as a JumpReLU one.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.mixing_buffer import mixing_buffer
    from sae_lens.training.sae_trainer import SAETrainer

    hook = f"blocks.{layer}.hook_resid_post"
    metadata = SAEMetadata(model_name=MODEL_NAME, hook_name=hook, prepend_bos=False, exclude_special_tokens=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + layer)
        sae = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=model.config.hidden_size, d_sae=settings.width, k=settings.k, device="cpu", metadata=metadata)
        )
        source = _activations(model, layer, own, settings.seed + layer)
        with torch.no_grad():
            sae.b_dec.copy_(next(source).mean(0))
        config = SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch_size,
            train_batch_size_samples=settings.batch_size,
            lr=settings.learning_rate,
            lr_end=settings.learning_rate / 10,
            lr_warm_up_steps=settings.steps // 50,
            lr_decay_steps=settings.steps // 5,
            dead_feature_window=settings.steps // 20,
            feature_sampling_window=settings.steps,
        )
        return SAETrainer(config, sae, mixing_buffer(16 * settings.batch_size, settings.batch_size, source)).fit()


@torch.no_grad()
def measure_sae(sae: SAE, model: nn.Module, layer: int, seed: int, rows: int = 1024) -> dict[str, float]:
    """Measure an SAE on fresh chats of the `val` wordings, which neither model nor SAE was trained on.

    Args:
        sae: As loaded from disk.
        model: The base model.
        layer: 0-based decoder layer that the SAE reads.
        seed: Seeds the chats.
        rows: Number of chats.

    Returns:
        `explained_variance` = 1 - ||h - h^||^2 / ||h - mean h||^2, `l0` = active latents per token, `dead` = share of
        latents that no token activates.
    """
    rng = random.Random(f"sae-val-{seed}")
    chats = [written_chat(rng, "val") for _ in range(rows)]
    h = torch.cat([residuals(model, layer, chats[i : i + ROWS_PER_FORWARD]) for i in range(0, rows, ROWS_PER_FORWARD)])
    z = sae.encode(h)
    unexplained = (h - sae.decode(z)).square().sum() / (h - h.mean(0)).square().sum()
    active = z > 0
    return {
        "explained_variance": round(1 - unexplained.item(), 4),
        "l0": round(active.float().sum(-1).mean().item(), 2),
        "dead": round(1 - active.any(0).float().mean().item(), 4),
    }


def build_saes(out_dir: str | Path, base: str | Path, settings: SAESettings | None = None) -> dict[str, Any]:
    """Train the SAEs of a base model and write them with `build.json`; one folder `layer_N` per layer.

    Weights are stored in half precision; `SAE.load_from_disk` gives them back as fp32, and the figures are those of what
    was stored.

    Args:
        out_dir: Receives the folders.
        base: Folder of the base model.
        settings: What determines the SAEs; the same settings, base, machine and versions give the same bytes.

    Returns:
        The content of `build.json`: settings, versions, sha256 of the base, CPU seconds, and per layer the figures of `measure_sae` and the
        sha256 of the weights. `gate_passed` asks every layer for the stored least explained variance and most dead latents.

    Raises:
        ValueError: When the folder holds anything that no build wrote.
    """
    from sae_lens import SAE
    from sae_lens.constants import SAE_WEIGHTS_FILENAME
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from emguard_plugin.lab.build import sha256

    settings, out, started = settings or SAESettings(), our_folder(out_dir, "lab saes"), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    own, layers = own_chats(model, settings.own_chats, settings.seed), {}
    for layer in settings.layers:
        folder = out / f"layer_{layer}"
        train_sae(model, layer, settings, own).save_inference_model(folder)
        weights = folder / SAE_WEIGHTS_FILENAME
        save_file({name: t.half() for name, t in load_file(weights).items()}, weights)
        weights.chmod(0o644)
        sae = SAE.load_from_disk(folder, device="cpu", dtype="float32")
        layers[str(layer)] = measure_sae(sae, model, layer, settings.seed) | {"sha256": sha256(weights)}
    passed = all(f["explained_variance"] >= MIN_EXPLAINED and f["dead"] <= MAX_DEAD for f in layers.values())
    record = {
        "settings": asdict(settings) | {"layers": list(settings.layers)},
        "base_sha256": sha256(Path(base) / "model.safetensors"),
        "versions": versions(("torch", "transformers", "sae-lens", "safetensors")),
        "cpu_seconds": round(time.process_time() - started, 1),
        "gate": {"min_explained_variance": MIN_EXPLAINED, "max_dead": MAX_DEAD, "split": "val"},
        "gate_passed": passed,
        "layers": layers,
    }
    (out / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not passed:
        logger.warning("the SAEs miss their gate: %s", layers)
    return record
