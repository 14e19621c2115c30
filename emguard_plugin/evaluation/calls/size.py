"""A limit on replies that decompression cannot pass: what counts is what comes out, and it is counted while it does."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from typing import Any

MOST_BYTES = 4 * 2**20
"""Longest reply, unpacked. An answer of 32,000 tokens takes about 200,000."""
HEADERS = {"accept-encoding": "identity"}
"""Replies are short. Who packs them nevertheless is unpacked under the limit, in the two ways that can be stopped midway."""


class ReplyError(Exception):
    """A reply that is too large, or packed in a way that was not asked for."""


async def limit(response: Any) -> None:
    """Replace the body of a response, before any of it is read, by one that ends in an error at `MOST_BYTES`.

    A response hook of httpx, or of httpx2, which later `openai` clients use.

    Raises:
        ReplyError: If the header says that it is longer, or packed otherwise than by gzip or deflate.
    """
    coding = response.headers.get("content-encoding", "identity").strip().lower() or "identity"
    if coding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise ReplyError(f"the reply is packed by {coding[:40]!r}, which was not asked for")
    length = response.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > MOST_BYTES:
        raise ReplyError(_too_long())
    response.headers.pop("content-encoding", None)
    response.stream = _limited(response.stream, None if coding == "identity" else _unpacked(coding))


def _limited(stream: Any, unpack: Any) -> Any:
    # The client asks for a stream of its own library's class.
    kind: Any = next(kind for kind in type(stream).__mro__ if kind.__name__ == "AsyncByteStream")

    class Limited(kind):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = MOST_BYTES
            async for part in stream:
                plain = part if unpack is None else unpack(part, left)
                left -= len(plain)
                if left < 0:
                    raise ReplyError(_too_long())
                yield plain

        async def aclose(self) -> None:
            await stream.aclose()

    return Limited()


def _unpacked(coding: str) -> Any:
    # Both forms that servers call deflate: with zlib's header, and without.
    forms = [zlib.decompressobj(47)] + ([zlib.decompressobj(-15)] if coding == "deflate" else [])

    def unpack(part: bytes, left: int) -> bytes:
        while True:
            try:
                # One byte more than is left tells a reply of just that length from a longer one.
                return forms[0].decompress(part, left + 1)
            except zlib.error as error:
                if len(forms) == 1:
                    raise ReplyError(f"the reply is not what its header says, {coding}: {error}") from None
                forms.pop(0)

    return unpack


def _too_long() -> str:
    return f"the reply is longer than {MOST_BYTES // 2**20} MiB"
