"""SAEs through sae-lens, which is imported on first use: loading, folding, and cutting out the columns of a few latents."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emguard_plugin.latents.encoder import ARCHITECTURES, MODES, NORMS, TOPK, Mode, SubsetEncoder

_NOT_SEPARABLE = {
    "matching_pursuit": "its latents are chosen one after the other, each given those before",
    "temporal": "its latents depend on the tokens before",
    "transcoder": "it reads an MLP's input, not the residual stream after a block",
}
_UNFOLDED = ("expected_average_only_in", "covariance_whitening", "constant_scalar_rescale")
TOKENS_AT_ONCE = 1024


def load_sae(source: str, device: str = "cpu") -> Any:
    """Load an SAE by `RELEASE/ID` of sae-lens' table, `OWNER/REPO/ID` of the hub, or folder, and check that it can be used.

    Args:
        source: As in `--sae`.
        device: Where its weights go.

    Returns:
        A `sae_lens.SAE`.

    Raises:
        RuntimeError: without sae-lens.
        ValueError: when there is no such SAE, or one whose latents cannot be computed.
    """
    try:
        from sae_lens import SAE
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as exc:
        raise RuntimeError(f"SAEs are loaded with sae-lens: {exc}. Run `pip install 'emguard-plugin[sae]'`.") from exc
    folder = Path(source).expanduser()
    if (folder / "cfg.json").is_file():
        try:
            sae = SAE.load_from_disk(folder, device=device)
        except Exception as exc:  # sae-lens raises whatever its parts raise: missing keys, types, shapes, damaged tensors
            said = (str(exc).splitlines() or [""])[0]
            raise ValueError(
                f"`{source}` holds no SAE that can be read, in `cfg.json` or `sae_weights.safetensors`: {type(exc).__name__}: {said}"
            ) from exc
    elif folder.is_dir() or source.startswith((".", "/", "~")):
        raise ValueError(f"`{source}` is no folder with an SAE (`cfg.json`, `sae_weights.safetensors`).")
    else:
        sae = SAE.from_pretrained(*_release_and_id(source, get_pretrained_saes_directory()), device=device)
    check_sae(sae)
    return sae.eval().requires_grad_(False)


def _release_and_id(source: str, table: dict[str, Any]) -> tuple[str, str]:
    release, _, sae_id = source.partition("/")
    if release in table:
        ids = list(table[release].saes_map)
        if sae_id not in ids:
            near = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or ids[:3]
            raise ValueError(
                f"the release {release} has no SAE {sae_id!r}. It has {len(ids)}, for instance {', '.join(f'{release}/{i}' for i in near)}."
            )
        return release, sae_id
    owner_repo, rest = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
    if rest:
        return owner_repo, rest
    near = difflib.get_close_matches(release, list(table), n=3, cutoff=0.3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"`{source}` is neither a folder nor RELEASE/ID of sae-lens' table.{hint}")


def check_sae(sae: Any) -> None:
    """Refuse an SAE of which single latents cannot be computed, or whose file is unfinished.

    Raises:
        ValueError: naming its kind and the reason.
    """
    kind = sae.cfg.architecture()
    if kind not in ARCHITECTURES:
        why = next((w for name, w in _NOT_SEPARABLE.items() if name in kind), "it is not known here")
        raise ValueError(f"an SAE of kind {kind} cannot be used: {why}. Take a {', '.join(ARCHITECTURES)} SAE.")
    norm = sae.cfg.normalize_activations
    if norm in _UNFOLDED:
        raise ValueError(
            f"the SAE's file still says `normalize_activations: {norm}`: its weights lack the scaling it was trained with, and "
            "sae-lens would compute wrong latents without a word. Fold it (`sae.fold_activation_norm_scaling_factor(factor)`, "
            "or `fold_activation_whitening`) and save it again."
        )
    if norm not in NORMS:
        raise ValueError(f"the SAE's `normalize_activations: {norm}` is not known here; known: {', '.join(NORMS)}.")
    if sae.cfg.reshape_activations != "none":
        raise ValueError("the SAE reads attention heads (`hook_z`), not the residual stream after a block.")
    if sae.W_dec.shape[-1] != sae.W_enc.shape[0]:
        raise ValueError("the SAE's decoder writes another width than its encoder reads.")


def layer_of(sae: Any) -> int:
    """Return the 0-based decoder layer whose output the SAE reads.

    Raises:
        ValueError: for an SAE of another place in the model.
    """
    hook = str(sae.cfg.metadata.hook_name or "")
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook):
        layer = int(found[1]) - (found[2] == "pre")
    elif found := re.fullmatch(r"(?:.*\.)?layers\.(\d+)", hook):
        layer = int(found[1])
    else:
        layer = -1
    if layer < 0:
        raise ValueError(
            f"the SAE reads {hook or 'no named place'}; only the residual stream after a block (`blocks.N.hook_resid_post`) can be held."
        )
    return layer


def _rows(sae: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 (encoder rows, biases, scale of what the encoder gives), without the decoder bias."""
    weight = sae.W_enc.detach()[:, ids].T.double()
    kind = sae.cfg.architecture()
    scale = weight.new_ones(len(ids))
    if kind == "gated":
        return weight * sae.r_mag[ids].double().exp()[:, None], sae.b_mag[ids].double(), scale
    if kind in TOPK and sae.cfg.rescale_acts_by_decoder_norm:
        scale = sae.W_dec[ids].double().norm(dim=-1)
    return weight, sae.b_enc[ids].double(), scale


