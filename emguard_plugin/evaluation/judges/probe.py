"""Find out by asking what a server can do. Tables of capabilities are wrong within months."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from emguard_plugin.evaluation.calls.chat import ChatServer
from emguard_plugin.evaluation.calls.faults import Stopped, Unsupported
from emguard_plugin.evaluation.judges.prompts import NUMBER_PROBE
from emguard_plugin.evaluation.judges.scales import read_number

NUMBERS = (7, 73, 100)
REASONING_BUDGET = 4000


@dataclass(frozen=True)
class Dialect:
    """How this server wants its requests.

    Attributes:
        top_logprobs: How many tokens it tells the probability of; 0 if none.
        reasoning: It takes `max_completion_tokens` in place of `max_tokens`, as models do that think before they reply.
        dropped: Keys that it does not accept, of `temperature` and `seed`.
    """

    top_logprobs: int = 20
    reasoning: bool = False
    dropped: tuple[str, ...] = ()

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Dialect:
        """Return the dialect that `stored` wrote."""
        return cls(**{**stored, "dropped": tuple(stored["dropped"])})

    def stored(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**asdict(self), "dropped": list(self.dropped)}

    def without(self, unsupported: Unsupported) -> Dialect | None:
        """Return the dialect that avoids what the server did not accept, or None if there is none."""
        name = unsupported.parameter
        if name == "max_tokens" and not self.reasoning:
            return replace(self, reasoning=True)
        if name == "top_logprobs" and self.top_logprobs > 5:
            return replace(self, top_logprobs=5)
        if name in ("logprobs", "top_logprobs") and self.top_logprobs:
            return replace(self, top_logprobs=0)
        if name in ("temperature", "seed") and name not in self.dropped:
            return replace(self, dropped=(*self.dropped, name))
        return None

    def first_token(self, seed: int = 0, after_prefix: bool = False) -> dict[str, Any]:
        """Return settings that ask for the probabilities of the first token."""
        prefix = {"add_generation_prompt": False, "continue_final_message": True} if after_prefix else {}
        logprobs = {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {**self._common(1, 0.0, seed), **logprobs, **prefix}

    def text(self, tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        """Return settings that ask for a text."""
        return self._common(tokens, temperature, seed)

    def _common(self, tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        length = {"max_completion_tokens": REASONING_BUDGET} if self.reasoning else {"max_tokens": tokens}
        free = {"temperature": temperature, "seed": seed}
        return {**length, **{key: value for key, value in free.items() if key not in self.dropped}}


async def find_mode(server: ChatServer, asked: str) -> tuple[str, Dialect]:
    """Ask for known numbers, and return the mode that reads them right.

    Args:
        server: The server.
        asked: `auto`, or a mode to check.

    Returns:
        The mode, and which settings the server takes.

    Raises:
        Stopped: If the mode asked for does not work here, or if the model does not even repeat a number.
    """
    dialect = await _accepted(server, asked)
    if asked in ("auto", "logprob", "trie"):
        mode, why = await _reads_logprobs(server, dialect)
        if asked in ("auto", mode) and mode:
            return mode, dialect
        if asked != "auto":
            other = f"`mode: {mode}`" if mode else "`mode: sampled`"
            raise Stopped(f"`mode: {asked}` does not work with {server.model}: {why}. Set {other} or `mode: auto`.")
    if asked != "label":
        reply = await server.chat(_ask(NUMBERS[1]), dialect.text(8, 0.0, 0))
        if read_number(reply.text).value != NUMBERS[1]:
            raise Stopped(
                f"{server.model} at {server.address} was asked to reply with the number {NUMBERS[1]} and replied "
                f"{reply.text[:60]!r}: it cannot be used as a judge. Choose a more able model."
            )
        return "sampled", dialect
    return "label", dialect


async def _accepted(server: ChatServer, asked: str) -> Dialect:
    dialect = Dialect() if asked in ("auto", "logprob", "trie") else Dialect(top_logprobs=0)
    while True:
        settings = dialect.text(8, 0.0, 0)
        if dialect.top_logprobs:
            settings |= {"logprobs": True, "top_logprobs": dialect.top_logprobs}
        try:
            reply = await server.chat(_ask(NUMBERS[0]), settings, need_logprobs=False)
            return dialect if reply.first else replace(dialect, top_logprobs=0)
        except Unsupported as error:
            changed = dialect.without(error)
            if changed is None:
                raise Stopped(f"{server.model} at {server.address}: {error}") from error
            dialect = changed


async def _reads_logprobs(server: ChatServer, dialect: Dialect) -> tuple[str, str]:
    if not dialect.top_logprobs:
        return "", "the server sends no logprobs"
    if dialect.reasoning:
        return "", "its first token is not the first token of its reply"
    whole, split = True, True
    for number in NUMBERS:
        first = (await server.chat(_ask(number), dialect.first_token())).first
        assert first is not None  # a reply without logprobs is a failure
        top = max(first, key=first.__getitem__).strip()
        whole &= top == str(number)
        split &= top != "" and str(number).startswith(top)
    if whole:
        return "logprob", "its tokens are whole numbers"
    if not split:
        return "", "its first token is not the number that it was asked to reply with"
    # The rest of a number must follow when its first digit is put into the model's mouth.
    messages = [*_ask(NUMBERS[1]), {"role": "assistant", "content": "7"}]
    try:
        first = (await server.chat(messages, dialect.first_token(after_prefix=True))).first
    except Unsupported:
        first = {"": 1.0}
    assert first is not None
    if max(first, key=first.__getitem__) == "3":
        return "trie", "its tokens are single digits"
    return "", "its tokens are single digits, and the server cannot continue a reply that was begun"


def _ask(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": NUMBER_PROBE.format(number=number)}]
