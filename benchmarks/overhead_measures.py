"""What `overhead.py` measures of its variants: time step by step, taking turns; and the peak memory of one step."""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from overhead_variants import BY_ITSELF, VARIANTS, build, on_step_begin


class Turns:
    """Lets threads take turns, one step each; a thread that leaves is skipped."""

    def __init__(self, names: list[str]) -> None:
        self._condition = threading.Condition()
        self._waiting: set[str] = set()
        self._alive = set(names)
        self._now: str | None = None
        self.error: BaseException | None = None

    def wait(self, name: str) -> None:
        """Give up the turn and sleep until the next one."""
        with self._condition:
            if self._now == name:
                self._now = None
            self._waiting.add(name)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._now == name)
            self._waiting.discard(name)

    def leave(self, name: str, error: BaseException | None = None) -> None:
        """Never take a turn again."""
        with self._condition:
            self._alive.discard(name)
            self.error = self.error or error
            self._now = None if self._now == name else self._now
            self._condition.notify_all()

    def give(self, name: str) -> None:
        """Let `name` run until it waits or leaves."""
        with self._condition:
            self._condition.wait_for(lambda: name in self._waiting or name not in self._alive)
            if name not in self._alive:
                return
            self._now = name
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._now is None)
        if self.error is not None:
            raise self.error


def synchronize(s: dict[str, Any]) -> None:
    if s["device"] == "cuda":
        import torch

        torch.cuda.synchronize()


def penalty_alone(trainer: Any, s: dict[str, Any], times: int = 9) -> tuple[float, float]:
    """Return the median (clock, processor) seconds of a penalty's forward and backward passes in one step."""
    import torch

    from emguard_plugin import EMRegularizerCallback, Moment

    guard = next((c for c in trainer.callback_handler.callbacks if isinstance(c, EMRegularizerCallback)), None)
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=s["device"])}

    def penalty(i: int) -> Any:
        if guard is None:  # the second model's
            return trainer.anchor_kl(trainer.model, inputs["input_ids"].device, i, s["accumulation"])
        measured = guard.measure(Moment(trainer.model, inputs, trainer.state.global_step, i, s["accumulation"]))
        return None if measured is None else measured.value

    took = []
    for _ in range(times):
        synchronize(s)
        start, cpu = time.perf_counter(), time.process_time()
        for i in range(1 if guard is not None and guard.every == "optimizer_step" else s["accumulation"]):
            with trainer.compute_loss_context_manager():
                value = penalty(i)
            if value is not None:
                value.backward()
        synchronize(s)
        took.append((time.perf_counter() - start, time.process_time() - cpu))
        trainer.model.zero_grad()
    return statistics.median(t for t, _ in took), statistics.median(t for _, t in took)


def alone(variant: str) -> str:
    """Return the key of a guarded variant's penalty by itself."""
    return f"{variant}: penalty alone"


def time_rounds(s: dict[str, Any], folder: Path, report: Callable[[], None]) -> Iterator[dict[str, tuple[float, float]]]:
    """Yield (clock, processor) seconds per step of each variant, one mapping per round."""
    variants = VARIANTS[s["method"]]
    turns = Turns(list(variants))

    def train(variant: str) -> None:
        import torch

        if s["device"] == "cpu":
            torch.set_num_threads(s["threads"])
        try:
            turns.wait(variant)  # build one after the other as well
            trainers[variant] = build(variant, s, folder, on_step_begin(lambda state: turns.wait(variant)))
            trainers[variant].train()
            turns.leave(variant)
        except BaseException as error:
            turns.leave(variant, error)

    trainers: dict[str, Any] = {}
    threads = [threading.Thread(target=train, args=(v,), daemon=True) for v in variants]
    for thread in threads:
        thread.start()
    for variant in variants:
        turns.give(variant)  # build, up to the first step
    for r in range(s["warmup"] + s["rounds"]):
        seconds = {}
        shift = r % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            synchronize(s)
            start, cpu = time.perf_counter(), time.process_time()
            turns.give(variant)  # one whole turn of the training loop: it runs up to the next step's begin
            synchronize(s)
            seconds[variant] = (time.perf_counter() - start, time.process_time() - cpu)
        if r >= s["warmup"]:
            by_itself = {alone(v): penalty_alone(trainers[v], s, s["alone_times"]) for v in variants if v in BY_ITSELF}
            yield {**{v: seconds[v] for v in variants}, **by_itself}
        report()
    for thread in threads:
        thread.join()


class Measured(Exception):
    """Ends a run whose peak is known."""


class Allocations:
    """Peak memory of one training step: what is held at its start plus the highest sum of allocations in it."""

    STEP = 1  # the second step: the optimizer state exists

    def __init__(self, s: dict[str, Any]) -> None:
        self.s = s
        self.trainer: Any = None
        self.peak = 0
        self._profile: Any = None

    def step_begins(self, state: Any) -> None:
        """Start and stop the record around one step."""
        import torch

        if self.s["device"] == "cuda":
            if state.global_step == self.STEP:
                torch.cuda.reset_peak_memory_stats()
            elif state.global_step == self.STEP + 1:
                self.peak = torch.cuda.max_memory_allocated()
                raise Measured
            return
        if state.global_step == self.STEP:
            self._held = self.held()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        elif state.global_step == self.STEP + 1:
            self._profile.stop()
            self.peak = self._held + self._highest()
            raise Measured

    def held(self) -> int:
        """Return the bytes of weights, gradients, optimizer state and reference."""
        model = self.trainer.model
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        for values in self.trainer.optimizer.state.values():
            tensors += [v for v in values.values() if hasattr(v, "untyped_storage")]
        for callback in self.trainer.callback_handler.callbacks:
            reference = getattr(callback, "_reference", None)
            if isinstance(reference, dict):
                tensors += reference.values()
            elif reference is not None and reference._cache is not None:
                tensors.append(reference._cache._hidden)
            base = getattr(callback, "_base", None)
            if base is not None:
                tensors += [t for e in base.encoders for t in e.tensors().values()]
                tensors += base.store.rows.values() if base.store is not None else []
        tensors += [self.trainer.encoder] if hasattr(self.trainer, "encoder") else []
        tensors += getattr(self.trainer, "second", None).parameters() if hasattr(self.trainer, "second") else []
        tensors += [t for pair in getattr(self.trainer, "reference", None) or [] for t in pair]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _highest(self) -> int:
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        now = highest = 0
        for _, nbytes in changes:
            now += nbytes
            highest = max(highest, now)
        if highest <= 0:
            raise RuntimeError("the profiler recorded no allocations")
        return highest


def peak_memory(variant: str, s: dict[str, Any], folder: Path) -> int:
    """Return the peak bytes of one training step."""
    allocations = Allocations(s)
    s = {**s, "warmup": 0, "rounds": Allocations.STEP + 2}
    allocations.trainer = build(variant, s, folder, on_step_begin(allocations.step_begins))
    with contextlib.suppress(Measured):
        allocations.trainer.train()
    peak = allocations.peak
    allocations.trainer = None
    gc.collect()
    if s["device"] == "cuda":
        import torch

        torch.cuda.empty_cache()
    return peak
