"""Keys come from environment variables and go nowhere else: not into files, logs or messages, nor to other hosts."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

_known: set[str] = set()
# What keys of well-known services look like, for keys that stand where nobody expects one.
_SHAPES = re.compile(
    r"(?i:\b(?:bearer|basic)\s+)[^\s\"',}]{6,}|\b(?:sk|pk|rk|hf|xai|gsk|nvapi|r8|tgp|gh[opsur]|github_pat|glpat|xox[abeprs]|SG|ya29)[-_.][A-Za-z0-9_\-*.]{10,}"
    r"|\bAIza[\w-]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\beyJ[\w-]{8,}\.[\w.-]+|-----BEGIN [A-Z ]+-----[\s\S]*"
    r"|\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"
)
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"`]+@")
_SIGNED = re.compile(
    r"(?i)(?P<name>[?&;](?:x-(?:amz|goog|oss|ms)-[\w-]+|sig|signature|se|sp|sv|sr|skoid|sktid|key|apikey|api[-_]key|code|token|\w*[-_]token|"
    r"auth\w*|policy|awsaccesskeyid|googleaccessid|key-pair-id|secret|password|passwd|pwd|credential)=)[^&;\s#'\"`]+"
)
_SECRET_WORDS = re.compile(
    r"(?i)(?:api)?keys?|token|secrets?|passwords?|passphrase|passwd|pwd|auth|authorization|authentication|authtoken|bearer|credentials?|cookies?"
)
_HEX = re.compile("[0-9a-fA-F]{32,}")


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
        # A name in capitals is a name; anything else may be a key that was written in its place.
        name = variable if re.fullmatch("[A-Z][A-Z0-9_]*", variable) and not looks_like_key(variable) else None
        raise ValueError(
            f"`api_key_env: {name or '...'}`: the environment variable {name or 'of that name'} is not set. Run `export "
            f"{name or 'NAME'}=...` first, or name the variable that holds the key."
        )
    remember(value)
    return value


def remember(value: str) -> None:
    """Let `redact` strike out a value from now on."""
    if len(value) >= 8:  # what is shorter (`EMPTY`, for local servers) is no secret, and occurs in ordinary text
        _known.add(value)


def redact(text: object) -> str:
    """Return text without the keys that were read, and without what looks like a key, a password or a signature in a URL."""
    plain = str(text)
    for value in sorted(_known, key=len, reverse=True):
        plain = plain.replace(value, "[key]")
    plain = _SIGNED.sub(r"\g<name>[key]", _USERINFO.sub("[key]@", plain))
    return _SHAPES.sub("[key]", plain)


def shown(value: Any, longest: int = 80) -> str:
    """Return how a value of a YAML may stand in a message: words and numbers as they are, never a key, at most one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value) if abs(value) < 1e30 else f"{value:.3e}" if isinstance(value, float) else "a number of over 30 digits"
    if isinstance(value, str):
        text = "[key]" if looks_like_key(value) else redact(value)
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        return text if len(text) <= longest else f"{text[:longest]}..."
    return {"dict": "a mapping", "list": "a list"}.get(type(value).__name__, f"a value of type {type(value).__name__}")


def looks_like_key(text: str) -> bool:
    """Whether a text has the form of an API key, a token, or a URL with a password or a signature."""
    if _SHAPES.search(text) or _USERINFO.search(text) or _SIGNED.search(text):
        return True
    path = "/" in text or "sha256=" in text  # commits and hashes are parts of addresses
    for piece in re.split(r"[/._\-+=\s:#@,;()\[\]|]+", text):
        if _HEX.fullmatch(piece):
            if len(set(piece)) > 4 and not (path and len(piece) in (40, 64)):
                return True
        elif len(piece) >= 20 and sum(c.isdigit() for c in piece) >= 3:
            kinds = ["digit" if c.isdigit() else "upper" if c.isupper() else "lower" for c in piece]
            changes = sum(a != b for a, b in pairwise(kinds))
            if changes >= 0.4 * len(piece):  # words and years change seldom, random characters mostly
                return True
    return False


