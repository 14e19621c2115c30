"""The file that holds a signed set of latents: JSON to read, safetensors of the same stem with the encoder columns."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emguard_plugin.files.writing import moved_into_place, write_text
from emguard_plugin.latents.description import FORMAT, VERSION, Description, LatentsError, check_place, digest_of, read_description
from emguard_plugin.latents.encoder import SubsetEncoder
from emguard_plugin.models.adapters import peft_model
from emguard_plugin.reference.stored import tensors_hash

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
_SAMPLES = 64
_SAME_WITHIN = 2.0**-6
"""Relative distance of embeddings up to which two checkpoints are one: bf16 rounding is 2^-9 of each element."""


@dataclass
class LatentSet:
    """A signed set K of latents with all that training needs of their SAEs.

    Attributes:
        model: The base model that the latents were found on, as it was named.
        model_revision: Its commit, where known.
        width: Hidden size.
        encoders: One per layer, in order of layers.
        scores: One record per latent: at least `layer`, `id` and `sign`, and what discovery measured.
        provenance: How the set was found: SAEs, prompts, judge, settings.
        calibration: The unguarded misaligned model's own penalty on its narrow rows, as
            `{"penalty": {"assistant": x, "all": x, "prompt": x, "header": x, "prefix": x}, "task_loss_gap": g}`: x summed over
            K, per supervised token; g = loss(base) - loss(misaligned) on the same rows, in nats per token.
        shape: Sizes of the base model.
        fingerprint: A few of its input embeddings, which tell it from other models of its shape.
        digest: Hash of the whole file; set by `save` and `load`.
    """

    model: str
    width: int
    encoders: list[SubsetEncoder]
    scores: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    model_revision: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    fingerprint: list[float] = field(default_factory=list)
    digest: str | None = None

    def __post_init__(self) -> None:
        if not self.encoders:
            raise LatentsError("latents: the set K is empty, so there is nothing to hold.")
        layers = [e.layer for e in self.encoders]
        if layers != sorted(set(layers)):
            raise LatentsError(f"latents: one encoder per layer, in order of layers; got layers {layers}.")
        for e in self.encoders:
            if e.width != self.width:
                raise LatentsError(f"latents: layer {e.layer} has columns of width {e.width}, the model has {self.width}.")

    @classmethod
    def for_model(cls, model: nn.Module, encoders: list[SubsetEncoder], **about: Any) -> LatentSet:
        """Make a set for the base model of `model`, with what identifies it.

        Args:
            model: A causal LM; of a PEFT model, the base is meant.
            encoders: One per layer.
            about: `scores`, `provenance`, `calibration`.

        Returns:
            The set, which no file holds yet.
        """
        config = _base(model).config
        encoders = sorted(encoders, key=lambda e: e.layer)
        return cls(
            model=config._name_or_path or type(_base(model)).__name__,
            width=config.get_text_config().hidden_size,
            encoders=encoders,
            model_revision=getattr(config, "_commit_hash", None),
            shape=_shape(model),
            fingerprint=_fingerprint(model),
            **about,
        )

    @property
    def layers(self) -> list[int]:
        """0-based decoder layers with latents."""
        return [e.layer for e in self.encoders]

    @property
    def signs(self) -> Counter[int]:
        """How many latents rise (1) and fall (-1) with misalignment."""
        return Counter(int(sign) for e in self.encoders for sign in e.signs.tolist())

    def __len__(self) -> int:
        return sum(len(e.ids) for e in self.encoders)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the latents were not found on.

        Raises:
            LatentsError: for another width, layer count, shape, or other weights.
        """
        found = _shape(model)
        if found["hidden_size"] != self.width:
            raise LatentsError(
                f"the latents are of width {self.width} ({self.model}), the model's hidden size is {found['hidden_size']}. Use a "
                "latent set found on this base model."
            )
        if max(self.layers) >= found["num_hidden_layers"]:
            raise LatentsError(
                f"the latents sit at layer {max(self.layers)}, the model has layers 0 to {found['num_hidden_layers'] - 1}. Use a "
                "latent set found on this base model."
            )
        other = {k: (v, found.get(k)) for k, v in self.shape.items() if found.get(k) != v}
        if other:
            what = ", ".join(f"{k} {was} there, {now} here" for k, (was, now) in other.items())
            raise LatentsError(f"the latents were found on {self.model}, another model than this one ({what}).")
        here = _fingerprint(model)
        if self.fingerprint and here:
            there, here = torch.tensor(self.fingerprint), torch.tensor(here)
            distance = float((there - here).norm() / there.norm().clamp_min(1e-12))
            if distance > _SAME_WITHIN:
                raise LatentsError(
                    f"the latents were found on {self.model}, whose embeddings differ from this model's by {distance:.1%}: it is "
                    "another checkpoint of the same shape. Use a latent set found on this base model."
                )

    def save(self, path: str | Path) -> Path:
        """Write `path` (JSON) and the safetensors beside it.

        Returns:
            The path of the JSON.

        Raises:
            ValueError: as `check_place`.
        """
        path = check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"layers.{e.layer}.{name}": t.detach().cpu().contiguous() for e in self.encoders for name, t in e.tensors().items()}
        columns = path.with_suffix(".safetensors")
        with moved_into_place(columns) as part:
            save_file(tensors, str(part))
        stated = {
            "format": FORMAT, "version": VERSION, "model": self.model, "model_revision": self.model_revision,
            "width": self.width, "shape": self.shape, "layers": [e.settings() for e in self.encoders], "scores": self.scores,
            "provenance": self.provenance, "calibration": self.calibration, "fingerprint": self.fingerprint,
            "columns": {"file": columns.name, "sha256": tensors_hash(tensors)},
        }  # fmt: skip
        stated = json.loads(json.dumps(stated))  # the hash must see what a reader will
        self.digest = digest_of(stated)
        write_text(path, json.dumps({**stated, "sha256": self.digest}, indent=1) + "\n")
        columns.chmod(path.stat().st_mode)  # safetensors writes for the owner alone
        return path

    @classmethod
    def load(cls, path: str | Path) -> LatentSet:
        """Read a latent set. Needs no sae-lens.

        Returns:
            The set, with the hash of its file in `digest`.

        Raises:
            LatentsError: when a file is missing, unreadable, changed, or something else.
        """
        about = read_description(path)
        try:
            return cls._put_together(about)
        except LatentsError:
            raise
        except (KeyError, TypeError, ValueError) as exc:
            raise LatentsError(f"{path} holds no latent set that can be used: {exc}") from None

    @classmethod
    def _put_together(cls, about: Description) -> LatentSet:
        tensors, stated = load_file(str(about.columns)), about.stated
        encoders = []
        for settings in stated["layers"]:
            start = f"layers.{settings['layer']}."
            own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            encoders.append(SubsetEncoder.from_parts(settings, own))
        return cls(
            encoders=encoders, digest=about.digest, model=stated["model"], model_revision=stated["model_revision"], width=stated["width"],
            shape=stated["shape"], scores=stated["scores"], provenance=stated["provenance"], calibration=stated["calibration"],
            fingerprint=stated["fingerprint"],
        )  # fmt: skip


