"""The residual stream after chosen decoder layers: kept from a host's forward pass, or from one of our own.

Keeping computes nothing. Under gradient checkpointing it is the checkpoint's output that is kept: inside, reentrant
checkpointing and Axolotl's offloading run without gradient. The last layer is read before the final norm.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from emguard_plugin.models.adapters import is_sharded, peft_model
from emguard_plugin.models.modes import eval_mode


def decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that runs the decoder layers, and the layers.

    Raises:
        ValueError: when there is no list of layers.
    """
    peft = peft_model(model)
    base = model if peft is None else peft.get_base_model()
    count = base.config.get_text_config().num_hidden_layers
    # A vision or audio tower may have as many layers.
    text = base.get_decoder() if hasattr(base, "get_decoder") else base
    for owner in text.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, child
    raise ValueError(f"{type(base).__name__} keeps its {count} decoder layers in no list, so none of them can be read.")


@dataclass
class Kept:
    """What one forward pass left behind.

    Attributes:
        hidden: (B, T, d) after each layer, by index, with gradient where the forward pass had one.
        args: Positional arguments of the decoder's forward pass.
        kwargs: Its keyword arguments: what the host really fed it.
        autocast: (device type, dtype) of the autocast it ran under, or None. Accelerate wraps the outermost `forward` in it, which
            a call of the decoder goes around.
        versions: How often each output had been changed in place when it was kept.
        open: Whether the pass that runs is kept.
        with_gradient: Whether the pass that is kept had gradients.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    autocast: tuple[str, torch.dtype] | None = None
    versions: dict[int, int] = field(default_factory=dict)
    open: bool = False
    with_gradient: bool = False

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context with the autocast that the forward pass ran under."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.autocast[0], dtype=self.autocast[1])

    def put(self, layer: int, output: Any) -> None:
        """Keep a layer's output, the first time."""
        if not self.open:
            return
        h = output[0] if isinstance(output, tuple | list) else output
        if layer not in self.hidden:
            self.hidden[layer], self.versions[layer] = h, h._version

    def take(self, layers: Sequence[int], with_gradient: bool) -> dict[int, Tensor]:
        """Return the hidden states and forget them.

        Raises:
            RuntimeError: when nothing came by, without gradient where one is needed, or changed in place since.
        """
        missing = [n for n in layers if n not in self.hidden]
        if missing:
            raise RuntimeError(
                f"em_regularizer.block_em: the training forward did not pass layer {missing[0]} where it can be seen (a compiled or "
                "fused model?), so nothing would be held. Turn `torch_compile` off."
            )
        for n in layers:
            if with_gradient and not self.hidden[n].requires_grad:
                raise RuntimeError(
                    f"em_regularizer.block_em: the output of layer {n} carries no gradient, so the penalty would train nothing. No "
                    "trainable parameter stands before it; widen the adapter's target modules, or set `coef: 0`."
                )
            if self.hidden[n]._version != self.versions[n]:
                raise RuntimeError(
                    f"em_regularizer.block_em: the model changed the output of layer {n} in place after it was kept, so its latents "
                    "would be wrong. Turn fused kernels off."
                )
        hidden, self.hidden = self.hidden, {}
        return hidden


@contextlib.contextmanager
def keep_residual(model: nn.Module, layers: Sequence[int]) -> Iterator[Kept]:
    """Keep the output of decoder layers during a forward pass, and what the decoder was called with.

    Of several passes it is the first one with gradient, else the first: inside one loss, trainers run their reference too, or the
    same model for an estimate, without gradient.

    Yields:
        What is kept, filled while the context is open.
    """
    kept = Kept()
    owner, modules = decoder(model)

    def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with_gradient = torch.is_grad_enabled()
        kept.open = not (kept.kwargs or kept.args) or (with_gradient and not kept.with_gradient)
        if kept.open:
            kept.hidden, kept.versions, kept.with_gradient = {}, {}, with_gradient
            kept.args, kept.kwargs = args, dict(kwargs)
            device = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)).device.type
            if torch.is_autocast_enabled(device):
                kept.autocast = (device, torch.get_autocast_dtype(device))

    with contextlib.ExitStack() as stack:
        stack.callback(owner.register_forward_pre_hook(arguments, with_kwargs=True).remove)
        for n in layers:
            layer = modules[n]
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training:
                stack.enter_context(_around_checkpoint(layer, n, kept))
            else:
                hook = layer.register_forward_hook(lambda module, args, output, n=n: kept.put(n, output))
                stack.callback(hook.remove)
        yield kept


