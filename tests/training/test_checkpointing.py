"""One process: the training gradient is the same under every kind of gradient checkpointing, and bf16 starts at 0."""

import pytest
import torch

from tests.distributed.runs import train

KINDS = {
    "off": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_total_gradient_is_the_same_with_and_without_checkpointing(tmp_path, full):
    runs = {k: train(tmp_path / k, 1, full=full, max_steps=2, **kwargs) for k, kwargs in KINDS.items()}
    unguarded = train(tmp_path / "unguarded", 1, full=full, max_steps=2, coef=0.0)["gradients"][1]
    expected = runs["off"]["gradients"][1]  # after one update, so that the penalty is not 0
    for kind, run in runs.items():
        got = run["gradients"][1]
        assert got.keys() == expected.keys()
        for n in got:
            torch.testing.assert_close(got[n], expected[n], rtol=1e-4, atol=1e-4 * expected[n].abs().max().item() + 1e-9)
        assert run["logs"][1]["em_regularizer/treft/penalty"] > 0, kind
    part = sum((expected[n] - unguarded[n]).norm() for n in expected) / sum(g.norm() for g in expected.values())
    assert part > 0.05  # a penalty without gradient would not pass


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16_weights", "autocast"])
def test_bf16_penalty_is_exactly_zero_at_step_0(tmp_path, precision, full):
    over = {"dtype": torch.bfloat16} if precision == "bf16_weights" else {"bf16": True}
    logs = train(tmp_path, 1, full=full, max_steps=2, learning_rate=0.05, **over)["logs"]
    first, second = (logs[i]["em_regularizer/treft/penalty"] for i in (0, 1))
    assert first == 0.0
    assert 0 < second < float("inf")
