"""Draw answers from a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from emguard_plugin.config import SamplerConfig
from emguard_plugin.evaluation.calls.chat import ChatServer, each, stream
from emguard_plugin.evaluation.calls.faults import Failed, Filtered, Stopped, TooLong, Unsupported
from emguard_plugin.evaluation.calls.pressure import Limits
from emguard_plugin.evaluation.sampler import Answer, AnswerKey, Request
from emguard_plugin.keys import is_local

logger = logging.getLogger(__name__)

BATCH, SECONDS = 64, 2.0


@dataclass(frozen=True)
class ServedSource:
    """Models that a server knows by name.

    Attributes:
        name: The fine-tuned model.
        base: The model it started from; None if it is not measured.
        host: Where they are served.
    """

    name: str
    base: str | None
    host: str


def draw_seed(seed: int, key: AnswerKey) -> int:
    """Return the seed of one answer: the same for base and fine-tuned model, 31 bits as servers take them."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


class EndpointSampler:
    """Draws answers by chat completions, each with its own seed and nothing but the temperature to shape it.

    Whether a seed gives the same answer again is the server's affair; few promise it.

    Args:
        config: The `em_eval.sampler` block.
        base_url: The endpoint.
        model: Name of the model there.
        seed: Seeds every (suite, question, paraphrase, draw).
        max_new_tokens: Longest answer, in tokens.

    Raises:
        ValueError: If `openai` is not installed or the variable of the key is not set.
    """

    def __init__(self, config: SamplerConfig, base_url: str, model: str, *, seed: int, max_new_tokens: int) -> None:
        limits = Limits(concurrency=config.concurrency, timeout=config.timeout, deadline=config.deadline)
        self._server = ChatServer(base_url, model, config.api_key_env, limits)
        self._seed, self._length = seed, {"max_tokens": max_new_tokens}
        if not is_local(base_url):
            logger.warning("em_eval: questions are sent to %s to be answered", self._server.host)

    def sample(self, requests: list[Request], done: Collection[AnswerKey] = ()) -> Iterator[list[Answer]]:
        """Yield the answers that are missing, in batches, in the order in which they arrive.

        An answer that the server fails to give is left out, and drawn by the next run.

        Raises:
            Stopped: If the server is down, or refuses what it is asked.
        """
        missing = [request for request in requests if request.key not in done]

        async def main(emit: Callable[[Answer | str], None]) -> None:
            async with self._server as server:

                async def one(index: int) -> None:
                    try:
                        emit(await self._draw(server, missing[index]))
                    except (Failed, Filtered, TooLong) as error:
                        emit(str(error))

                await each(len(missing), self._server.limits.concurrency, one)

        ready: list[Answer] = []
        lost: list[str] = []
        given = time.monotonic()
        try:
            for answer in stream(main) if missing else ():
                (lost if isinstance(answer, str) else ready).append(answer)
                if len(ready) >= BATCH or (ready and time.monotonic() - given > SECONDS):
                    given, full, ready = time.monotonic(), ready, []
                    yield full
        except Stopped:
            if ready:
                yield ready
            raise
        if ready:
            yield ready
        if lost:
            logger.warning("em_eval: %d answers were not given, and are drawn by the next run: %s", len(lost), lost[0])

    async def _draw(self, server: ChatServer, request: Request) -> Answer:
        settings = {"temperature": request.temperature, "top_p": 1.0, "seed": draw_seed(self._seed, request.key)}
        try:
            reply = await server.chat(request.question.messages, {**settings, **self._length})
        except Unsupported as error:
            if error.parameter != "max_tokens" or "max_tokens" not in self._length:
                raise Stopped(f"{server.model} at {server.host}: {error}") from error
            self._length = {"max_completion_tokens": self._length["max_tokens"]}
            reply = await server.chat(request.question.messages, {**settings, **self._length})
        return Answer(request, reply.text, reply.tokens, "length" if reply.finish == "length" else "stop")
