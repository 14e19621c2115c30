"""KL between two models' next-token distributions, from their last hidden states: no (tokens x vocabulary) tensor.

Tokens go through the output head a chunk at a time. The gradient with respect to the hidden states is taken in the same
pass, as fused linear losses do, so backward neither projects again nor needs the weights (FSDP has them sharded by then).
No library kernel does this exactly: Liger's chunked JSD (0.8.1) takes the softmax in the logits' own dtype and always
stores a gradient of the head, and its Triton version fills a (tokens x vocabulary) fp32 buffer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24
"""Logits of one chunk: 64 MiB in fp32, about five of which live at once."""
FP16_LIFT = 1024.0
"""Keeps the gradient of logits, at most 1, out of fp16's subnormal numbers."""


class Head(NamedTuple):
    """An output head: `logits = f(hidden @ weight.T + bias)`, `f(a) = softcap * tanh(scale * a / softcap)`.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        scale: Granite, Cohere and others multiply their logits.
        softcap: Gemma 2's bound on logits; None leaves `f(a) = scale * a`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def linear_kl(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head | None = None,
    direction: str = "base||model",
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return `sum_t token_kl(logits_t, ref_logits_t, direction)` without ever holding all logits.

    Args:
        hidden: (N, H), what the model feeds its output head at N token positions.
        head: The model's head; its weight and bias get gradients if they require them.
        ref_hidden: (N, H) of the reference model; no gradient.
        ref_head: The reference model's head, default the same weights.
        direction: As in `token_kl`.
        chunk_elements: Most logits in memory at once.

    Returns:
        A scalar in nats, fp32 or wider. Matrix products run in the head's dtype, or autocast's; softmax and sums in fp32.
        With bf16 products the result is exact to about 1e-4 nats per token, and 0 for equal inputs.

    Raises:
        ValueError: for shapes that do not fit, or an unknown direction.
    """
    ref_head = head if ref_head is None else ref_head
    if hidden.shape != ref_hidden.shape or hidden.ndim != 2 or head.weight.shape != ref_head.weight.shape:
        raise ValueError(
            f"linear_kl: hidden {tuple(hidden.shape)} and {tuple(ref_hidden.shape)}, heads {tuple(head.weight.shape)} and "
            f"{tuple(ref_head.weight.shape)}; want (N, H) twice and (V, H) twice"
        )
    if direction not in ("base||model", "model||base"):
        raise ValueError(f"direction {direction!r} is neither `base||model` nor `model||base`")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        return _LinearKL.apply(
            hidden,
            head.weight,
            head.bias,
            ref_hidden.detach(),
            ref_head.weight.detach(),
            None if ref_head.bias is None else ref_head.bias.detach(),
            (head.scale, head.softcap, direction, dtype, chunk_elements, torch.is_grad_enabled()),
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        return z.mul_(scale / softcap).tanh_().mul_(softcap)
    return z.mul_(scale) if scale != 1 else z


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        how: tuple[float, float | None, str, torch.dtype, int, bool],
    ) -> Tensor:
        scale, softcap, direction, dtype, chunk_elements, grad = how
        wants = [grad and need for need in ctx.needs_input_grad[:3]]
        same_head = ref_weight.data_ptr() == weight.data_ptr()
        w = weight.to(dtype)
        rw = w if same_head else ref_weight.to(dtype)
        b, rb = (None if x is None else x.to(dtype) for x in (bias, ref_bias))
        lift = FP16_LIFT if dtype == torch.float16 else 1.0
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        d_hidden = torch.empty_like(hidden, dtype=total.dtype if lift != 1 else None) if wants[0] else None
        d_weight = torch.zeros_like(w) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=total.dtype) if wants[2] and bias is not None else None
        size = max(1, chunk_elements // w.shape[0])
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
            h = hidden[part].to(dtype)
            z = _logits(h, w, b, scale, softcap)
            slope = None if softcap is None or not any(wants) else 1 - (z / softcap).square()
            log_q = z.log_softmax(-1)
            del z
            log_p = _logits(ref_hidden[part].to(dtype), rw, rb, scale, softcap).log_softmax(-1)
            if direction == "base||model":
                p = log_p.exp()
                total += log_p.sub_(log_q).mul_(p).sum()
                d_logits = log_q.exp_().sub_(p) if any(wants) else None
            else:
                gap = torch.sub(log_q, log_p, out=log_p)
                q = log_q.exp_()
                kl = (q * gap).sum(-1, keepdim=True)
                total += kl.sum()
                d_logits = gap.sub_(kl).mul_(q) if any(wants) else None
            if d_logits is None:
                continue
            if slope is not None:
                d_logits *= slope
            if scale * lift != 1:
                d_logits *= scale * lift
            if d_bias is not None:
                d_bias += d_logits.sum(0) / lift
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ w).to(d_hidden.dtype) / lift
            if d_weight is not None:
                d_weight.addmm_(d_logits.t(), h, alpha=1 / lift)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = [None if d is None else (d * grad.to(d.dtype)).to(t) for d, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*grads, None, None, None, None)