def _base(model: nn.Module) -> nn.Module:
    peft = peft_model(model)
    return model if peft is None else peft.get_base_model()


def _shape(model: nn.Module) -> dict[str, Any]:
    config = _base(model).config.get_text_config()
    return {k: getattr(config, k, None) for k in _SHAPE}


def _fingerprint(model: nn.Module) -> list[float]:
    """Return 64 spread elements of the input embeddings; none where another process holds them."""
    embed = _base(model).get_input_embeddings()
    embed = getattr(embed, "original_module", embed)  # `modules_to_save`
    weight = getattr(embed, "base_layer", embed).weight  # LoRA on embeddings
    if hasattr(weight, "ds_id"):  # ZeRO-3 leaves an empty tensor between uses
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            weight = weight.detach().clone()
    if weight.is_meta or weight.ndim != 2 or not weight.numel():
        return []
    # Rows of low ids, which resizing keeps and every tokenizer trains.
    rows = (torch.arange(_SAMPLES, device=weight.device) * 4) % min(weight.shape[0], 4 * _SAMPLES)
    columns = torch.linspace(0, weight.shape[1] - 1, _SAMPLES).long().to(weight.device)
    values = weight.detach()[rows, columns]
    if not values.is_floating_point():
        return []
    return [float(v) for v in values.float().cpu()]
