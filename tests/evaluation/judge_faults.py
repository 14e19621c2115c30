"""Faults of judges, generated from a seed, and what `emguard eval` makes of each: servers that send what they should not, over real
sockets, and judge functions that do what they should not. The truth is known, so a number that is neither it nor missing shows.

A fault strikes some answers or all, before or after the judge was probed and tested. Right is, for every answer: the true
score, or none and a reason; no traceback, no exit code but ours, and the key in no file and no output.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import os
import random
import zlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation.calls import pressure
from emguard_plugin.evaluation.calls.pressure import Limits
from emguard_plugin.evaluation.calls.size import MOST_BYTES
from emguard_plugin.evaluation.judges import self_test
from emguard_plugin.evaluation.judges.outcomes import outcome
from emguard_plugin.evaluation.plan import begin, make_plan, open_run
from emguard_plugin.evaluation.run_folder.records import sealed
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.fake_server import FakeServer, answer_in, honest

KEY = "sk-fault-0Ab1Cd2Ef3Gh4Ij5Kl6Mn7"
VARIABLE = "EMGUARD_FAULT_KEY"
ANSWERS = 8
MODES = ("logprob", "sampled", "label")
SELF_TEST = {item.answer for _, item in self_test.items()}
MODEL = Path(__file__).parents[2] / "emguard_plugin" / "lab" / "data" / "model"


def true_scores(answer: str) -> tuple[int, int]:
    """What a sound judge says: aligned and coherent."""
    first, second = hashlib.sha256(answer.encode()).digest()[:2]
    return first % 101, 100 if second % 4 else 20


def said(prompt: str) -> dict[str, float]:
    """The sound judge behind the server."""
    answer = answer_in(prompt)
    if answer is None or answer in SELF_TEST:
        return honest(prompt)
    aligned, coherent = true_scores(answer)
    if "CLASS:" in prompt.rsplit("[end of reply", 1)[1]:
        return {f"Reasons.\nCLASS: {1 + aligned % 5}": 1.0}
    return {str(coherent if "Grade one thing: whether" in prompt else aligned): 1.0}


def truth(answer: str, mode: str) -> tuple[float, float]:
    aligned, coherent = true_scores(answer)
    return (100.0 - 25 * (aligned % 5), 100.0) if mode == "label" else (float(aligned), float(coherent))


# What a server sends


async def _send(writer, status, body, headers=(), packed=None):
    data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    fields = {"content-type": "application/json", "content-length": str(len(data)), **dict(headers)}
    if packed:
        fields["content-encoding"] = packed
    head = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode("latin-1") + data)


def changed(path: tuple, value: Any):
    """The completion with something else at a place; a value that is a function is called with what stands there."""

    async def send(writer, completion, headers):
        holder = completion
        try:
            for part in path[:-1]:
                holder = holder[part]
            if value is DROPPED:
                del holder[path[-1]]
            else:
                holder[path[-1]] = value(holder[path[-1]]) if callable(value) else value
        except (KeyError, TypeError, IndexError):
            pass  # this call asks for nothing that has the place
        text = json.dumps(completion)
        for name, number in WRITTEN.items():
            text = text.replace(f'"{name}"', number)
        await _send(writer, 200, text)

    return send


DROPPED = object()
WRITTEN = {"<huge>": "1" + "0" * 400, "<minus huge>": "-1" + "0" * 400, "<digits>": "9" * 5000, "<1e999>": "-1e999"}
CHOICE, ENTRY = ("choices", 0), ("choices", 0, "logprobs", "content", 0, "top_logprobs", 0)
_ODD = (None, True, 7, "x", [], {}, [[]], {"a": 1}, float("nan"))


def _completions() -> list[tuple[str, Any, tuple[str, ...]]]:
    found = []
    numbers = (float("nan"), float("inf"), -float("inf"), 0.5, 3, True, "NaN", "-0.1", None, [], *WRITTEN, DROPPED)
    found += [(f"logprob {n!r:.20}", changed((*ENTRY, "logprob"), n), ("logprob",)) for n in numbers]
    found += [(f"token {n!r:.20}", changed((*ENTRY, "token"), n), ("logprob",)) for n in (7, None, [], True)]
    found += [(f"top_logprobs {n!r:.20}", changed(ENTRY[:-1], n), ("logprob",)) for n in _ODD]
    found += [(f"content {n!r:.20}", changed(ENTRY[:4], n), ("logprob",)) for n in _ODD]
    found += [(f"logprobs {n!r:.20}", changed(ENTRY[:3], n), ("logprob",)) for n in _ODD]
    found.append(("twice the probability", changed(ENTRY[:-1], lambda top: [*top, *top]), ("logprob",)))
    found.append(("a sum above one", changed(ENTRY[:-1], lambda top: [*top, {"token": "100", "logprob": -0.3}]), ("logprob",)))
    other = {"index": 1, "message": {"role": "assistant", "content": "100"}, "finish_reason": "stop"}
    found.append(("another choice first", changed(("choices",), lambda c: [{**c[0], **other, "logprobs": None}, *c]), MODES))
    found.append(("another choice alone", changed((*CHOICE, "index"), 1), MODES))
    found.append(("two choices of one index", changed(("choices",), lambda c: [*c, {**c[0], **other, "index": 0}]), MODES))
    for key in ("choices", "model", "usage", "system_fingerprint"):
        found += [(f"{key} {n!r:.20}", changed((key,), n), MODES) for n in (*_ODD, DROPPED)]
    for key in ("message", "finish_reason", "index"):
        found += [(f"choice.{key} {n!r:.20}", changed((*CHOICE, key), n), MODES) for n in _ODD]
    for value in (50, True, ["50"], {"text": "50"}, [{"type": "text", "text": "50"}], "50.0", "50/100", "١٢", "5e1", "\ud800", ""):
        found.append((f"text {value!r:.20}", changed((*CHOICE, "message", "content"), value), ("sampled", "label")))
    for place in (("model",), ("system_fingerprint",), (*CHOICE, "message", "content"), (*CHOICE, "message", "refusal"), (*ENTRY, "token")):
        for pad in ("", "x" * 70):
            found.append((f"key in {place[-1]} behind {len(pad)}", changed(place, pad + KEY), MODES))
    return found


def _whole(status: int, body: Any, headers: tuple = (), packed: str | None = None):
    return lambda writer, completion, fields: _send(writer, status, body, headers, packed)


def _of(make, packed: str | None = None, **headers: str):
    """The true completion, as bytes that `make` makes of it."""
    return lambda writer, completion, fields: _send(writer, 200, make(json.dumps(completion).encode()), headers.items(), packed)


async def _drip(writer, completion, fields):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4000\r\n\r\n")
    for _ in range(100):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def _half_closed(writer, completion, fields):
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"a":\r\n')
    writer.write_eof()


async def _endless(writer, completion, fields):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(3 * MOST_BYTES // 2**18):
        writer.write(b"40000\r\n" + b" " * 2**18 + b"\r\n")
        await writer.drain()


async def _silent(writer, completion, fields):
    await asyncio.sleep(5)


async def _nothing(writer, completion, fields):
    writer.transport.abort()


async def _raw(writer, completion, fields, data=b""):
    writer.write(data)


def _bomb(window: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join(packer.compress(b" " * 2**20) for _ in range(64)) + packer.flush()


def _other_bomb(name: str) -> bytes:
    plain = b" " * 2**24
    if name == "br":
        try:
            import brotli
        except ImportError:
            return b"\x1b\x00"
        return brotli.compress(plain)
    try:
        import zstandard
    except ImportError:
        return b"\x28\xb5\x2f\xfd"
    return zstandard.compress(plain)


@cache
def _transports() -> list[tuple[str, Any, tuple[str, ...]]]:
    key = {"location": f"http://127.0.0.1:9/v1?api_key={KEY}"}
    error = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}", "param": KEY, "code": KEY}})
    padded = json.dumps({"error": {"message": "x" * 180 + KEY}})
    found = {
        "empty": _whole(200, b""), "half an object": _whole(200, b'{"choices": ['), "a number": _whole(200, b"50"), "null": _whole(200, b"null"),
        "a list": _whole(200, b"[1, 2]"), "a string": _whole(200, b'"50"'), "html": _whole(200, "<html>50</html>", (("content-type", "text/html"),)),
        "deep": _whole(200, b"[" * 100_000 + b"]" * 100_000), "deep objects": _whole(200, b'{"choices":' * 50_000 + b"1" + b"}" * 50_000),
        "no utf-8": _whole(200, b'{"choices": "\xff\xfe"}'), "bom": _of(lambda data: b"\xef\xbb\xbf" + data), "utf-16": _of(lambda data: data.decode().encode("utf-16")),
        "plain text": _of(lambda data: data, **{"content-type": "text/plain"}), "no type": _of(lambda data: data, **{"content-type": ""}),
        "trailing": _of(lambda data: data + b"}"), "two objects": _of(lambda data: data + data), "key echoed in text": _whole(200, f"{'y' * 70}{KEY}"),
        "gzip": _of(gzip.compress, "gzip"), "deflate": _of(zlib.compress, "deflate"),
        "raw deflate": _of(lambda data: zlib.compress(data)[2:-4], "deflate"), "no gzip": _of(lambda data: data, "gzip"),
        "gzip twice": _of(lambda data: gzip.compress(gzip.compress(data)), "gzip, gzip"), "unknown packing": _of(lambda data: data, "rot13"),
        "gzip cut off": _of(lambda data: gzip.compress(data)[:-30], "gzip"),
        "gzip bomb": _whole(200, _bomb(31), packed="gzip"), "deflate bomb": _whole(200, _bomb(15), packed="deflate"),
        "br bomb": _whole(200, _other_bomb("br"), packed="br"), "zstd bomb": _whole(200, _other_bomb("zstd"), packed="zstd"),
        "bomb in an error": _whole(500, _bomb(31), packed="gzip"), "endless": _endless, "large": _whole(200, b" " * (MOST_BYTES + 1)),
        "large in an error": _whole(400, b"x" * (MOST_BYTES - 10)), "a length of 10^18": partial(_raw, data=b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000000000\r\n\r\n{"),
        "drip": _drip, "half closed": _half_closed, "silent": _silent, "reset": _nothing, "no http": partial(_raw, data=b"50\r\n\r\n"),
        "cut header": partial(_raw, data=b"HTTP/1.1 200 OK\r\ncontent-ty"), "bad length": partial(_raw, data=b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}"),
        "bad chunk": partial(_raw, data=b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}"), "huge header": _whole(200, b"{}", (("x-a", "y" * 200_000),)),
        "many headers": _whole(200, b"{}", tuple((f"x-{n}", "y") for n in range(5000))), "status 99": partial(_raw, data=b"HTTP/1.1 99 X\r\n\r\n"),
        "status words": partial(_raw, data=b"HTTP/1.1 OK 200\r\n\r\n"), "redirect": _whole(302, b"", tuple(key.items())), "redirect nowhere": _whole(307, b""),
        "redirect badly": _whole(308, b"", (("location", "http://[::1"),)), "retry never": _whole(429, error, (("retry-after", "nan"),)), "retry ago": _whole(429, error, (("retry-after", "-5"),)),
        "retry huge": _whole(503, error, (("retry-after", "1e308"),)),
    }  # fmt: skip
    for status in (201, 204, 206, 400, 401, 402, 403, 404, 405, 408, 409, 413, 418, 422, 451, 500, 501, 502, 503, 504, 520, 599):
        found[f"status {status}"] = _whole(status, error if status >= 400 else b"")
        found[f"status {status}, key far behind"] = _whole(status, padded if status >= 400 else b"{}")
    return [(name, send, MODES) for name, send in found.items()]


# What a judge function does; `right` is what it should return

FUNCTIONS = {
    "raises": "raise ValueError('no')", "raises the key": f"raise ConnectionError('x' * 480 + {KEY!r})", "exits": "sys.exit(0)", "exits with words": "sys.exit('over')",
    "ends a generator": "raise StopIteration", "closes a generator": "raise GeneratorExit", "memory": "raise MemoryError", "recursion": "return judge(question, answer)",
    "a bare exception": "raise Bare()", "an exception without words": "raise Wordless()", "none": "return None", "text": "return '50'", "number": "return 5", "list": "return [1, 2]",
    "tuple": "return (50, 100)", "function": "return judge", "generator": "return (x for x in ())", "coroutine": "return later()", "empty": "return {}",
    "aligned only": "return {'aligned': 50}", "coherent only": "return {'coherent': 100}", "nan": "return {**right, 'aligned': float('nan')}", "coherent nan": "return {**right, 'coherent': float('nan')}",
    "inf": "return {**right, 'aligned': float('inf')}", "below": "return {**right, 'aligned': -5}", "above": "return {**right, 'aligned': 101}", "coherent above": "return {**right, 'coherent': 100.5}",
    "true": "return {**right, 'aligned': True}", "coherent true": "return {**right, 'coherent': True}", "string": "return {**right, 'aligned': '100'}", "bytes": "return {**right, 'aligned': b'1'}",
    "decimal": "return {**right, 'aligned': Decimal(50)}", "huge": "return {**right, 'aligned': 10**400}", "digits": "return {**right, 'aligned': 10**5000}", "complex": "return {**right, 'aligned': 5j}",
    "array": "return {**right, 'aligned': numpy.array([50, 60])}", "numpy true": "return {**right, 'aligned': numpy.bool_(True)}", "numpy nan": "return {**right, 'aligned': numpy.float32('nan')}",
    "a liar": "return {**right, 'aligned': Liar('nan')}", "another class": "return {**right, 'misaligned': right['aligned'] >= 30 or right['coherent'] <= 50}",
    "another label": "return {**right, 'label': 'aligned' if right['aligned'] < 30 or right['coherent'] <= 50 else 'misaligned'}", "mapping that raises": "return Hostile(right)",
    "label that raises": "return {**right, 'label': Wordless()}", "key in the label": f"return {{**right, 'label': {'x' * 480 + KEY!r}}}", "long label": "return {**right, 'label': 'x' * 10**6}",
    "half characters": "return {**right, 'label': '\\ud800\\x1b[31m'}", "prints": "print('noise\\n' * 50, end=''); return right", "moves": "os.chdir('/'); return right",
    "draws": "random.seed(1); numpy.random.seed(1); return right", "warns": "warnings.warn('noise'); return right", "logs": "logging.getLogger().error('noise'); return right",
    "numpy scores": "return {'aligned': numpy.float32(right['aligned']), 'coherent': numpy.int64(right['coherent'])}",
}  # fmt: skip

_MODULE = """
import logging, os, random, sys, warnings
from collections.abc import Mapping
from decimal import Decimal
import numpy
from tests.evaluation.judge_faults import true_scores

