import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emguard_plugin.regularizers.functional import kv_drift, relative_squared_l2, treft_penalty


def test_value_worked_out_by_hand():
    # Layer 0: keys drift by (0, 3) on a reference of norm 5, then not at all: (9/25 + 0) / 2 = 0.18. Values double: 1.
    k0, rk0 = torch.tensor([[3.0, 7.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    v0, rv0 = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Layer 1: keys flip sign: 4. Values are unchanged: 0.
    k1, rk1 = -rk0, rk0
    key, value = kv_drift([k0, k1], [v0, rv0], [rk0, rk1], [rv0, rv0])
    torch.testing.assert_close(key, torch.tensor([0.18, 4.0]))
    torch.testing.assert_close(value, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(treft_penalty(key, value), torch.tensor((0.18 + 1.0 + 4.0) / 2))


def test_all_heads_of_a_layer_are_one_vector():
    # Two heads of width 1: together |d|^2 / |ref|^2 = 1 / 101; a mean over heads would be (1/1 + 0/100) / 2.
    x, ref = torch.tensor([[2.0, 10.0]]), torch.tensor([[1.0, 10.0]])
    torch.testing.assert_close(relative_squared_l2(x, ref), torch.tensor([1 / 101]))


def test_gradient_is_zero_and_finite_at_the_reference():
    ref = torch.randn(3, 4, dtype=torch.float64).float()
    x = ref.clone().requires_grad_()
    relative_squared_l2(x, ref).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_gradient_equals_two_delta_over_squared_norm():
    ref, x = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)
    relative_squared_l2(x, ref).sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() - ref) / ref.square().sum(-1, keepdim=True))


def test_a_zero_reference_stays_finite():
    assert torch.isfinite(relative_squared_l2(torch.ones(2, 3), torch.zeros(2, 3))).all()


def test_no_gradient_reaches_the_reference():
    ref = torch.randn(2, 3, requires_grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    relative_squared_l2(x, ref).sum().backward()
    assert ref.grad is None


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_scale_invariant_and_not_negative(scale, seed):
    g = torch.Generator().manual_seed(seed)
    x, ref = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    a, b = relative_squared_l2(x, ref), relative_squared_l2(x * scale, ref * scale)
    assert (a >= 0).all()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def test_half_precision_is_reduced_in_fp32():
    x, ref = torch.randn(2, 4096).bfloat16(), torch.randn(2, 4096).bfloat16()
    got = relative_squared_l2(x, ref)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, relative_squared_l2(x.double().float(), ref.double().float()))


def test_unequal_layers_are_an_error():
    one = [torch.ones(1, 2)]
    with pytest.raises(ValueError, match="1 key, 1 value, 2 and 1 reference"):
        kv_drift(one, one, one * 2, one)
    with pytest.raises(ValueError, match="0 key"):
        kv_drift([], [], [], [])
