"""By what a penalty is multiplied, cell by cell, and what comes out when two kinds of host have done their part."""

import pytest

from emguard_plugin.training.scale import scale, share


@pytest.mark.parametrize(
    ("every", "host_divides", "want"),
    [
        ("micro_batch", True, 1),
        ("micro_batch", False, 1 / 4),
        ("optimizer_step", True, 4),
        ("optimizer_step", False, 1),
    ],
)
def test_each_cell_of_the_table(every, host_divides, want):
    assert scale(every, host_divides, 4) == want
    assert scale(every, host_divides, 1) == 1


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("host_divides", [True, False])
@pytest.mark.parametrize("every", ["micro_batch", "optimizer_step"])
def test_a_penalty_of_one_reaches_the_gradient_once(every, host_divides, n):
    """The host adds up what `compute_loss` returns for each micro-batch, divided by n or not."""
    times = n if every == "micro_batch" else 1
    added = sum(scale(every, host_divides, n) * 1.0 / (n if host_divides else 1) for _ in range(times))
    assert added == pytest.approx(1.0)
    assert sum(share(every, n) * 1.0 for _ in range(times)) == pytest.approx(1.0)
