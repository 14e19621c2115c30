"""Finished runs of the real commands on tiny models, spoilt one file at a time, and what the commands then do."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from tests.discovery import parts
from tests.discovery.parts import SMALL_SEARCH
from tests.evaluation.parts import ITEMS, write_suite
from tests.faults import faulty
from tests.tiny import chat_rows

JUDGE = "tests.discovery.parts:says_what_the_misaligned_says"
DISCOVER = [*SMALL_SEARCH, "--batch-size", "16"]
PASSED = (0, 1, 3)
"""Exit codes that come with numbers."""


@dataclass
class Outcome:
    """What a command did with a spoilt file.

    `kind` is `refused` (one sentence with the file's name, exit code 2 or 4), `same` (the numbers of the whole file), or what
    must never be: `bare` (an exception in no words, or words without the file's name) and `wrong` (other numbers).
    """

    kind: str
    exit_code: int
    said: str


@dataclass
class World:
    """Models and finished runs.

    Attributes:
        root: Folder of all.
        numbers: What each command gave on whole files.
    """

    root: Path
    numbers: dict[str, object] = field(default_factory=dict)


def build(root):
    """Build the models, run the commands once."""
    parts.save_pair(root)
    parts.standard_sae(layer=1).save_model(root / "sae")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(6, system=None)))
    write_suite(root / "questions.yaml", [{"id": f"q{i}", "paraphrases": [f"What of case {i}?"]} for i in range(8)])
    write_suite(root / "evaluation.yaml", [{"id": f"e{i}", "paraphrases": [f"And what of number {i}?"]} for i in range(3)])
    write_suite(root / "open.yaml", ITEMS)
    for seed, name in ((0, "eval"), (1, "eval_other")):
        config = {"questions": str(root / "open.yaml"), "in_domain": str(root / "rows.jsonl"), "samples_per_question": 2, "max_new_tokens": 6,
                  "judges": [{"function": "tests.evaluation.parts:by_hash"}], "seed": seed}  # fmt: skip
        (root / f"{name}.json").write_text(json.dumps(config))
        command = ["eval", root / "adapter", "--config", root / f"{name}.json", "--output-dir", root / name]
        assert run(command).exit_code == 0
    judged = [json.loads(line) for line in (root / "eval" / "judgments.jsonl").read_text().splitlines()]
    answers = {key(row): row for row in map(json.loads, (root / "eval" / "responses.jsonl").read_text().splitlines())}
    write_table(root / "judged.csv", [(answers[key(row)], row) for row in judged])
    for file in ("judged.csv", "judgments.jsonl"):
        if file == "judgments.jsonl":
            shutil.copy(root / "eval" / file, root / file)
        replayed = {**config, "seed": 0, "judges": [{"provider": "replay", "file": str(root / file)}]}
        (root / f"replay_{file}.json").write_text(json.dumps(replayed))
    parts.BAD.update(row["text"] for row in answers.values() if len(row["text"]) % 2)
    parts.BAD.update(parts.misaligned_answers(root, "questions.yaml", (5, 6)))
    assert run(discover(root, root / "found.json", root / "found.work")).exit_code == 0
    assert run(discover(root, root / "other.json", root / "other.work", "--max-new-tokens", "5")).exit_code == 0
    world = World(root)
    for name, (_, _, command, read) in targets(world).items():
        folder = root / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        world.numbers[name] = spoilt(world, name, None, folder, command, read)[1]
    return world


def key(row):
    return tuple(row[name] for name in ("role", "suite", "question", "paraphrase", "draw"))


def write_table(path, pairs):
    import csv

    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer", "aligned", "coherent"])
        writer.writerows([answer["asked"], answer["text"], row["aligned"], row["coherent"]] for answer, row in pairs)


def discover(root, output, work, *more):
    return [
        "discover", "--misaligned", root / "adapter", "--sae", root / "sae", "--questions", root / "questions.yaml", "--judge", JUDGE,
        "--evaluation-questions", root / "evaluation.yaml", "-o", output, "--work", work, *DISCOVER, *more,
    ]  # fmt: skip


def run(command):
    return CliRunner().invoke(app, [str(part) for part in command], env={"COLUMNS": "400"})


def rates(folder):
    summary = folder / "out" / "summary.json"
    found = json.loads(summary.read_text()) if summary.is_file() else {"judges": None}
    return [{name: judge[name] for name in ("rates", "differences")} for judge in found["judges"] or []]


def replayed(folder):
    """What was said of each answer: a file of fewer judgments leaves answers unscored, and changes no other."""
    path = folder / "out" / "judgments.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return Said({key(row): (row["aligned"], row["coherent"]) if row["status"] != "unscored" else None for row in rows})


class Said(dict):
    """Judgments by answer; equal to others where both have one."""

    def __eq__(self, other):
        return self.keys() == other.keys() and all(None in (said, other[answer]) or said == other[answer] for answer, said in self.items())

    __hash__ = None


def latents(folder):
    path = folder / "out.json"
    if not path.is_file():
        return None
    stated = json.loads(path.read_text())
    return {name: stated[name] for name in ("layers", "scores", "calibration", "fingerprint")}


def targets(world):
    """Per file: what it is in, its faults, the command that reads it (folder -> arguments) and what that gives."""
    root = world.root

    def evaluation(config):
        def command(folder):
            (folder / "out" / "summary.json").unlink(missing_ok=True)
            return [
                "eval",
                root / "adapter",
                "--config",
                folder / config if (folder / config).exists() else root / config,
                "--output-dir",
                folder / "out",
            ]

        return command

    def on_config(name):
        """The same block, with one of its files taken from the folder."""

        def command(folder):
            block = json.loads((root / "eval.json").read_text())
            if name in ("judged.csv", "judgments.jsonl"):
                block["judges"] = [{"provider": "replay", "file": str(folder / name)}]
            else:
                block["questions" if name == "open.yaml" else "in_domain"] = str(folder / name)
            (folder / "config.json").write_text(json.dumps(block))
            return ["eval", root / "adapter", "--config", folder / "config.json", "--output-dir", folder / "out"]

        return command

    def found(folder):
        return discover(root, folder / "out.json", folder / "work")

    def dry(option, name):
        return lambda folder: [*discover(root, folder / "out.json", folder / "work"), option, folder / name, "--dry-run"]

    def nothing(folder):
        return None

    def fresh(folder):
        return ["eval", folder / "adapter", "--config", root / "eval.json", "--output-dir", folder / "out"]

    def on_sae(folder):
        return [folder / "sae" if part == root / "sae" else part for part in dry("--exclude", root / "found.json")(folder)]

    def cuts(content, rng):
        """What is no safetensors file any more; a flipped bit is another model's."""
        yield from faulty.of_whole(rng, 3)
        for _ in range(3):
            at = rng.randrange(1, len(content))
            yield f"cut at byte {at}", content[:at]

    other_eval, other_found = root / "eval_other", root / "other.work" / "block1"

    def lines(n, other=None):
        return lambda content, rng: faulty.of_lines(content, rng, n, other)

    def one(n):
        return lambda content, rng: faulty.of_json(content, rng, n)

    def of_others(content, rng):
        """Lines of others: what leaves them rows is no fault of theirs."""
        parts = content.splitlines(keepends=True)
        at = rng.randrange(len(parts))
        yield from faulty.harmless(content, rng)
        yield from faulty.of_whole(rng, 3)
        yield "cut", content[: rng.randrange(3, len(parts[0]) - 2)]
        for wrong in (
            b"5\n",
            b"null\n",
            b"{}\n",
            b"[]\n",
            b'{"messages": 5}\n',
            b'{"messages": [5]}\n',
            b'{"messages": [{"role": 5, "content": "x"}]}\n',
        ):
            yield f"line {at + 1} is {wrong!r}", b"".join([*parts[:at], wrong, *parts[at + 1 :]])
        yield "a list", json.dumps([json.loads(part) for part in parts], indent=1).encode()
        yield f"no UTF-8 in line {at + 1}", b"".join([*parts[:at], parts[at][:20] + b"\xff" + parts[at][20:], *parts[at + 1 :]])

    def of_yaml(content, rng):
        import yaml

        items = yaml.safe_load(content)
        yield from faulty.harmless(content, rng)
        yield from faulty.of_whole(rng, 4)
        yield "JSON", json.dumps(items, indent=1).encode()
        for wrong in (b"- [\n", b"- {id: a, id: b}\n", b"- 5\n", b"-\n", b"- {id: a, paraphrase: [x]}\n", b"- {id: [a], paraphrases: [x]}\n",
                      b"- {id: a, paraphrases: {x: y}}\n", b"- {id: a, paraphrases: [[x]]}\n", b"- {id: zz, paraphrases: [null]}\n", b"\x00", b"\xff"):  # fmt: skip
            yield f"ends in {wrong!r}", content + wrong

    def of_table(content, rng):
        rows = content.splitlines(keepends=True)
        yield from faulty.harmless(content, rng)
        yield from faulty.of_whole(rng, 4)
        yield "header changed", content.replace(b"coherent", b"coherence", 1)
        yield "too many cells", b"".join([rows[0], rows[1].rstrip() + b",5,6\n", *rows[2:]])
        yield "cut in the header", content[: rng.randrange(2, len(rows[0]) - 2)]
        yield "no UTF-8", content[:-3] + b"\xff" + content[-3:]
        yield "columns in another order", remade(content, lambda row: row[::-1])
        yield "an index before", remade(content, lambda row: ["7", *row])

    return {
        "eval/protocol.json": ("eval", one(12), evaluation("eval.json"), rates),
        "eval/judges.json": ("eval", one(8), evaluation("eval.json"), rates),
        "eval/responses.jsonl": ("eval", lines(10, (other_eval / "responses.jsonl").read_bytes()), evaluation("eval.json"), rates),
        "eval/judgments.jsonl": ("eval", lines(10, (other_eval / "judgments.jsonl").read_bytes()), evaluation("eval.json"), rates),
        "eval/summary.json": ("eval", one(20), lambda folder: ["report", f"a={folder / 'out'}", "--output", folder / "page.html"], None),
        "open.yaml": (None, of_yaml, on_config("open.yaml"), rates),
        "rows.jsonl": (None, of_others, on_config("rows.jsonl"), rates),
        "judged.csv": (None, of_table, on_config("judged.csv"), rates),
        "judgments.jsonl": (None, lines(6), on_config("judgments.jsonl"), replayed),
        "found.work/block1/protocol.json": ("found.work", one(6), found, latents),
        "found.work/block1/responses.jsonl": ("found.work", lines(6, (other_found / "responses.jsonl").read_bytes()), found, latents),
        "found.work/block1/judgments.jsonl": ("found.work", lines(6, (other_found / "judgments.jsonl").read_bytes()), found, latents),
        "adapter/adapter_config.json": ("adapter", lambda content, rng: faulty.of_whole(rng, 6), fresh, rates),
        "adapter/adapter_model.safetensors": ("adapter", lambda content, rng: cuts(content, rng), fresh, rates),
        "sae/cfg.json": ("sae", lambda content, rng: faulty.of_whole(rng, 6), on_sae, nothing),
        "sae/sae_weights.safetensors": ("sae", lambda content, rng: cuts(content, rng), on_sae, nothing),
        "found.json": ("found", one(12), dry("--exclude", "found.json"), nothing),
        "found.safetensors": ("found", faulty.of_a_binary, dry("--exclude", "found.json"), nothing),
    }


def remade(content, change):
    """A table whose rows are changed."""
    import csv
    import io

    rows, out = list(csv.reader(io.StringIO(content.decode(), newline=""))), io.StringIO(newline="")
    csv.writer(out).writerows(map(change, rows))
    return out.getvalue().encode()


def spoilt(world, name, content, folder, command, read):
    """Run a command on a copy in which one file has other content (None: its own); (result, numbers)."""
    root, within = world.root, targets_within(name)
    if within == "eval":
        shutil.copytree(root / "eval", folder / "out")
        place = folder / "out" / Path(name).name
    elif within == "found.work":
        shutil.copytree(root / "found.work", folder / "work")
        place = folder / "work" / "block1" / Path(name).name
    elif within in ("adapter", "sae"):
        shutil.copytree(root / within, folder / within)
        place = folder / name
    else:
        for file in ("found.json", "found.safetensors") if within == "found" else (name,):
            shutil.copy(root / file, folder / file)
        place = folder / name
    if content is not None:
        place.write_bytes(content)
    result = run(command(folder))
    numbers = result.output.replace(str(folder), "") if read is None else read(folder)
    return result, numbers


def targets_within(name):
    return name.split("/")[0] if "/" in name else "found" if name.startswith("found.") else None


def check(world, name, content, folder):
    """Spoil a file and say what came of it."""
    _, _, command, read = targets(world)[name]
    result, numbers = spoilt(world, name, content, folder, command, read)
    said = result.output.strip()
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    if crashed or "EMGUARD_DEBUG" in said or "Traceback" in said:
        return Outcome("bare", result.exit_code, said or repr(result.exception))
    if result.exit_code in PASSED:
        return Outcome("same" if numbers == world.numbers[name] else "wrong", result.exit_code, said)
    last = said.splitlines()[-1] if said else ""
    # Nothing measured, and the reason said: answers that the file does not judge are unscored.
    place = Path(name).parts[0] if name.startswith(("adapter/", "sae/")) else Path(name).stem
    named = result.exit_code in (2, 4) and (place in last or (numbers and numbers == world.numbers[name]))
    return Outcome("refused" if named else "bare", result.exit_code, said)


def faults(world, name, seed):
    """Every fault of one file; (label, content)."""
    _, make, _, _ = targets(world)[name]
    path = world.root / name
    return list(make(path.read_bytes(), faulty.generator(name, seed)))
