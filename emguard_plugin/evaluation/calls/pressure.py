"""What all calls to one server share: how hard it may be pressed, and whether it is alive at all."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from emguard_plugin.evaluation.calls.faults import Stopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How patient the calls are. All times in seconds.

    Attributes:
        concurrency: Calls at once.
        timeout: Of one call.
        deadline: For all calls together.
        tries: Of one call, failures by rate limit not counted.
        backoff: Longest pause after the first failure; doubles with each, up to `backoff_cap`, and is drawn uniformly
            from 0 up to there, so that calls which failed together do not return together.
        backoff_cap: See there.
        retry_after_cap: Longest wait that a server may ask for.
        waves: Rate-limit pauses in a row without one call getting through, before giving up.
        window: Number of latest calls whose failures decide whether the server is down.
        tripped_at: Share of them that must have failed, with at least `window` / 2 seen.
        probes: Pauses before each single call that tests whether a server that was down is back.
    """

    concurrency: int = 32
    timeout: float = 60.0
    deadline: float = 1800.0
    tries: int = 5
    backoff: float = 0.5
    backoff_cap: float = 30.0
    retry_after_cap: float = 120.0
    waves: int = 10
    window: int = 20
    tripped_at: float = 0.9
    probes: tuple[float, ...] = (1.0, 3.0, 9.0)


class Pressure:
    """Rate-limit gate and circuit breaker. Belongs to one event loop.

    Rate limit: one call that is told to wait makes all wait, and halves the number of calls at once; each success gives
    1/n of a slot back. Breaker: when nearly all of the latest calls failed, only single test calls go out; one success
    lets all go on, and the last of `probes` failing stops the judge.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._started = time.monotonic()
        self._slots, self._running = float(limits.concurrency), 0
        self._closed_until, self._waves = 0.0, 0
        self._recent: deque[bool] = deque(maxlen=limits.window)
        self._down = False
        self._probe_at, self._probes, self._probing = 0.0, 0, False
        self._changed = asyncio.Event()

    def left(self) -> float:
        """Return the seconds until the deadline.

        Raises:
            Stopped: If it has passed.
        """
        left = self._started + self._limits.deadline - time.monotonic()
        if left <= 0:
            raise Stopped(f"not done after {self._limits.deadline:g} s. Run again to go on, or raise `deadline`.")
        return left

    async def enter(self) -> bool:
        """Wait until a call may go out; True if it is the one that tests whether the server is back."""
        while True:
            left, now = self.left(), time.monotonic()
            if now < self._closed_until:
                wait = self._closed_until - now
                await asyncio.sleep(min(left, wait + random.uniform(0, 0.1 + 0.1 * wait)))
            elif self._down:
                if now >= self._probe_at and not self._probing:
                    self._probing = True
                    self._running += 1
                    return True
                pause = left if self._probing else min(left, self._probe_at - now)
                await self._change(max(pause, 0.001))
            elif self._running < max(1, int(self._slots)):
                self._running += 1
                return False
            else:
                await self._change(left)

    async def _change(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def leave(self) -> None:
        """Give the slot of a call back, however it ended."""
        self._running -= 1
        self._notify()

    def succeeded(self) -> None:
        """Count a call that was answered."""
        self._waves = 0
        self._slots = min(self._limits.concurrency, self._slots + 1 / self._slots)
        self._recent.append(True)
        if self._down:
            logger.info("em_eval: the server answers again")
            self._down, self._probing, self._probes = False, False, 0
            self._recent.clear()
            self._notify()

    def failed(self, probe: bool, reason: str, status: int | None = None) -> None:
        """Count a call that a live server would have answered.

        Args:
            probe: Whether the call was a test call.
            reason: What went wrong.
            status: The HTTP status that came back, if one did.

        Raises:
            Stopped: If that was the last test call.
        """
        self._recent.append(False)
        limits = self._limits
        if probe:
            self._probing = False
            self._probes += 1
            if self._probes == len(limits.probes):
                raise Stopped(f"the server is down: {reason}", status)
            self._probe_at = time.monotonic() + limits.probes[self._probes]
            self._notify()
        elif not self._down and len(self._recent) >= limits.window / 2:
            share = self._recent.count(False) / len(self._recent)
            if share >= limits.tripped_at:
                logger.warning("em_eval: %.0f %% of the latest calls failed: %s", 100 * share, reason)
                self._down, self._probe_at = True, time.monotonic() + limits.probes[0]

    def limited(self, probe: bool, retry_after: float | None) -> None:
        """Make all calls wait.

        Args:
            probe: Whether the call was a test call; the server is alive then.
            retry_after: Seconds that the server asked for, or None.

        Raises:
            Stopped: If nothing got through in many such waits.
        """
        if probe:
            self._down, self._probing, self._probes = False, False, 0
        now = time.monotonic()
        if now >= self._closed_until:  # else this call left before the pause began, and belongs to the same wave
            self._waves += 1
            if self._waves > self._limits.waves:
                raise Stopped(
                    f"rate-limited {self._limits.waves} times in a row without an answer. Lower `concurrency`, or run again later."
                )
            self._slots = max(1.0, self._slots / 2)
        if retry_after is None:
            retry_after = min(self._limits.backoff_cap, self._limits.backoff * 2**self._waves)
        wait = min(max(retry_after, 0.0), self._limits.retry_after_cap)
        self._closed_until = max(self._closed_until, now + wait)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
