"""Makes faulty copies of every file of ours that training reads: cut, flipped, emptied, of another type or run. Seeded.

`MUTATIONS` are functions of (bytes, rng, other files' bytes) that return new bytes; `cases` draws them for each file.
"""

import json
import random
import re

SEED = 20261126


def truncated(data, rng, others):
    return data[: rng.randrange(len(data))]


def flipped(data, rng, others):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def flipped_early(data, rng, others):
    """In the header of a safetensors file, the first fields of a JSON."""
    at = rng.randrange(min(len(data), 200))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def emptied(data, rng, others):
    return b""


def zeros(data, rng, others):
    """What a power cut leaves of a file that was never synced."""
    return bytes(len(data))


def garbage(data, rng, others):
    return rng.randbytes(len(data))


def not_utf8(data, rng, others):
    at = rng.randrange(len(data))
    return data[:at] + b"\xff\xfe" + data[at:]


def other_json(data, rng, others):
    return rng.choice(
        [b"5", b"null", b"[]", b"{}", b'"x"', b"true", b"[" * 100_000, b"NaN", b'{"format": 2}', b'{"sha256": 1, "format": 2}']
    )


def another_type(data, rng, others):
    """One value of a JSON becomes another kind of value; in a binary file, one number a NaN."""
    try:
        stated = json.loads(data)
    except ValueError:
        at = rng.randrange(max(len(data) - 8, 1))
        return data[:at] + b"\x00\x00\xc0\x7f" + data[at + 4 :]
    key = rng.choice(sorted(stated))
    stated[key] = rng.choice([None, 5, "x", [], {}, True, float("nan"), [1, [2]], -1e400])
    return json.dumps(stated).encode()


def without_a_key(data, rng, others):
    try:
        stated = json.loads(data)
    except ValueError:
        return re.sub(rb'"sha256":"[0-9a-f]{64}"', b'"sha255":"' + b"0" * 64 + b'"', data)
    stated.pop(rng.choice(sorted(stated)))
    return json.dumps(stated).encode()


def of_another_run(data, rng, others):
    return others["same"]


def of_another_kind(data, rng, others):
    return rng.choice([b for b in others["kinds"] if b != data])


def doubled(data, rng, others):
    return data + data


MUTATIONS = [
    truncated, truncated, flipped, flipped, flipped_early, emptied, zeros, garbage, not_utf8, other_json, another_type, another_type,
    without_a_key, of_another_run, of_another_kind, doubled,
]  # fmt: skip


def cases(files, seed=SEED):
    """Yield (file, name of the mutation, function of the others' bytes) for every file."""
    for name in files:
        for n, mutate in enumerate(MUTATIONS):
            rng = random.Random(f"{seed} {name} {n}")
            yield name, mutate.__name__, lambda data, others, m=mutate, r=rng: m(data, r, others)
