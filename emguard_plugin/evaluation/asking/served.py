"""Draw answers from a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from emguard_plugin.config import EMEvalConfig, EndpointSamplerConfig, ServedSamplerConfig
from emguard_plugin.evaluation.asking.draws import AnswerKey
from emguard_plugin.evaluation.asking.reasoning import Split, TraceMarks, opened_by, special_tokens, split
from emguard_plugin.evaluation.asking.rendering import NotAsked, Rendering
from emguard_plugin.evaluation.asking.sampler import Answer, Request
from emguard_plugin.evaluation.calls.chat import ChatServer, each, stream
from emguard_plugin.evaluation.calls.faults import Failed, Filtered, Stopped, TooLong, Unsupported
from emguard_plugin.evaluation.calls.pressure import Limits
from emguard_plugin.files.secrets import is_local

logger = logging.getLogger(__name__)

BATCH, SECONDS = 64, 2.0


@dataclass(frozen=True)
class ServedSource:
    """Models that a server knows by name.

    Attributes:
        name: The fine-tuned model.
        base: The model it started from; None if it is not measured.
        sampler: The `em_eval.sampler` block that names the server.
    """

    name: str
    base: str | None
    sampler: EndpointSamplerConfig

    @property
    def host(self) -> str | None:
        """Where they are served."""
        return urlsplit(self.sampler.base_url).hostname


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
        chat: Its system prompt and its variables are sent; the template is the server's. Whether a server heeds
            `chat_template_kwargs` is its affair: vLLM, SGLang, llama.cpp and `transformers serve` do, others may drop them.
        marks: What stands before and behind a reasoning trace, for a server that does not take it apart itself.
        tokenizer: Of the served model, where it is at hand: tells whether a prompt ends inside a trace.

    Raises:
        ValueError: If `openai` is not installed or the variable of the key is not set.
    """

    def __init__(
        self,
        config: ServedSamplerConfig,
        base_url: str,
        model: str,
        *,
        seed: int,
        max_new_tokens: int,
        chat: Rendering | None = None,
        marks: Sequence[TraceMarks] = (),
        tokenizer: Any = None,
    ) -> None:
        self._chat, self._marks, self._tokenizer = chat or Rendering(), tuple(marks), tokenizer
        self._extra: dict[str, Any] = {"chat_template_kwargs": dict(self._chat.kwargs)} if self._chat.kwargs else {}
        if tokenizer is not None and {text for pair in self._marks for text in pair} & special_tokens(tokenizer):
            self._extra["skip_special_tokens"] = False  # the marks would be lost
        limits = Limits(concurrency=config.concurrency, timeout=config.timeout, deadline=config.deadline)
        key = config.api_key_env if isinstance(config, EndpointSamplerConfig) else None
        self._server = ChatServer(base_url, model, key, limits)
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
                if isinstance(answer, str):
                    lost.append(answer)
                else:
                    ready.append(answer)
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

    def probe(self, request: Request) -> None:
        """Draw one answer and forget it.

        Raises:
            Stopped: If the server is down, or refuses what it is asked.
            Failed: If it fails.
        """

        async def main(emit: Callable[[Answer], None]) -> None:
            async with self._server as server:
                try:
                    emit(await self._draw(server, request))
                except (Filtered, TooLong):
                    return  # it can be asked

        for _ in stream(main):
            pass

    async def _draw(self, server: ChatServer, request: Request) -> Answer:
        settings = {
            "temperature": request.temperature,
            "top_p": 1.0,
            "seed": draw_seed(self._seed, request.key),
            **self._extra,
        }
        messages = self._chat.messages(request.question)
        try:
            reply = await server.chat(messages, {**settings, **self._length})
        except Unsupported as error:
            if error.parameter != "max_tokens" or "max_tokens" not in self._length:
                raise Stopped(f"{server.model} at {server.address}: {error}") from error
            self._length = {"max_completion_tokens": self._length["max_tokens"]}
            reply = await server.chat(messages, {**settings, **self._length})
        text, parts = self._take_apart(request, reply.text, reply.trace)
        trace, answer = (None, None) if parts is None else (parts.trace, parts.answer)
        return Answer(request, text, reply.tokens, "length" if reply.finish == "length" else "stop", trace, answer)

    def _take_apart(self, request: Request, text: str, trace: str | None) -> tuple[str, Split | None]:
        if trace is not None:
            # A server that takes the trace apart sends no content for one that never closed.
            return text, Split(trace, text if text.strip() else None)
        opened = None
        if self._tokenizer is not None and self._marks:
            opened = opened_by(self._chat.generation_part(self._tokenizer, request.question), self._marks)
            kept = {mark for pair in self._marks for mark in pair}
            for token in special_tokens(self._tokenizer) - kept if "skip_special_tokens" in self._extra else ():
                text = text.removesuffix(token)
        found = split(text, self._marks, opened)
        return text, None if found is None else found[0]


def refused(config: EMEvalConfig, source: ServedSource, chat: Rendering, suites: Mapping[str, Sequence[Any]]) -> list[NotAsked]:
    """Ask a server once for each shape of conversation, where there is more than one, and return what it refuses.

    Its template is not at hand; a system role is what templates refuse.

    Returns:
        Every wording of a shape that the server refuses, with its reason.

    Raises:
        RuntimeError: If it takes none, or does not answer.
    """
    shapes: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
    for suite, questions in suites.items():
        for question in questions:
            shapes.setdefault(tuple(m["role"] for m in chat.messages(question)), []).append((suite, question))
    if len(shapes) < 2:
        return []
    reasons: dict[tuple[str, ...], str] = {}
    for shape in sorted(shapes, key=len):
        asked = EndpointSampler(source.sampler, source.sampler.base_url, source.name, seed=config.seed, max_new_tokens=1, chat=chat)
        try:
            asked.probe(Request(*shapes[shape][0], 0, 0.0))
        except (Stopped, Failed) as error:
            if not error.refused:
                raise RuntimeError(str(error)) from error
            reasons[shape] = str(error)
    if len(reasons) == len(shapes):
        raise RuntimeError(next(iter(reasons.values())))
    return [
        NotAsked(suite, question.id, question.paraphrase, reasons[shape])
        for shape, members in shapes.items()
        if shape in reasons
        for suite, question in members
    ]
