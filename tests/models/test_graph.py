"""Whether a trainable parameter stands behind a value."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from emguard_plugin.models.graph import may_train, trained_behind


class Scale(torch.autograd.Function):
    """A kernel: all it needs are its inputs."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.dtype = x.dtype
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x


@pytest.mark.parametrize("trains", [True, False])
def test_kernels_show_their_parameters(trains):
    hidden = torch.ones(3, requires_grad=True)  # an activation that was made to require grad
    weight = nn.Parameter(torch.ones(3), requires_grad=trains)
    assert may_train(Scale.apply(hidden, weight).sum()) is trains


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_checkpoints_that_hide_parameters_are_believed(trains, reentrant):
    hidden = torch.ones(1, 3, requires_grad=True)
    layer = nn.Linear(3, 3).requires_grad_(trains)
    value = checkpoint(layer, hidden, use_reentrant=reentrant).sum()
    assert may_train(value) is (trains or reentrant)


def test_the_parameter_that_trains_is_found_behind_frozen_ones():
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2, bias=False)
    x = torch.ones(1, 2)
    assert trained_behind(frozen(trained(x)).sum()) is trained.weight
    assert trained_behind(trained.weight) is trained.weight
    assert trained_behind(frozen(x).sum()) is None
