import math

import pytest
import torch

from emguard_plugin.regularizers.functional import token_kl
from emguard_plugin.regularizers.kl.linear_kl import Head, linear_kl

DIRECTIONS = ["base||model", "model||base"]


def parts(n=7, hidden=5, vocab=11, dtype=torch.float64, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(n, hidden), make(vocab, hidden), make(vocab) if bias else None, make(n, hidden), make(vocab, hidden), make(vocab)


def plain(hidden, head, ref_hidden, ref_head, direction):
    """The same number from all logits at once, by autograd."""

    def logits(h, head):
        z = torch.nn.functional.linear(h, head.weight, head.bias) * head.scale
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    return token_kl(logits(hidden, head), logits(ref_hidden, ref_head), direction).sum()


def test_value_worked_out_by_hand():
    # One token, three words, identity head. p_base = (1/2, 1/4, 1/4).
    # p_model = (1/4, 1/2, 1/4): KL(base||model) = 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2, and the other way round the same.
    # Uniform p_model tells them apart: KL(base||model) = ln 3 - 3/2 ln 2, KL(model||base) = 5/3 ln 2 - ln 3.
    base, model, uniform = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.zeros(1, 3)
    ln2, ln3 = math.log(2), math.log(3)
    table = [(model, DIRECTIONS[0], ln2 / 4), (model, DIRECTIONS[1], ln2 / 4)]
    table += [(uniform, DIRECTIONS[0], ln3 - 1.5 * ln2), (uniform, DIRECTIONS[1], 5 / 3 * ln2 - ln3)]
    for logits, direction, nats in table:
        torch.testing.assert_close(token_kl(logits, base, direction), torch.tensor([nats]))
        torch.testing.assert_close(linear_kl(logits, Head(torch.eye(3)), base, direction=direction), torch.tensor(nats))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_distributions_give_exactly_zero_and_no_gradient(direction):
    # torchtune's "forward KL" leaves out the teacher's entropy: 3.67 here, not 0.
    hidden, weight, *_ = parts(dtype=torch.float32, vocab=64)
    hidden.requires_grad_()
    kl = linear_kl(hidden, Head(weight), hidden.detach().clone(), direction=direction)
    kl.backward()
    assert kl.item() == 0
    assert hidden.grad.abs().max() < 1e-6
    assert token_kl(hidden, hidden, direction).abs().max() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("transform", [(1.0, None), (0.25, None), (2.0, 3.0)])
@pytest.mark.parametrize("chunk", [1, 22, 10**6])
def test_equals_plain_autograd(direction, transform, chunk):
    hidden, w, b, ref_hidden, rw, rb = parts()
    got, want = [], []
    for out, f in ((got, linear_kl), (want, plain)):
        leaves = [x.clone().requires_grad_() for x in (hidden, w, b)]
        kl = f(
            leaves[0],
            Head(leaves[1], leaves[2], *transform),
            ref_hidden,
            Head(rw, rb, *transform),
            direction,
            *([chunk] if f is linear_kl else []),
        )
        (3 * kl).backward()
        out += [kl.detach(), *(x.grad for x in leaves)]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_check(direction):
    hidden, w, b, ref_hidden, rw, rb = parts(n=3, hidden=3, vocab=5)
    f = lambda h, w, b: linear_kl(h, Head(w, b, 0.5, 4.0), ref_hidden, Head(rw, rb, 0.5, 4.0), direction, 10)  # noqa: E731
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (hidden, w, b)])


def test_summed_over_the_vocabulary_not_averaged():
    # Words of next to no probability change nothing; a mean over the vocabulary would fall by a factor of 10.
    hidden, w, _, ref_hidden, *_ = parts(bias=False)
    small = linear_kl(hidden, Head(w, torch.zeros(11, dtype=w.dtype)), ref_hidden)
    wide, low = torch.cat([w, torch.zeros(99, 5, dtype=w.dtype)]), torch.cat([torch.zeros(11), torch.full((99,), -60.0)])
    torch.testing.assert_close(linear_kl(hidden, Head(wide, low.double()), ref_hidden), small)