def _folded(sae: Any, weight: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - weight @ sae.b_dec.double()
    return (weight * scale[:, None]).float(), (bias * scale).float()


@torch.no_grad()
def subset(sae: Any, ids: Sequence[int], signs: Sequence[int] | Tensor, mode: Mode = "relu_pre", layer: int | None = None) -> SubsetEncoder:
    """Cut the columns of a few latents out of an SAE.

    Args:
        sae: From `load_sae`.
        ids: Latents to keep.
        signs: +1 or -1 each.
        mode: See `SubsetEncoder`.
        layer: Default: the layer that the SAE names.

    Returns:
        The encoder of these latents, in fp32.

    Raises:
        ValueError: for an empty set, ids out of range, or an SAE that cannot be split.
    """
    check_sae(sae)
    kind, size = sae.cfg.architecture(), sae.cfg.d_sae
    wrong = [i for i in ids if not 0 <= i < size]
    if wrong:
        raise ValueError(f"the SAE has latents 0 to {size - 1}; there is no {', '.join(map(str, wrong[:5]))}.")
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is neither {' nor '.join(MODES)}.")
    if mode == "relu_pre" and kind == "abstopk":
        raise ValueError("an abstopk SAE's latents are negative too, which ReLU would drop. Use mode `sae`.")
    at = torch.tensor(list(ids), dtype=torch.long, device=sae.W_enc.device)
    weight, bias = _folded(sae, *_rows(sae, at))
    direction = sae.W_dec.detach()[at].double()
    parts = {"directions": (direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)).float()}
    if mode == "sae" and kind == "jumprelu":
        parts["threshold"] = sae.threshold.detach()[at].float()
    if mode == "sae" and kind == "gated":
        gate = sae.W_enc.detach()[:, at].T.double()
        parts["gate_weight"], parts["gate_bias"] = _folded(sae, gate, sae.b_gate[at].double(), gate.new_ones(len(at)))
    if mode == "sae" and kind in TOPK:
        everything = torch.arange(size, device=at.device)
        parts["cut_weight"], parts["cut_bias"] = _folded(sae, *_rows(sae, everything))
        parts["k"] = sae.cfg.k
    return SubsetEncoder(
        layer_of(sae) if layer is None else layer, [int(i) for i in ids], torch.as_tensor(signs).to(at.device), kind, mode,
        weight, bias, norm=sae.cfg.normalize_activations, **parts,
    )  # fmt: skip


@torch.no_grad()
def encode_all(sae: Any, h: Tensor, mode: Mode = "relu_pre") -> Tensor:
    """Return the activations of all latents: (..., d) -> (..., d_sae), a thousand tokens at a time.

    Args:
        sae: From `load_sae`.
        h: Residual stream after the SAE's layer.
        mode: See `SubsetEncoder`.
    """

    def one(x: Tensor) -> Tensor:
        if mode == "sae":
            return sae.encode(x)
        a = sae.process_sae_in(x)
        if sae.cfg.architecture() == "gated":
            return (a @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).relu()
        p = a @ sae.W_enc + sae.b_enc
        rescaled = sae.cfg.architecture() in TOPK and sae.cfg.rescale_acts_by_decoder_norm
        return (p * sae.W_dec.norm(dim=-1) if rescaled else p).relu()

    flat = h.reshape(-1, h.shape[-1]).to(sae.W_enc.device, sae.W_enc.dtype)
    return torch.cat([one(x) for x in flat.split(TOKENS_AT_ONCE)]).reshape(*h.shape[:-1], -1)


@torch.no_grad()
def reconstruction_error(sae: Any, h: Tensor) -> float:
    """Return the unexplained share of variance, `sum ||h - sae(h)||^2 / sum ||h - mean h||^2`: 0 is perfect, 1 as bad as the mean.

    Args:
        sae: From `load_sae`.
        h: (..., d) residual stream of the user's model.
    """
    flat = h.reshape(-1, h.shape[-1]).to(sae.W_enc.device).float()
    missed = sum((x - sae(x.to(sae.W_enc.dtype)).float()).double().square().sum() for x in flat.split(TOKENS_AT_ONCE))
    return float(missed / (flat - flat.mean(0)).double().square().sum())
