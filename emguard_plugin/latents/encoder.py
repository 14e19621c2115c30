"""The columns of an SAE's encoder that belong to a few latents: 320 KiB instead of 1 GiB for 20 of 65,536 latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["relu_pre", "sae"]
MODES: tuple[Mode, ...] = ("relu_pre", "sae")
NORMS = ("none", "layer_norm", "constant_norm_rescale")
TOPK = ("topk", "abstopk")
ARCHITECTURES = ("standard", "jumprelu", "gated", *TOPK)
CUT_CHUNK = 4096
"""Latents per matrix product of the pass that finds a top-k cut."""

_TENSORS = ("weight", "bias", "directions", "threshold", "gate_weight", "gate_bias", "cut_weight", "cut_bias")


@dataclass
class SubsetEncoder:
    """The encoder of the latents `ids` of one SAE, in fp32, whatever the model computes in.

    With a = the residual stream after block `layer`, normalised as the SAE does it, and p_k = a . weight[k] + bias[k]:

    `relu_pre`: z_k = ReLU(p_k), for every kind of SAE; the choice of BLOCK-EM's authors (arXiv 2602.00767).
    `sae`: the SAE's own activation. standard: ReLU(p_k). jumprelu: ReLU(p_k) where p_k > threshold_k. gated: ReLU(p_k) where
    the gate is open. topk: ReLU(p_k) where p_k is among the k largest of all latents; abstopk: p_k where |p_k| is. Which
    latents are on carries no gradient, in the SAE as here.

    Attributes:
        layer: 0-based decoder layer whose output is encoded.
        ids: Indices into the SAE's latents.
        signs: (K,) +1 for latents that rise with misalignment, -1 for those that fall.
        architecture: sae-lens' name for the SAE's kind.
        mode: `relu_pre` or `sae`.
        weight: (K, d) rows of the encoder.
        bias: (K,), with the decoder bias folded in: `b_enc - b_dec . W_enc`, computed in float64.
        directions: (K, d) unit decoder directions.
        norm: What the SAE does to its input at run time.
        threshold: (K,), jumprelu alone.
        gate_weight: (K, d), gated alone.
        gate_bias: (K,), gated alone.
        cut_weight: (all latents, d), for a top-k cut alone: mode `sae` of topk and abstopk.
        cut_bias: (all latents,), as `cut_weight`.
        k: Latents that are on per token, for a top-k cut.

    Raises:
        ValueError: for an empty set, shapes that do not fit, or an unknown mode, architecture or norm.
    """

    layer: int
    ids: list[int]
    signs: Tensor
    architecture: str
    mode: Mode
    weight: Tensor
    bias: Tensor
    directions: Tensor
    norm: str = "none"
    threshold: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    cut_weight: Tensor | None = None
    cut_bias: Tensor | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        known = {"mode": MODES, "norm": NORMS, "architecture": ARCHITECTURES}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"latents: {name} {getattr(self, name)!r} is none of {', '.join(allowed)}.")
        count = len(self.ids)
        if not count:
            raise ValueError("latents: the set K is empty, so there is nothing to hold.")
        if len(set(self.ids)) < count:
            raise ValueError(f"latents: layer {self.layer} lists a latent twice. Keep each id once.")
        self.signs = torch.as_tensor(self.signs).float()
        if self.signs.shape != (count,) or not bool((self.signs.abs() == 1).all()):
            raise ValueError(f"latents: {count} latents need {count} signs of +1 or -1, got {self.signs.tolist()}.")
        if self.weight.shape[0] != count or self.bias.shape != (count,) or self.directions.shape != self.weight.shape:
            raise ValueError(
                f"latents: {count} ids, but encoder columns {tuple(self.weight.shape)}, biases {tuple(self.bias.shape)} and "
                f"directions {tuple(self.directions.shape)}."
            )
        needed = []
        if self.mode == "sae":
            needed = {"jumprelu": ["threshold"], "gated": ["gate_weight", "gate_bias"]}.get(self.architecture, [])
            needed = ["cut_weight", "cut_bias", "k"] if self.architecture in TOPK else needed
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"latents: mode `sae` of a {self.architecture} SAE needs {', '.join(missing)}.")

    @property
    def width(self) -> int:
        """The hidden size that the encoder reads."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the columns are."""
        return self.weight.device

    def to(self, device: torch.device | str) -> SubsetEncoder:
        """Move the columns, in place, and return the encoder."""
        for name in ("signs", *_TENSORS):
            if (t := getattr(self, name)) is not None:
                setattr(self, name, t.to(device))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without those that this kind of SAE lacks."""
        return {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}

    def settings(self) -> dict[str, object]:
        """Return everything else, as JSON has it."""
        signs = [int(s) for s in self.signs.tolist()]
        return {
            "layer": self.layer, "ids": list(self.ids), "signs": signs, "architecture": self.architecture, "mode": self.mode,
            "norm": self.norm, "k": self.k,
        }  # fmt: skip

    @classmethod
    def from_parts(cls, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> SubsetEncoder:
        """Put together what `settings` and `tensors` returned."""
        return cls(**{**settings, "signs": torch.tensor(settings["signs"], dtype=torch.float32)}, **tensors)

    def pre(self, h: Tensor) -> Tensor:
        """Return the pre-activations p_k.

        Args:
            h: (..., d) residual stream, any float dtype.

        Returns:
            (..., K), fp32.

        Raises:
            ValueError: when `h` has another width.
        """
        with torch.autocast(h.device.type, enabled=False):
            return self._input(h) @ self.weight.T + self.bias

    def encode(self, h: Tensor) -> Tensor:
        """Return the activations z_k; see the class.

        Args:
            h: As for `pre`.

        Returns:
            (..., K), fp32.
        """
        with torch.autocast(h.device.type, enabled=False):
            a = self._input(h)
            return self._activate(a @ self.weight.T + self.bias, a)

    def both(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return (activations, pre-activations), each (..., K), fp32."""
        with torch.autocast(h.device.type, enabled=False):
            a = self._input(h)
            p = a @ self.weight.T + self.bias
            return self._activate(p, a), p

    def _input(self, h: Tensor) -> Tensor:
        if h.shape[-1] != self.width:
            raise ValueError(f"the latents read a width of {self.width}, the hidden states have {h.shape[-1]}.")
        if self.device != h.device:
            self.to(h.device)
        return normalized(h.float(), self.norm)

    def _activate(self, p: Tensor, a: Tensor) -> Tensor:
        if self.mode == "relu_pre" or self.architecture == "standard":
            return p.relu()
        if self.architecture == "jumprelu":
            return p.relu() * (p > self.threshold)
        if self.architecture == "gated":
            assert self.gate_weight is not None
            return p.relu() * (a @ self.gate_weight.T + self.gate_bias > 0)
        return (p if self.architecture == "abstopk" else p.relu()) * self._selected(a)

    @torch.no_grad()
    def _selected(self, a: Tensor) -> Tensor:
        """Return (..., K): whether the latent is among the k largest at its token. Exact up to ties at the cut."""
        assert self.cut_weight is not None
        assert self.cut_bias is not None
        assert self.k is not None
        a, ids = a.detach(), torch.tensor(self.ids, device=a.device)
        ours, largest = a.new_empty(*a.shape[:-1], len(self.ids)), a.new_empty(*a.shape[:-1], 0)
        for start in range(0, len(self.cut_weight), CUT_CHUNK):
            weight = self.cut_weight[start : start + CUT_CHUNK].float()
            size = a @ weight.T + self.cut_bias[start : start + CUT_CHUNK].float()
            size = size.abs() if self.architecture == "abstopk" else size
            here = ((ids >= start) & (ids < start + len(weight))).nonzero().flatten()
            ours[..., here] = size[..., ids[here] - start]  # of this very product: the cut must compare like with like
            seen = torch.cat([largest, size], -1)
            largest = seen.topk(min(self.k, seen.shape[-1]), dim=-1).values
        return ours >= largest[..., -1:]


def normalized(h: Tensor, norm: str) -> Tensor:
    """Apply an SAE's run-time normalisation to (..., d) hidden states.

    `layer_norm`: `(h - mean) / (std + 1e-5)`, std with d - 1 in the denominator. `constant_norm_rescale`:
    `h * sqrt(d) / ||h||`.

    Returns:
        The same shape and dtype.
    """
    if norm == "layer_norm":
        h = h - h.mean(-1, keepdim=True)
        return h / (h.std(-1, keepdim=True) + 1e-5)
    if norm == "constant_norm_rescale":
        return h * (h.shape[-1] ** 0.5 / h.norm(dim=-1, keepdim=True))
    return h