def test_order_of_tokens_and_a_shift_of_logits_change_nothing():
    hidden, w, b, ref_hidden, *_ = parts()
    kl = linear_kl(hidden, Head(w, b), ref_hidden)
    order = torch.randperm(7)
    torch.testing.assert_close(linear_kl(hidden[order], Head(w, b), ref_hidden[order]), kl)
    torch.testing.assert_close(linear_kl(hidden, Head(w, b + 5), ref_hidden, Head(w, b - 3)), kl)


def test_only_what_requires_a_gradient_gets_one():
    hidden, w, _, ref_hidden, *_ = parts()
    ref_hidden.requires_grad_()
    hidden.requires_grad_()
    linear_kl(hidden, Head(w), ref_hidden).backward()
    assert hidden.grad is not None
    assert w.grad is None
    assert ref_hidden.grad is None
    with torch.no_grad():
        assert not linear_kl(hidden, Head(w), ref_hidden).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_its_noise_floor_is_known(dtype):
    hidden, w, _, noise, *_ = parts(n=64, hidden=64, vocab=512, dtype=torch.float32)
    hidden, w = hidden / 8, w / 2
    ref = hidden + 0.2 * noise / 8
    exact = hidden.clone().requires_grad_()
    want = linear_kl(exact, Head(w), ref)
    want.backward()
    low = hidden.to(dtype).requires_grad_()
    got = linear_kl(low, Head(w.to(dtype)), ref.to(dtype))
    got.backward()
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) / 64 < (2e-4 if dtype == torch.bfloat16 else 5e-5)  # nats per token
    assert want.item() / 64 > 1e-3
    assert (low.grad - exact.grad).norm() < 0.05 * exact.grad.norm()


def test_tiny_gradients_survive_fp16():
    hidden, w, _, noise, *_ = parts(n=4, hidden=8, vocab=4096, dtype=torch.float32)
    w = w * 0.01
    exact, low = hidden.clone().requires_grad_(), hidden.half().requires_grad_()
    linear_kl(exact, Head(w), hidden + 1e-2 * noise).backward()
    linear_kl(low, Head(w.half()), (hidden + 1e-2 * noise).half()).backward()
    assert exact.grad.abs().max() < 1e-5
    assert (low.grad.float() - exact.grad).norm() < 0.2 * exact.grad.norm()


def test_autocast_projects_in_its_dtype_and_returns_fp32_gradients():
    hidden, w, _, ref_hidden, *_ = parts(dtype=torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl = linear_kl(hidden, Head(w), ref_hidden)
    kl.backward()
    by_hand = linear_kl(hidden.detach().bfloat16(), Head(w.bfloat16()), ref_hidden.bfloat16())
    assert kl.item() == by_hand.item()
    assert hidden.grad.dtype == torch.float32


def test_never_holds_all_logits():
    n, vocab, hidden = 256, 4096, 16
    h, w = torch.randn(n, hidden, requires_grad=True), torch.randn(vocab, hidden)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_kl(h, Head(w), torch.randn(n, hidden), chunk_elements=8 * vocab).backward()
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= 8 * vocab * 4 < n * vocab * 4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_tokens_give_zero_attached_to_the_graph(direction):
    hidden, w, *_ = parts()
    hidden.requires_grad_()
    kl = linear_kl(hidden[:0], Head(w), hidden[:0].detach(), direction=direction)
    kl.backward()
    assert kl.item() == 0
    assert hidden.grad.abs().max() == 0


def test_bad_arguments():
    hidden, w, *_ = parts()
    with pytest.raises(ValueError, match=r"hidden \(7, 5\) and \(6, 5\)"):
        linear_kl(hidden, Head(w), hidden[:6])
    for f in (lambda: linear_kl(hidden, Head(w), hidden, direction="forward"), lambda: token_kl(hidden, hidden, "forward")):
        with pytest.raises(ValueError, match="neither `base"):
            f()
