"""What the processes of one run must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from emguard_plugin.models.adapters import is_sharded

T = TypeVar("T")


def first_process(do: Callable[[], T]) -> T:
    """Do something on the first process; all of them return its value, or raise what it raised."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if not several:
        return do()
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = do()
        except Exception as exc:
            box[1] = exc
    torch.distributed.broadcast_object_list(box, src=0)
    raised(box[1])
    return box[0]


def raised(error: Exception | None) -> None:
    """Raise `error` unless it is None."""
    if error is not None:
        raise error


def any_process(model: nn.Module, flag: bool) -> bool:
    """Whether `flag` is true on any process that a forward pass needs."""
    if not is_sharded(model):
        return flag
    found = torch.tensor(float(flag), device=next(model.parameters()).device)
    torch.distributed.all_reduce(found)
    return bool(found > 0)


def over_processes(value: Tensor) -> float:
    """Return the mean over all processes; each calls it."""
    value = value.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and (n := torch.distributed.get_world_size()) > 1:
        torch.distributed.all_reduce(value)
        value /= n
    return float(value)
