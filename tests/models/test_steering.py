"""The residual stream is moved by exactly the stated vector, row by row, and read as it is."""

import pytest
import torch

from emguard_plugin.models.residual import decoder, keep_residual, row_residuals
from emguard_plugin.models.steering import changed, steered
from tests.tiny import lora, perturb, tiny_model

LAYER = 1


@pytest.fixture(scope="module")
def model():
    return perturb(tiny_model("llama"), 0.15).eval()


@torch.no_grad()
def after_block(model, ids, **fed):
    with keep_residual(model, [LAYER]) as kept:
        model(input_ids=ids, **fed)
    return kept.take([LAYER], with_gradient=False)[LAYER]


def test_each_row_moves_by_its_own_vector_at_every_position(model):
    ids = torch.tensor([[3, 5, 7, 9]] * 3)
    vectors = torch.randn(3, 32)
    vectors[1] = 0
    before = after_block(model, ids)
    # The steering hook stands first, so that the reading hook sees what the next block sees.
    with steered(model, LAYER, vectors):
        after = after_block(model, ids)
    assert torch.allclose(after - before, vectors.unsqueeze(1).expand(-1, 4, -1), atol=1e-5)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after_block(model, ids), before)


def test_a_mask_marks_positions_of_the_prompt_and_none_that_are_generated(model):
    vectors, mask = torch.ones(2, 32), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    ids = torch.tensor([[3, 5, 7, 9]] * 2)
    before = after_block(model, ids)
    with steered(model, LAYER, vectors, mask):
        moved = after_block(model, ids) - before
        assert torch.allclose(moved, mask.unsqueeze(-1).expand(-1, -1, 32).float(), atol=1e-5)
        assert torch.allclose(after_block(model, ids[:, :1]), before[:, :1], atol=1e-5)


def test_a_batch_of_another_size_is_refused(model):
    with steered(model, LAYER, torch.zeros(2, 32)), pytest.raises(RuntimeError, match="2 steering vectors for a batch of 3"):
        model(input_ids=torch.ones(3, 2, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_follows_sees_what_was_put_in_the_place(family):
    tuned, ids = perturb(lora(tiny_model(family)), 0.1).eval(), torch.tensor([[3, 5, 7, 9]])
    seen = []

    def zero(hidden):
        seen.append(hidden.shape)
        return torch.zeros_like(hidden)

    plain = tuned(input_ids=ids).logits
    with changed(tuned, LAYER, zero):
        assert torch.equal(after_block(tuned, ids), torch.zeros(1, 4, 32))
        other = tuned(input_ids=ids.flip(1)).logits
    assert seen == [(1, 4, 32)] * 2
    assert not torch.equal(other, plain)
    torch.testing.assert_close(tuned(input_ids=ids).logits, plain, rtol=0, atol=0)


@torch.no_grad()
def test_what_a_block_returns_beside_the_stream_stays(model):
    ids, block, returned = torch.tensor([[3, 5, 7]]), decoder(model)[1][LAYER], []

    def unwrap(_module, _args, output):
        returned.append(output)
        return output[0]

    hooks = [block.register_forward_hook(lambda _module, _args, output: (output, "beside"))]
    with changed(model, LAYER, torch.zeros_like):
        hooks.append(block.register_forward_hook(unwrap))
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    assert not returned[0][0].any()
    assert returned[0][1:] == ("beside",)


def test_rows_do_not_hang_on_the_batch(model):
    rows = [(3, 5, 7), (2, 4, 6, 8, 10), (9,)]
    one, three = (dict(row_residuals(model, LAYER, rows, size)) for size in (1, 3))
    assert [tuple(three[i].shape) for i in range(3)] == [(3, 32), (5, 32), (1, 32)]
    assert all(torch.allclose(one[i], three[i], atol=1e-5) for i in range(3))
    assert torch.allclose(one[1], after_block(model, torch.tensor([rows[1]]))[0], atol=1e-5)
