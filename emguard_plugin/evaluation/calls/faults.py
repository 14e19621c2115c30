"""What went wrong with a call to a chat-completions server, and what that asks for."""

from __future__ import annotations

import math
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from emguard_plugin.evaluation.calls.size import ReplyError
from emguard_plugin.files.secrets import redact


class _Answered(Exception):
    """What a server may have answered.

    Args:
        message: What went wrong.
        status: The HTTP status that it answered with, or None where it gave none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def refused(self) -> bool:
        """Whether the server was there, and did not take or could not do what was asked."""
        return self.status is not None and self.status >= 400


class Stopped(_Answered, RuntimeError):
    """No further call makes sense, and what was not called for stays undone. What was done is kept."""


class Failed(_Answered):
    """The server did not do its work; another try may succeed."""


class Limited(Exception):
    """The server asks to wait.

    Args:
        retry_after: Seconds, or None if it did not say.
    """

    def __init__(self, retry_after: float | None) -> None:
        super().__init__("rate-limited")
        self.retry_after = retry_after


class Fatal(_Answered):
    """No call can succeed until somebody changes something."""


class Filtered(Exception):
    """A content filter stopped this prompt or its reply; the same call would end the same way."""


class TooLong(Exception):
    """The prompt does not fit into the judge's context."""


class Unsupported(Exception):
    """The server does not know a parameter, or a value of it.

    Args:
        parameter: Its name.
        message: What the server said.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


PARAMETERS = ("max_tokens", "top_logprobs", "logprobs", "temperature", "seed", "continue_final_message")
_CONTEXT = re.compile("context.{0,20}(length|window)|maximum context|too many tokens|prompt is too long", re.IGNORECASE)
_FILTER = re.compile("content.?(filter|policy|management)|safety system|flagged", re.IGNORECASE)


def classify(error: Exception, key_variable: str | None) -> Exception:
    """Return what an exception of the `openai` client means.

    Args:
        error: The exception.
        key_variable: `api_key_env` of the judge, to name in a message.
    """
    import openai

    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return Failed("no answer in time")
    if not isinstance(error, openai.APIStatusError):
        # Connection refused or reset, DNS, a reply cut off, or JSON that is none.
        cause = error.__cause__ or error
        said = str(cause) if isinstance(cause, ReplyError) else f"{type(cause).__name__}: {cause}"
        return Failed(redact(said)[:200])
    status, body = error.status_code, _body(error)
    message = redact(f"HTTP {status}: {body}")[:300]
    if status == 429:
        if "insufficient_quota" in body or "billing" in body.lower():
            return Fatal(f"{message}. The account has no quota left.", status)
        return Limited(retry_after(error.response.headers))
    if status in (401, 403):
        where = f"Check the key in {key_variable}" if key_variable else "Name the variable with a key in `api_key_env`"
        return Fatal(f"{message}. {where}.", status)
    if status == 404:
        return Fatal(f"{message}. Check `model` and `base_url`.", status)
    if 300 <= status < 400:
        where = _site(error.response.headers.get("location", ""))
        return Fatal(f"HTTP {status}: the server redirects to {where}, and redirects are not followed. Set `base_url`.", status)
    if status in (408, 409) or status >= 500:
        return Failed(message, status)
    if _CONTEXT.search(body):
        return TooLong(message)
    if _FILTER.search(body):
        return Filtered("a content filter stopped the prompt")
    unknown = next((name for name in PARAMETERS if re.search(rf"\b{name}\b", body)), None)
    return Unsupported(unknown, message) if unknown else Fatal(f"{message}. The server does not accept the request.", status)


def _site(location: str) -> str:
    """Return the site that a redirect names; what follows it may hold a key."""
    try:
        url = urlsplit(location)
    except ValueError:
        return "nowhere"
    return redact(f"{url.scheme}://{url.hostname}")[:100] if url.hostname else "nowhere"


def retry_after(headers: Any) -> float | None:
    """Return the wait that headers ask for in seconds, given as milliseconds, seconds or a date; None if unreadable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _body(error: Any) -> str:
    try:
        return redact(error.response.text)[:5000]
    except Exception:  # a stream that broke off has no text
        return str(error)
