"""Keys come from environment variables and go nowhere else: not into files, logs or messages, nor to other hosts."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

_known: set[str] = set()
# What keys of well-known services look like, for keys that a server sends back and that are not ours.
_SHAPES = re.compile(r"(?i:bearer\s+)[^\s\"',}]+|\b(?:sk|hf|xai|gsk|nvapi)[-_][A-Za-z0-9_\-*]{12,}|\bAIza[\w-]{20,}")


def read_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, and remember it for `redact`.

    Args:
        variable: Name of the variable, or None for a server that asks for no key.

    Raises:
        ValueError: If the variable is not set or empty.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ValueError(
            f"`api_key_env: {variable}`: the environment variable {variable} is not set. Run `export {variable}=...` "
            "first, or name the variable that holds the key."
        )
    if len(value) >= 8:  # what is shorter (`EMPTY`, for local servers) is no secret, and occurs in ordinary text
        _known.add(value)
    return value


def redact(text: object) -> str:
    """Return text without the keys that were read, and without what looks like a key."""
    plain = str(text)
    for value in sorted(_known, key=len, reverse=True):
        plain = plain.replace(value, "[key]")
    return _SHAPES.sub("[key]", plain)


class SecretInConfigError(RuntimeError):
    """A key stands in a file. Not a ValueError: pydantic would print the value beside it."""


def refuse_keys(data: Any) -> None:
    """Raise if a mapping holds a key in place of the name of an environment variable; never print it.

    Raises:
        SecretInConfigError: naming the YAML key alone.
    """
    for key, value in data.items() if isinstance(data, dict) else ():
        if re.fullmatch(r"(?i)(api_?)?(key|token|secret|password)|authorization", str(key)):
            raise SecretInConfigError(
                f"`{key}` must not stand in a file: files are copied, logged and shared. Put it into an environment "
                "variable, and name that in `api_key_env`. Consider the key in the file as leaked."
            )
        if key == "api_key_env" and value is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", str(value)):
            raise SecretInConfigError(
                "`api_key_env` must be the name of an environment variable, such as OPENAI_API_KEY, not a key. If it is "
                "one, consider it as leaked."
            )


def check_endpoint(base_url: str, api_key_env: str | None, allow_remote: bool) -> None:
    """Raise if questions and answers should not be sent to an endpoint.

    Raises:
        ValueError: If the URL is none, carries credentials, is on another machine without `allow_remote`, or would
            carry a key without encryption.
    """
    url = urlsplit(base_url)
    if url.username or url.password or url.query:
        raise SecretInConfigError("`base_url` must not carry a key. Name a variable in `api_key_env` instead.")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"`base_url: {base_url}` is no URL such as `http://localhost:8000/v1`.")
    if is_local(base_url):
        return
    if not allow_remote:
        raise ValueError(
            f"judging would send questions and answers to {url.hostname}. Set `allow_remote: true` if they may leave "
            "this machine, or give the `base_url` of a local server."
        )
    if url.scheme == "http" and api_key_env:
        raise ValueError(f"`base_url: {base_url}` would send the key unencrypted. Use https.")


def is_local(url: str) -> bool:
    """Return whether a URL is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
