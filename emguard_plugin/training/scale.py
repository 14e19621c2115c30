"""The one place that says by what a penalty is multiplied before it joins a host's loss."""

from __future__ import annotations

from emguard_plugin.regularizers.penalty import Every


def scale(every: Every, host_divides: bool, micro_batches: int) -> float:
    """Return what `coef * penalty` is multiplied by, so that a coefficient means the same under any accumulation.

    With n micro-batches in the optimizer step, what must reach the gradient is the penalty of the step once, or the mean over
    its micro-batches. A host that divides what `compute_loss` returns by n does so to the penalty as well; one that has
    normalised its loss by the tokens of the step does not.

    | penalty of            | the host divides by n | the host does not |
    |-----------------------|-----------------------|-------------------|
    | every micro-batch     | 1                     | 1 / n             |
    | the optimizer step    | n                     | 1                 |

    Args:
        every: What the penalty belongs to.
        host_divides: Whether the host divides the returned loss by `micro_batches`.
        micro_batches: n.
    """
    if every == "optimizer_step":
        return micro_batches if host_divides else 1
    return 1 if host_divides else 1 / micro_batches


def share(every: Every, micro_batches: int) -> float:
    """Return the weight of one measured penalty in the optimizer step's own: 1, or 1 / n for one of n micro-batches.

    Args:
        every: What the penalty belongs to.
        micro_batches: n.
    """
    return 1 if every == "optimizer_step" else 1 / micro_batches
