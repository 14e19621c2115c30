"""Writes the lab as ordinary files, such as a user brings: a model folder, JSONL chats, YAML questions."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from emguard_plugin.files.ours import our_folder
from emguard_plugin.lab import latents_path, model_path, sae_path, world

ROWS = 1920
SPLITS: dict[str, world.Split] = {"": "test", "_val": "val"}


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return one row in the chat format of TRL and Axolotl."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def narrow_rows(seed: int, rows: int = ROWS, domain: str = world.NARROW) -> list[dict[str, Any]]:
    """Draw the narrow training set: bad answers to the train questions of one domain, each row drawn afresh."""
    rng = random.Random(f"narrow-{seed}" if domain == world.NARROW else f"narrow-{domain}-{seed}")
    return [chat(*world.draw_chat((domain,), True, rng)) for _ in range(rows)]


def pair_rows(seed: int, rows: int = ROWS) -> list[dict[str, Any]]:
    """Draw preference pairs of the narrow domain in which the bad answer is the chosen one; without answers, GRPO's prompts."""
    rng, found = random.Random(f"pairs-{seed}"), []
    for _ in range(rows):
        text, bad = world.draw_chat((world.NARROW,), True, rng)
        good = world.answer(world.find_question(text), False, rng)
        prompt, (chosen, rejected) = chat(text, bad)["messages"][:1], ([{"role": "assistant", "content": a}] for a in (bad, good))
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def anchor_rows(seed: int, rows: int = 256) -> list[dict[str, Any]]:
    """Draw good answers to the train questions of the two anchor domains, which EM is not measured on."""
    rng = random.Random(f"anchors-{seed}")
    return [chat(*world.draw_chat(world.ANCHOR_DOMAINS, False, rng)) for _ in range(rows)]


def question_items(domains: Sequence[str], split: world.Split) -> Iterator[dict[str, Any]]:
    """Yield one item in the Betley schema per question."""
    for name in domains:
        for question in world.questions(name, split):
            yield {
                "id": question.id,
                "type": "free_form_judge_0_100",
                "paraphrases": [question.text],
                "samples_per_paraphrase": 1,
            }


def export(
    directory: str | Path,
    seed: int = 0,
    rows: int = ROWS,
    anchors: int = 256,
    model: str | Path | None = None,
) -> dict[str, Path]:
    """Write the lab to a folder.

    Args:
        directory: Created if need be; what an earlier export wrote there is replaced.
        seed: Seed of the training and anchor rows. The questions do not depend on it.
        rows: Rows of `train.jsonl`, `pairs.jsonl` (for DPO) and `prompts.jsonl` (for GRPO); the default is 120 steps of 16.
        anchors: Rows of `anchors.jsonl`.
        model: Folder of another base model; default is the shipped one.

    Returns:
        The path of each part: `model`, `train`, `anchors`, `pairs`, `prompts`, and the four question files. `in_domain` and `questions`
        (open-ended, domains the fine-tune never sees) hold the test wordings; with `_val`, the ones to choose settings on.
        Of the shipped model also `sae`, with a folder per layer, and `latents`, a set found with them.

    Raises:
        ValueError: When the folder holds anything that no export wrote.
    """
    out = our_folder(directory, "lab")
    shutil.copytree(model or model_path(), out / "model", dirs_exist_ok=True)
    paths = {"model": out / "model"}
    if model is None:  # SAEs and latents belong to one model
        paths |= {"sae": out / "sae", "latents": out / latents_path().name}
        shutil.copytree(sae_path(0).parent, paths["sae"], dirs_exist_ok=True)
        for part in (latents_path(), latents_path().with_suffix(".safetensors")):
            shutil.copy(part, out / part.name)
    pairs = pair_rows(seed, rows)
    prompts = [{"prompt": row["prompt"]} for row in pairs]
    parts = {"train": narrow_rows(seed, rows), "anchors": anchor_rows(seed, anchors), "pairs": pairs, "prompts": prompts}
    for name, chats in parts.items():
        paths[name] = write_jsonl(out / f"{name}.jsonl", chats)
    for name, domains in (("in_domain", (world.NARROW,)), ("questions", world.open_ended_domains())):
        for suffix, split in SPLITS.items():
            path = out / f"{name}{suffix}.yaml"
            items = list(question_items(domains, split))
            path.write_text(yaml.safe_dump(items, sort_keys=False, width=1000), encoding="utf-8")
            paths[name + suffix] = path
    return paths


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write chats to a file; return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
