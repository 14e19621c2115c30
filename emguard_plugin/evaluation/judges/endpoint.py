"""A judge model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from emguard_plugin.evaluation.calls.chat import ChatServer, each, stream
from emguard_plugin.evaluation.calls.faults import Failed, Filtered, Stopped, TooLong
from emguard_plugin.evaluation.calls.pressure import Limits
from emguard_plugin.evaluation.calls.reply import Reply
from emguard_plugin.evaluation.judges import prompts, scales
from emguard_plugin.evaluation.judges.base import JUDGE_REFUSED, MALFORMED, Item, Judgment
from emguard_plugin.evaluation.judges.probe import Dialect, find_mode
from emguard_plugin.evaluation.judges.scales import Reading
from emguard_plugin.evaluation.judges.trie import walk
from emguard_plugin.files.secrets import is_local

logger = logging.getLogger(__name__)


def _known(stored: Mapping[str, Any]) -> tuple[str, Dialect] | None:
    """Return what an earlier run found out, or None where the file that says so was damaged: a probe finds out again."""
    try:
        dialect = Dialect.read(stored["dialect"])
    except (KeyError, TypeError, ValueError):
        return None
    return (stored["mode"], dialect) if stored.get("mode") in ("logprob", "trie", "sampled", "label") else None


class EndpointJudge:
    """Asks a chat model for two numbers, or for one class.

    Modes: `logprob` reads the probability of every number from the first token; `trie` does so digit by digit, for
    models whose tokenizer splits numbers; `sampled` draws several numbers and takes the mean; `label` asks for a class
    from 1 to 5. `auto` lets a probe choose between the first three.

    Args:
        model: Name of the model at the server.
        base_url: The server, up to and including `/v1`.
        api_key_env: Name of the environment variable with the key, or None.
        mode: `auto` or a mode.
        samples: Draws per number in the mode `sampled`.
        limits: How patient to be.
        max_calls: Refuse to begin if more calls may be needed, or None.
        name: Name of the judge in files and tables; default is the model's.
    """

    self_tested = True
    quick_to_open = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key_env: str | None = None,
        mode: str = "auto",
        samples: int = 5,
        limits: Limits | None = None,
        max_calls: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or model
        self.server = ChatServer(base_url, model, api_key_env, limits or Limits())
        self._asked_mode, self._samples, self._max_calls = mode, samples, max_calls
        self.mode = ""
        self._dialect = Dialect()

    def identity(self) -> dict[str, Any]:
        """Return server, model, the mode that was asked for, and the prompts' hash."""
        return {
            "provider": "openai",
            "model": self.server.model,
            "host": self.server.host,  # without the port, which changes with every start of a local server
            "mode_asked": self._asked_mode,
            "samples": self._samples,
            "prompts": prompts.identity(),
        }

    def open(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Find the scoring mode by asking for known numbers; keep the one an earlier run found."""
        if not is_local(self.server.base_url):
            logger.warning("em_eval: questions and answers are sent to %s to be judged", self.server.host)
        if stored and (known := _known(stored)):
            self.mode, self._dialect = known
            return dict(stored)

        async def probe(emit: Callable[[Any], None]) -> None:
            async with self.server as server:
                emit(await find_mode(server, self._asked_mode))

        try:
            self.mode, self._dialect = next(stream(probe))
        except Failed as error:
            raise Stopped(f"{self.server.model} at {self.server.address} does not answer: {error}") from error
        except (Filtered, TooLong) as error:
            raise Stopped(f"{self.server.model} at {self.server.address}: {error}") from error
        return {"mode": self.mode, "dialect": self._dialect.stored()}

    def served(self) -> dict[str, Any]:
        """Return the names under which models have answered so far; more than one is a change of model."""
        return {"models": sorted(self.server.models), "system_fingerprints": sorted(self.server.fingerprints)[:20]}

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Judgment]]:
        """Yield judgments as they arrive."""
        self._check_cost(len(items))

        async def main(emit: Callable[[tuple[int, Judgment]], None]) -> None:
            async with self.server as server:

                async def one(index: int) -> None:
                    emit((index, await self._judge(server, items[index])))

                await each(len(items), self.server.limits.concurrency, one)

        yield from stream(main)

    def close(self) -> None:
        """Do nothing: connections are closed with each batch of calls."""

    def _check_cost(self, items: int) -> None:
        per_item = {"logprob": 2, "trie": 2 * 12, "sampled": 2 * self._samples, "label": 1}[self.mode]
        if self._max_calls is not None and items * per_item > self._max_calls:
            raise Stopped(
                f"judging {items} answers may take {items * per_item} calls in the mode {self.mode}, and `max_calls` "
                f"is {self._max_calls}. Raise it, or lower `em_eval.samples_per_question`."
            )

    async def _judge(self, server: ChatServer, item: Item) -> Judgment:
        answer = item.answer
        for shortened in (False, True):
            try:
                if self.mode == "label":
                    found = await self._label(server, prompts.render("label", item, answer))
                else:
                    aligned = await self._reading(server, prompts.render("aligned", item, answer))
                    found = scales.combine(aligned, await self._reading(server, prompts.render("coherent", item, answer)))
            except Filtered as error:
                return Judgment(None, None, JUDGE_REFUSED, str(error))
            except Failed as error:
                return Judgment.unscored(str(error))
            except TooLong as error:
                if shortened:
                    return Judgment(None, None, MALFORMED, f"too long for the judge even without its middle: {error}")
                answer = prompts.shorten(item.answer)
                continue
            return found.noted(prompts.SHORTENED if shortened else "")
        raise AssertionError("unreachable")

    async def _reading(self, server: ChatServer, prompt: str) -> Reading:
        found = Reading()
        # A reply that cannot be read gets one more draw.
        for attempt in range(2):
            found = await self._score(server, prompt, attempt)
            if not found.problem:
                break
        return found

    async def _score(self, server: ChatServer, prompt: str, attempt: int) -> Reading:
        if self.mode == "sampled":
            draws = range(attempt * self._samples, (attempt + 1) * self._samples)
            settings = [self._dialect.text(8, temperature=1.0, seed=seed) for seed in draws]
            return scales.average([scales.read_number((await self._ask(server, prompt, s)).text) for s in settings])

        async def first(prefix: str) -> dict[str, float]:
            settings = self._dialect.first_token(seed=attempt, after_prefix=bool(prefix))
            found = (await self._ask(server, prompt, settings, prefix)).first
            assert found is not None  # a reply without logprobs is a failure
            return found

        return scales.weigh(await walk(first) if self.mode == "trie" else await first(""))

    async def _label(self, server: ChatServer, prompt: str) -> Judgment:
        text = ""
        for attempt in range(2):
            text = (await self._ask(server, prompt, self._dialect.text(400, temperature=0.0, seed=attempt))).text
            found = scales.read_label(text)
            if found:
                return found
        return Judgment(None, None, MALFORMED, f"no class on the last line of {text[-80:]!r}")

    async def _ask(self, server: ChatServer, prompt: str, settings: Mapping[str, Any], prefix: str = "") -> Reply:
        messages = [{"role": "user", "content": prompt}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        return await server.chat(messages, settings)
