from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emguard_plugin.regularizers.kl.schedule import Schedule

SIZES = [20 + 7 * i % 60 for i in range(50)]


def plan(**over):
    settings = {"ratio": 0.125, "batch_tokens": 4096, "micro_batches": 4, "processes": 2, "seed": 0, **over}
    return Schedule.plan(SIZES, **settings)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.01, 4),
    batch=st.integers(16, 5000),
    m=st.integers(1, 8),
    p=st.integers(1, 4),
    short=st.integers(1, 8),
    step=st.integers(0, 50),
)
def test_a_step_is_cut_without_loss_and_every_process_has_work_at_the_same_time(ratio, batch, m, p, short, step):
    schedule = plan(ratio=ratio, batch_tokens=batch, micro_batches=m, processes=p)
    now = min(short, m)
    slots = schedule.slots(step, now)
    assert sorted(i for rows in slots for i in rows) == sorted(schedule.rows(step, now))
    assert len(slots) % p == 0, "FSDP2 gathers weights on all processes or on none"
    assert 1 <= len(slots) // p <= now
    assert all(slots)


def test_the_same_anchors_whatever_the_split():
    one = plan(batch_tokens=8192, micro_batches=4, processes=1)
    for m, p in ((8, 2), (4, 4), (16, 1)):
        other = plan(batch_tokens=8192 * 4 / m / p, micro_batches=m, processes=p)
        assert [other.rows(s, m) for s in range(5)] == [one.rows(s, 4) for s in range(5)]


def test_every_anchor_comes_once_before_any_comes_twice():
    schedule = plan(batch_tokens=512)
    stream = [i for step in range(40) for i in schedule.rows(step, 4)]
    first, second = stream[:50], stream[50:100]
    assert Counter(first) == Counter(second) == Counter(range(50))
    assert first != second


def test_the_order_depends_on_the_seed_and_not_on_what_was_asked_before():
    late = plan(batch_tokens=512).slots(17, 4)
    early = plan(batch_tokens=512)
    assert early.slots(3, 4) != late
    assert early.slots(17, 4) == late
    assert plan(batch_tokens=512, seed=1).slots(17, 4) != late


def test_the_ratio_is_kept_and_reported():
    mean = sum(SIZES) / len(SIZES)
    schedule = plan(batch_tokens=1024)
    assert schedule.per_step == round(0.125 * 1024 * 8 / mean)
    assert schedule.ratio == pytest.approx(0.125, rel=0.05)
    assert plan(batch_tokens=2, micro_batches=1, processes=1).per_step == 1, "at least one anchor"
    assert plan(ratio=9, batch_tokens=9999).per_step == len(SIZES), "no anchor twice in one step"


def test_short_passes_are_put_together_and_long_ones_spread():
    # 8 micro-batches of 300 tokens want 37 anchor tokens each: one or two passes, not eight.
    assert plan(batch_tokens=300, micro_batches=8, processes=1).passes == 1
    assert plan(batch_tokens=600, micro_batches=8, processes=1).passes == 2
    # 4 of 4096 want 512 each: one pass per micro-batch, for the memory's sake.
    assert plan(processes=1).passes == 4


def test_a_short_last_window_takes_fewer_anchors():
    schedule = plan()
    assert len(schedule.rows(3, 2)) == round(schedule.per_step / 2)
    assert schedule.rows(3, 2) == schedule.rows(3, 4)[: len(schedule.rows(3, 2))]