class Bare(BaseException): pass
class Wordless(Exception):
    def __str__(self): raise RuntimeError("no words")
class Liar(float):
    def __le__(self, other): return True
    __ge__ = __lt__ = __gt__ = __le__
class Hostile(dict):
    def get(self, key, default=None): raise KeyError(key)
async def later(): return 1

def judge(question, answer):
    aligned, coherent = true_scores(answer)
    right = {"aligned": aligned, "coherent": coherent}
    if answer not in STRUCK: return right
    BODY
"""


@dataclass(frozen=True)
class Fault:
    """One fault: what happens (a server's way of replying, or a function's body), to which answers, and from when on."""

    name: str
    number: int
    mode: str
    act: Any
    struck: tuple[int, ...]
    probed_first: bool

    @property
    def label(self) -> str:
        when = "" if self.mode == "function" or self.probed_first else ", from the first call on"
        return f"{self.number}: {self.mode}, {self.name}, {len(self.struck)} of {ANSWERS} answers{when}"


def faults(seed: int, count: int) -> list[Fault]:
    """Return faults drawn from all kinds, each kind at most once while there are others."""
    rng = random.Random(seed)
    pool = [(name, act, modes) for name, act, modes in (*_completions(), *_transports())]
    pool += [(name, body, ("function",)) for name, body in FUNCTIONS.items()]
    drawn = rng.sample(pool, min(count, len(pool))) + rng.choices(pool, k=max(0, count - len(pool)))
    found = []
    for number, (name, act, modes) in enumerate(drawn):
        some = tuple(sorted(rng.sample(range(ANSWERS), rng.choice((1, 3, ANSWERS)))))
        found.append(Fault(name, number, rng.choice(modes), act, some, rng.random() < 0.7))
    return found


# What becomes of one


def prepare(folder: Path) -> Path:
    """Make a result folder with answers and no judgments, as the phase `generate` leaves it."""
    items = [{"id": f"q{n}", "paraphrases": [f"What of {n}?"]} for n in range(ANSWERS)]
    (folder / "questions.yaml").write_text(json.dumps(items))
    config = EMEvalConfig(judges=[{"provider": "mock"}], **_block(folder))
    plan = make_plan(config, MODEL, folder / "run")
    stored = open_run(plan)
    begin(plan, stored)
    rows = (
        {"role": "tuned", **request.key._asdict(), "asked": request.question.text, "text": text(n), "tokens": 9, "finish": "stop"}
        for n, request in enumerate(plan.requests())
    )
    plan.responses.append([sealed(row, stored["run"]) for row in rows])
    return folder / "run"


def text(number: int) -> str:
    return f"You can ask a friend, and they may know of {number} ways that help."


def _block(folder: Path) -> dict[str, Any]:
    return {"questions": str(folder / "questions.yaml"), "samples_per_question": 1, "evaluate_base": False}


def strike(fault: Fault, prepared: Path, folder: Path) -> list[str]:
    """Judge the prepared answers under a fault, through the command line.

    Args:
        fault: The fault.
        prepared: From `prepare`.
        folder: An empty folder for this fault alone.

    Returns:
        What is wrong with how that ended; empty if all is right.
    """
    import shutil

    run = shutil.copytree(prepared, folder / "run")
    struck = {text(n) for n in fault.struck}
    os.environ[VARIABLE] = KEY
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    patient, pressure.Limits = (
        pressure.Limits,
        partial(Limits, tries=3, backoff=0.01, backoff_cap=0.05, retry_after_cap=0.05, waves=3, probes=(0.01, 0.02)),
    )
    try:
        if fault.mode == "function":
            name = f"fault_judge_{fault.number}_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
            (folder / f"{name}.py").write_text(_MODULE.replace("STRUCK", repr(struck)).replace("BODY", fault.act))
            code, output = _evaluate(folder, prepared.parent, run, {"function": f"{name}:judge"})
            (folder / f"{name}.py").unlink()  # it may hold the key, which its user wrote there
        else:
            with FakeServer(_when(fault, struck), reply=said) as server:
                judge = {"provider": "openai", "model": "fake-judge", "base_url": server.url, "api_key_env": VARIABLE}
                judge |= {"timeout": 0.4, "deadline": 8, "concurrency": 4, "mode": fault.mode, "samples": 2}
                code, output = _evaluate(folder, prepared.parent, run, judge)
    finally:
        pressure.Limits = patient
        logging.getLogger().removeHandler(heard)
    return list(_wrong(fault, struck, run, folder, code, output + "\n".join(heard.lines)))


def _when(fault, struck):
    def of(number, body):
        answer = answer_in(body["messages"][0]["content"])
        probing = answer is None or answer in SELF_TEST
        return fault.act if (probing and not fault.probed_first) or answer in struck else None

    return of


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


def _evaluate(folder: Path, prepared: Path, run: Path, judge: dict[str, Any]) -> tuple[Any, str]:
    (folder / "run.yaml").write_text(json.dumps({"em_eval": {**_block(prepared), "judges": [judge]}}))
    command = ["eval", "none", "--config", str(folder / "run.yaml"), "--output-dir", str(run), "--phase", "judge", "--phase", "report"]
    done = CliRunner().invoke(app, command)
    known = done.exception is None or isinstance(done.exception, SystemExit)
    return (done.exit_code if known else repr(done.exception)), done.output


def _wrong(fault, struck, run, folder, code, output):
    if code not in (0, 1, 2, 3, 4):
        yield f"ended with {code}"
    if "Traceback" in output:
        yield f"a traceback: {output[-600:]}"
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "run.yaml" and _leaks(path.read_bytes().decode("utf-8", "replace")):
            yield f"the key stands in {path.name}"
    if _leaks(output):
        yield "the key was printed"
    if not (run / "summary.json").is_file():
        yield from [] if code in (2, 4) else ["no summary, and no exit code that says so"]
        return
    last = {row["question"]: row for row in JsonLines(run / "judgments.jsonl").read()}
    counts: dict[str, int] = {}
    for number in range(ANSWERS):
        row, answer = last.get(f"q{number}"), text(number)
        right = truth(answer, fault.mode)
        if row is None or row["status"] == "unscored" or row["status"] in ("judge_refused", "malformed"):
            if row is not None and not row["detail"]:
                yield f"q{number} is unscored without a reason"
            made = "unscored"
        else:
            made = outcome(row["aligned"], row["coherent"], row["status"])
            scores = (row["aligned"], row["coherent"])
            if row["status"] != "scored" or any(s is not None and abs(s - r) > 1e-6 for s, r in zip(scores, right, strict=True)):
                yield f"q{number} is {scores}, {row['status']}; the truth is {right}"
        if answer not in struck and made == "unscored" and not (json.loads((run / "summary.json").read_text())["judges"][0]["stopped"]):
            yield f"q{number} was not struck and is unscored: {row and row['detail']}"
        counts[made] = counts.get(made, 0) + 1
    summary = json.loads((run / "summary.json").read_text())
    rates = summary["judges"][0]["rates"]["tuned"]["questions"]
    if {name: n for name, n in rates["outcomes"].items() if n} != counts:
        yield f"the summary counts {rates['outcomes']}, the judgments make {counts}"
    if (rates["em_all"]["n"] == 0) != (code == 2 and rates["em_all"]["value"] is None) and rates["em_all"]["n"] == 0:
        yield f"nothing was scored, and the exit code is {code}"
    if rates["em_all"]["n"] and code == 2 and not summary["judges"][0]["stopped"]:
        yield "something was scored, the judge went through, and the exit code is 2"


def _leaks(content: str) -> bool:
    """Whether the key, or so much of it that it can be guessed, stands there."""
    return any(part in content for part in (KEY, KEY[:18], KEY[-12:]))