@contextlib.contextmanager
def _around_checkpoint(layer: nn.Module, n: int, kept: Kept) -> Iterator[None]:
    theirs = layer._gradient_checkpointing_func

    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        output = theirs(*args, **kwargs)
        kept.put(n, output)
        return output

    layer._gradient_checkpointing_func = checkpoint
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = theirs


class _Stop(Exception):
    """The last layer that is needed has run."""


@torch.no_grad()
def read_residual(
    model: nn.Module, layers: Sequence[int], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[int, Tensor]:
    """Return the residual stream (B, T, d) after decoder layers, by index, from a forward pass without gradient.

    The layers above are not run, nor is the output head, unless parameters are spread over processes.

    Args:
        model: As a forward pass must call it, in the mode that is wanted.
        layers: 0-based.
        args: Positional arguments of the decoder.
        kwargs: Its keyword arguments; `labels` and caches are dropped.
    """
    owner, modules = decoder(model)
    whole = is_sharded(model)
    return _read(model if whole else owner, modules, layers, args, kwargs, whole)


def row_residuals(model: nn.Module, layer: int, rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, residual stream behind block `layer`) per row; fp32, shape (T, d), in the model's device.

    Rows are padded on the right, where causal attention does not see the padding.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    with eval_mode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(list(rows[i])) for i in batch], batch_first=True)
            lengths = torch.tensor([len(rows[i]) for i in batch])
            mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
            fed = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
            hidden = read_residual(model, [layer], kwargs=fed)[layer]
            for row, index in enumerate(batch):
                yield index, hidden[row, : len(rows[index])].float()


class FrozenDecoder:
    """The decoder as it is now, up to a layer: a copy that training does not reach.

    Args:
        model: Its weights must not be spread over processes.
        last: 0-based index of the last layer that is copied.
    """

    def __init__(self, model: nn.Module, last: int) -> None:
        owner, modules = decoder(model)
        # What stands above is never run: the copy shares nothing with it and holds no memory for it.
        above: dict[int, Any] = {id(module): nn.Identity() for module in modules[last + 1 :]}
        self.decoder = copy.deepcopy(owner, above).eval().requires_grad_(False)
        self.layers = next(m for m in self.decoder.children() if isinstance(m, nn.ModuleList) and len(m) == len(modules))

    @torch.no_grad()
    def read(self, layers: Sequence[int], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[int, Tensor]:
        """As `read_residual`, of the copy."""
        return _read(self.decoder, self.layers, layers, args, kwargs, whole=False)


def _read(
    called: nn.Module,
    modules: nn.ModuleList,
    layers: Sequence[int],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    whole: bool,
) -> dict[int, Tensor]:
    dropped = ("labels", "num_items_in_batch", "past_key_values", "shift_labels", "output_hidden_states")
    # `use_cache` stays as the host has it: with a cache, transformers does not keep packed conversations apart.
    kwargs = {"use_cache": False, **{k: v for k, v in (kwargs or {}).items() if k not in dropped}}
    last, found = max(layers), {}

    def keep(n: int, output: Any) -> None:
        found[n] = output[0] if isinstance(output, tuple | list) else output
        if n == last and not whole:
            raise _Stop

    hooks = [modules[n].register_forward_hook(lambda module, given, output, n=n: keep(n, output)) for n in layers]
    try:
        called(*args, **kwargs, **({"logits_to_keep": 1} if whole else {}))
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found
