"""BLOCK-EM's equation: by hand, its gradient, and the dead zone of K-."""

import pytest
import torch

from emguard_plugin.regularizers.functional import block_em_penalty, block_em_violation

SIGNS = torch.tensor([1.0, 1.0, -1.0, -1.0])
Z = torch.tensor([[3.0, 0.5, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
BASE = torch.tensor([[1.0, 1.0, 5.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_by_hand():
    violation = block_em_violation(Z, BASE, SIGNS)
    assert violation.tolist() == [[4.0, 0.0, 9.0, 0.0], [0.0] * 4]
    assert block_em_penalty(violation).tolist() == [13.0, 0.0]
    assert block_em_penalty(violation, "mean").tolist() == [3.25, 0.0]


def test_gradient_in_double_precision():
    g = torch.Generator().manual_seed(0)
    z, base, p, bp = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(4))
    z.requires_grad_()
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block_em_violation(x, base, SIGNS), (z,))
    assert torch.autograd.gradcheck(lambda x, y: block_em_violation(x, base, SIGNS, y, bp), (z, p))
    violation = block_em_violation(z, base, SIGNS)
    (grad,) = torch.autograd.grad(violation.sum(), z)
    torch.testing.assert_close(grad, 2 * SIGNS * violation.sqrt())


def test_the_base_gets_no_gradient():
    base = BASE.clone().requires_grad_()
    assert not block_em_violation(Z, base, SIGNS).requires_grad


def test_a_latent_of_k_minus_that_is_off_has_a_penalty_and_no_gradient_unless_pre_activations_are_used():
    pre, base_pre = torch.tensor([-2.0], requires_grad=True), torch.tensor([3.0])
    dead = block_em_violation(pre.relu(), base_pre.relu(), torch.tensor([-1.0]))
    assert dead.item() == 9.0
    assert torch.autograd.grad(dead.sum(), pre)[0].item() == 0.0
    alive = block_em_violation(pre.relu(), base_pre.relu(), torch.tensor([-1.0]), pre=pre, base_pre=base_pre)
    assert alive.item() == 25.0
    assert torch.autograd.grad(alive.sum(), pre)[0].item() == -10.0


def test_pre_activations_leave_k_plus_and_what_the_base_never_had_alone():
    pre = torch.tensor([2.0, -4.0])
    found = block_em_violation(pre.relu(), torch.zeros(2), torch.tensor([1.0, -1.0]), pre=pre, base_pre=torch.tensor([-1.0, -1.0]))
    assert found.tolist() == [4.0, 0.0]


def test_bf16_is_computed_in_fp32():
    assert block_em_violation(Z.bfloat16(), BASE.bfloat16(), SIGNS).dtype == torch.float32


def test_another_reduction():
    with pytest.raises(ValueError, match="neither `sum` nor `mean`"):
        block_em_penalty(Z, "max")
