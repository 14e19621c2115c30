"""Text to tokens that know which characters they cover."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

Ids = tuple[int, ...]
_UNTRIMMED: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


class Encoded(NamedTuple):
    """Token ids, and the half-open span of characters that each covers."""

    ids: Ids
    spans: tuple[tuple[int, int], ...]


def tokenize(tokenizer: Any, text: str) -> Ids:
    """Tokenise rendered template text, which has its own BOS."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, text: str) -> Encoded:
    """Tokenise rendered template text, with offsets.

    A tokenizer written in Python has none: its tokens are placed by decoding them one after the other.

    Returns:
        The token ids, and where each token begins and ends in the text.
    """
    if getattr(tokenizer, "is_fast", False):
        found = _offsets(tokenizer, text)
        if found is not None:
            return found
    ids = tokenize(tokenizer, text)
    return Encoded(ids, place(tokenizer, ids, text))


def _offsets(tokenizer: Any, text: str) -> Encoded | None:
    backend = tokenizer.backend_tokenizer
    trimmed = backend.post_processor
    if trimmed is not None and b'"trim_offsets":true' in bytes(trimmed.__getstate__()):
        # Its offsets leave blanks out, so a token that begins with the template's last blank would seem to begin behind it.
        kept = _UNTRIMMED.get(tokenizer)
        if kept is None or kept[0] is not backend:
            from tokenizers import processors

            plain = copy.deepcopy(backend)
            plain.post_processor = processors.Sequence([])
            kept = _UNTRIMMED[tokenizer] = (backend, plain)
        kept[1].no_padding()
        kept[1].no_truncation()
        found = kept[1].encode(text, add_special_tokens=False)
        if tuple(found.ids) != tokenize(tokenizer, text):
            return None
        return Encoded(tuple(found.ids), tuple(found.offsets))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Encoded(tuple(found["input_ids"]), tuple((a, b) for a, b in found["offset_mapping"]))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids, special tokens included, as it stands."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def place(tokenizer: Any, ids: Sequence[int], text: str) -> tuple[tuple[int, int], ...]:
    """Return where each token stands in `text`, by the length of the text decoded up to it.

    A token whose text is not there yet (a part of a character) shares the place of the one that completes it.
    """
    spans: list[tuple[int, int]] = []
    done = 0
    for n in range(1, len(ids) + 1):
        said = decode(tokenizer, ids[:n])
        if len(said) > done and text.startswith(said):
            spans += [(done, len(said))] * (n - len(spans))
            done = len(said)
    return (*spans, *[(done, len(text))] * (len(ids) - len(spans)))


def read(tokenizer: Any, ids: Sequence[int]) -> tuple[str, Encoded]:
    """Return the text of a row of ids and where its tokens stand in it."""
    text = decode(tokenizer, ids)
    found = _offsets(tokenizer, text) if getattr(tokenizer, "is_fast", False) else None
    if found is not None and found.ids == tuple(ids):
        return text, found
    return text, Encoded(tuple(ids), place(tokenizer, ids, text))


def inside(encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """Return the half-open range of the tokens that lie wholly within the characters `start` to `end`.

    A token that straddles either end is left out. (0, 0) where there is none.
    """
    first = last = -1
    for i, (a, b) in enumerate(encoded.spans):
        if a >= start and b <= end and (a < end):
            first, last = (i if first < 0 else first), i
        elif first >= 0:
            break
    return (first, last + 1) if first >= 0 else (0, 0)


def touching(encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """Return the half-open range of the tokens of which some character lies within `start` to `end`."""
    found = [i for i, (a, b) in enumerate(encoded.spans) if a < end and b > start]
    return (found[0], found[-1] + 1) if found else (0, 0)