def is_secret_name(key: object) -> bool:
    """Whether the name of a YAML key says that a secret stands there: `openai_api_key`, `accessToken`, `api-key`."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", str(key))
    return any(_SECRET_WORDS.fullmatch(word) for word in re.split(r"[^A-Za-z]+", words))


class SecretInConfigError(RuntimeError):
    """A key stands in a file. Not a ValueError: pydantic would print the value beside it."""


def refuse_keys(data: Any, where: str = "", _seen: tuple[int, ...] = ()) -> None:
    """Raise if a key stands anywhere in a block, whatever field it was put in; never print it.

    Args:
        data: The block as YAML gave it.
        where: Its place in the file, for the message.

    Raises:
        SecretInConfigError: naming the YAML key alone.
    """
    if id(data) in _seen:
        return
    seen = (*_seen, id(data))
    if isinstance(data, list | tuple):
        for index, value in enumerate(data):
            _refuse_value(value, f"{where}[{index}]", "")
            refuse_keys(value, f"{where}[{index}]", seen)
    for key, value in data.items() if isinstance(data, dict) else ():
        place = f"{where}.{shown(str(key))}".lstrip(".")
        if looks_like_key(str(key)):
            remember(str(key))
            raise _found(f"{where}: a key" if where else "a key")
        if key == "api_key_env" and isinstance(value, str):
            _check_variable(value)
        elif is_secret_name(key) and key != "api_key_env" and value is not None and not isinstance(value, bool):
            for text in value if isinstance(value, list) else [value]:
                remember(str(text))
            raise _found(f"`{shown(str(key))}`" + (f" (in `{where}`)" if where else ""))
        else:
            _refuse_value(value, place, str(key))
            refuse_keys(value, place, seen)


def _refuse_value(value: Any, place: str, key: str) -> None:
    if isinstance(value, str) and looks_like_key(value) and not (key == "revision" and len(value) == 40 and _HEX.fullmatch(value)):
        remember(value)
        what = "an address with a password or a signature" if "://" in value else "what looks like a key"
        instead = "Save what is there as a file, and give its path." if "://" in value and key != "base_url" else _BY_VARIABLE
        raise _found(f"`{place}` holds {what}, which", instead)


_BY_VARIABLE = "Put it into an environment variable, and name that in `api_key_env`."


def _found(what: str, instead: str = _BY_VARIABLE) -> SecretInConfigError:
    return SecretInConfigError(
        f"{what} must not stand in a file: files are copied, logged and shared. {instead} Consider the key in the file as leaked."
    )


def _check_variable(value: str) -> None:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", value) or looks_like_key(value):
        remember(value)
        raise SecretInConfigError(
            "`api_key_env` must be the name of an environment variable, such as OPENAI_API_KEY, not a key. If it is one, consider it as "
            "leaked."
        )


def remember_secrets(data: Any, _seen: tuple[int, ...] = ()) -> None:
    """Let `redact` strike out what stands under names like `hub_token:` anywhere in a host's settings."""
    if id(data) in _seen:
        return
    seen = (*_seen, id(data))
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if isinstance(value, str) and (looks_like_key(value) or (is_secret_name(key) and key != "api_key_env")):
            remember(value)
        remember_secrets(value, seen)


def check_endpoint(base_url: str, api_key_env: str | None, allow_remote: bool) -> None:
    """Raise if questions and answers should not be sent to an endpoint.

    Raises:
        ValueError: If the URL is none, carries credentials, is on another machine without `allow_remote`, or would
            carry a key without encryption.
        SecretInConfigError: If a key stands in the URL or in place of the variable's name.
    """
    bad = f"`base_url: {shown(base_url)}` is no URL such as `http://localhost:8000/v1`"
    try:
        url = urlsplit(base_url)
        host, port = url.hostname, url.port
    except ValueError as exc:  # port 99999, brackets of an IPv6 address that do not close
        raise ValueError(f"{bad}: {redact(exc)}.") from None
    if url.username or url.password or url.query or url.fragment:
        raise SecretInConfigError("`base_url` must not carry a key. Name a variable in `api_key_env` instead.")
    if url.scheme not in ("http", "https") or not host or port == 0 or re.search(r"[\s\\]", base_url):
        raise ValueError(f"{bad}.")
    if is_local(base_url):
        return
    if not allow_remote:
        raise ValueError(
            f"judging would send questions and answers to {url.hostname}. Set `allow_remote: true` if they may leave "
            "this machine, or give the `base_url` of a local server."
        )
    if url.scheme == "http" and api_key_env:
        raise ValueError(f"`base_url: {shown(base_url)}` would send the key unencrypted. Use https.")


def is_local(url: str) -> bool:
    """Return whether a URL is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
