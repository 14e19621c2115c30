"""Calls to one OpenAI-compatible server, patient with what passes and quick to stop at what does not."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from emguard_plugin.evaluation.calls import size
from emguard_plugin.evaluation.calls.faults import Failed, Fatal, Filtered, Limited, Stopped, classify
from emguard_plugin.evaluation.calls.pressure import Limits, Pressure
from emguard_plugin.evaluation.calls.reply import Reply, read_reply
from emguard_plugin.files.secrets import is_local, read_key, redact

T = TypeVar("T")


class ChatServer:
    """One model behind an OpenAI-compatible endpoint.

    Args:
        base_url: The endpoint, up to and including `/v1`.
        model: Name of the model there.
        api_key_env: Name of the environment variable with the key; None for a server that asks for none.
        limits: How patient to be.

    Raises:
        ValueError: If `openai` is not installed or the variable is not set.
    """

    def __init__(self, base_url: str, model: str, api_key_env: str | None, limits: Limits) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"talking to {base_url} needs the package `openai`, which cannot be imported ({error}). "
                "Run `pip install 'emguard-plugin[judge]'`."
            ) from error
        self.base_url, self.model, self.limits = base_url, model, limits
        self.host = urlsplit(base_url).hostname or base_url
        self.address = address(base_url)
        self.models: set[str] = set()
        self.fingerprints: set[str] = set()
        self.calls = 0
        self._variable, self._key = api_key_env, read_key(api_key_env)
        self._client: Any = None
        self._pressure: Pressure | None = None

    async def __aenter__(self) -> ChatServer:
        """Open the connections, in the running event loop."""
        import openai

        # A redirect would carry the answers, and perhaps the key, to a host that nobody named. Proxies are for what is
        # remote; a server on this machine is asked directly.
        transport = openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            trust_env=not is_local(self.base_url),
            headers=size.HEADERS,
            event_hooks={"response": [size.limit]},
        )
        self._client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self.limits.timeout,
            http_client=transport,
        )
        self._pressure = Pressure(self.limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.close()

    async def chat(self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any], need_logprobs: bool = True) -> Reply:
        """Return the reply to one conversation.

        Args:
            messages: The conversation.
            settings: The other keys of the request body.
            need_logprobs: Whether a reply without logprobs is a failure, where `settings` asks for them.

        Raises:
            Failed: If no try succeeded.
            Filtered: If a content filter stopped it, or the model's own refusal field is set.
            TooLong: If the conversation does not fit.
            Unsupported: If the server does not know a key of `settings`.
            Stopped: If no call can succeed.
        """
        body = {"model": self.model, "messages": list(messages), **settings}
        limits, pressure, failures = self.limits, self._pressure, 0
        assert pressure is not None  # since the server was entered
        while True:
            probe = await pressure.enter()
            try:
                found = await self._once(body, need_logprobs)
                pressure.succeeded()
                return found
            except Limited as limited:
                pressure.limited(probe, limited.retry_after)
            except Failed as failed:
                pressure.failed(probe, str(failed), failed.status)
                failures += 1
                if failures >= limits.tries:
                    raise Failed(f"{failures} tries failed, the last with: {failed}", failed.status) from failed
            except Fatal as fatal:
                raise Stopped(f"{self.model} at {self.address}: {fatal}", fatal.status) from fatal
            except (Stopped, asyncio.CancelledError):
                raise
            except Exception:  # the server answered, in its way
                pressure.succeeded()
                raise
            finally:
                pressure.leave()
            if failures:
                await asyncio.sleep(random.uniform(0, min(limits.backoff_cap, limits.backoff * 2 ** (failures - 1))))

    async def _once(self, body: dict[str, Any], need_logprobs: bool) -> Reply:
        self.calls += 1
        assert self._pressure is not None
        try:
            async with asyncio.timeout(min(self.limits.timeout, self._pressure.left())):
                # `post`, not `chat.completions.create`: it returns plain JSON for a third less processor time, and
                # what a hostile or broken server sends is checked below and not assumed to have a type.
                raw = await self._client.post("/chat/completions", cast_to=object, body=body)
        except (Stopped, asyncio.CancelledError):
            raise
        except Exception as error:
            # Not chained: the client's exceptions hold the request with its headers.
            raise classify(error, self._variable) from None
        try:
            return self._read(raw, need_logprobs and bool(body.get("logprobs")))
        except RecursionError:
            raise Failed("the server sent no chat completion: it is nested too deeply") from None

    def _read(self, raw: Any, need_logprobs: bool) -> Reply:
        # What is sent back may repeat the key: it goes before anything is cut short, shown or stored.
        reply = read_reply(self._without_key(raw), need_logprobs)
        if not same_model(self.model, reply.model):
            raise Fatal(
                f"asked for the model {self.model}, and {redact(reply.model)[:100]} answered. Set `model` to what the server serves."
            )
        self.models.add(reply.model)
        self.fingerprints.update({reply.fingerprint[:200]} - {""})
        if reply.finish == "content_filter":
            raise Filtered("a content filter stopped the reply")
        if reply.refusal:
            raise Filtered(f"the model declined: {reply.refusal[:80]!r}")
        if need_logprobs and reply.first is None:
            raise Failed("the server sent no logprobs")
        return reply

    def _without_key(self, raw: Any) -> Any:
        if not self._key or len(self._key) < 8:
            return raw
        if isinstance(raw, str):
            return raw.replace(self._key, "[key]")
        if isinstance(raw, list):
            return [self._without_key(part) for part in raw]
        return {self._without_key(k): self._without_key(v) for k, v in raw.items()} if isinstance(raw, dict) else raw


def address(base_url: str) -> str:
    """Return host and port of a URL, for messages: neither a path nor anything that may be a key."""
    url = urlsplit(base_url)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    return f"{host}:{url.port or (443 if url.scheme == 'https' else 80)}"


def same_model(asked: str, answered: str) -> bool:
    """Whether a server's name for the model that answered is a name for the one asked for.

    Servers add a snapshot (`name-2024-08-06`), a tag (`name:latest`) or a revision (`name@main`), and proxies drop the
    provider (`openai/name`).

    Returns:
        False where another model answered than was asked for.
    """
    if answered == asked or asked.endswith("/" + answered):
        return True
    rest = answered.removeprefix(asked)
    return rest != answered and (rest[0] in ":@" or (rest[0] == "-" and rest[1:].replace("-", "").isdigit()))


def stream(main: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]) -> Iterator[T]:
    """Run a coroutine in a thread with an event loop of its own, and yield what it emits.

    So it works inside a running event loop (notebooks) as well. Leaving the iteration early cancels the coroutine.

    Args:
        main: Called with `emit`.

    Yields:
        What `main` emits, in that order.
    """
    out: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

    async def supervised() -> None:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        await main(lambda value: out.put(("value", value)))

    def target() -> None:
        try:
            asyncio.run(supervised())
            out.put(("end", None))
        except BaseException as error:
            out.put(("error", error))

    thread = threading.Thread(target=target, daemon=True, name="emguard-calls")
    thread.start()
    try:
        while True:
            kind, value = out.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        if thread.is_alive() and running:
            loop, task = running[0]
            with suppress(RuntimeError):  # the loop may have ended by itself
                loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=10)


async def each(count: int, workers: int, do: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """Run `do(index)` for every index, `workers` at once; the first exception cancels the others and is raised."""
    indices = iter(range(count))

    async def worker() -> None:
        for index in indices:
            await do(index)

    tasks = [asyncio.create_task(worker()) for _ in range(min(workers, count))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
