"""Faults of files, drawn from a seed: what cut disks, other programs, editors and other runs make of a file."""

import copy
import json
import random

GARBAGE = (b"5\n", b"null\n", b"{}\n", b"[]\n", b'"text"\n', b"not json\n", b"", b"\0" * 64, b"\xff\xfe\x00")
WRONG = (None, 5, -1, 1e400, float("nan"), True, "5", "text", [], {}, [5], {"a": 5})


def of_bytes(content, rng):
    """Cuts, flips and other encodings; (label, content)."""
    size = len(content)
    for _ in range(3):
        at = rng.randrange(1, size)
        yield f"cut at byte {at}", content[:at]
    at = rng.randrange(size)
    yield f"byte {at} flipped", content[:at] + bytes([content[at] ^ 1 << rng.randrange(7)]) + content[at + 1 :]
    at = rng.randrange(size)
    yield f"zeros from byte {at}", content[:at] + b"\0" * (size - at)
    yield f"no UTF-8 at byte {at}", content[:at] + b"\xc3\x28" + content[at:]
    yield "UTF-16", content.decode("utf-8", "replace").encode("utf-16")


def of_whole(rng, n=3):
    """Files that are something else."""
    for garbage in rng.sample(GARBAGE, n):
        yield f"holds {garbage[:10]!r}", garbage


def harmless(content, rng):
    """What editors and other systems do to text files."""
    yield "BOM", b"\xef\xbb\xbf" + content
    yield "CRLF", content.replace(b"\n", b"\r\n")
    yield "blank lines at the end", content + b"\n\n \n"


def places(value, path=()):
    """Every place inside a JSON value, as paths of keys and indices."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(value, rng):
    """A JSON value with one place missing or of another type; (label, value)."""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value)))
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    name = ".".join(map(str, path))
    if isinstance(parent, dict) and rng.random() < 0.4:
        del parent[path[-1]]
        return f"without {name}", value
    old = parent[path[-1]]
    new = rng.choice([wrong for wrong in WRONG if type(wrong) is not type(old) or wrong != old])
    parent[path[-1]] = new
    return f"{name} is {new!r}", value


def dumped(value):
    return (json.dumps(value) + "\n").encode()


def of_json(content, rng, n):
    """Faults of one JSON object."""
    value = json.loads(content)
    yield from of_whole(rng)
    yield from of_bytes(content, rng)
    for _ in range(n):
        label, wrong = changed(value, rng)
        yield label, dumped(wrong)


def of_lines(content, rng, n, other=None):
    """Faults of JSON Lines; `other` holds those of another run."""
    lines = content.splitlines(keepends=True)
    yield from of_whole(rng, 2)
    yield from of_bytes(content, rng)
    at = rng.randrange(len(lines))
    for wrong in rng.sample([b"5\n", b"null\n", b"{}\n", b"[]\n", b"{\n", b"\0\0\n", b"NaN\n"], 3):
        yield f"line {at + 1} is {wrong!r}", b"".join([*lines[:at], wrong, *lines[at + 1 :]])
    yield f"line {at + 1} twice", b"".join([*lines[: at + 1], *lines[at:]])
    yield f"without line {at + 1}", b"".join([*lines[:at], *lines[at + 1 :]])
    yield "lines in another order", b"".join(rng.sample(lines, len(lines)))
    if other is not None:
        yield "of another run", other
        yield f"line {at + 1} of another run", b"".join([*lines[:at], other.splitlines(keepends=True)[at], *lines[at + 1 :]])
    for _ in range(n):
        at = rng.randrange(len(lines))
        label, wrong = changed(json.loads(lines[at]), rng)
        yield f"line {at + 1}: {label}", b"".join([*lines[:at], dumped(wrong), *lines[at + 1 :]])


def of_a_binary(content, rng):
    """Faults of safetensors."""
    yield from of_whole(rng)
    for _ in range(3):
        at = rng.randrange(1, len(content))
        yield f"cut at byte {at}", content[:at]
        yield f"byte {at} flipped", content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def generator(name, seed):
    """The random numbers of one file's faults."""
    return random.Random(f"{seed}|{name}")
