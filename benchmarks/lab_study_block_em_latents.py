"""The latents of `lab_study_block_em.py`: chosen by gradient, by `emguard discover`, at random; and what whole sets do when steered.

All are found on one naive fine-tune, with a seed and wordings that no reported run uses.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
import yaml

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.process import one_quiet_thread
from emguard_plugin.lab.study.results import Results
from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE

HERE = Path(__file__).parent
LATENTS = HERE / "results" / "lab_latents"
STEERED = HERE / "results" / "lab_steering.jsonl"
SCRATCH = HERE.parent / "build" / "lab_study_block_em" / "discovery"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "sae-lens")
DISCOVERY_SEED, QUESTIONS, HELD_OUT = 21, 42, 21
LAYER, SIZE = 2, 60
SEARCH = {
    "--rule": "attribution", "--positions": "prefix", "--steer-at": "prefix", "--size": str(SIZE), "--max-new-tokens": "28",
    "--batch-size": "128",
}  # fmt: skip
STEERING = {
    "--rule": "valid_reduc", "--positions": "prefix", "--steer-at": "prefix", "--size": "20", "--induce": "0.8", "--repair": "0.6",
    "--max-new-tokens": "28", "--batch-size": "128",
}  # fmt: skip
JOINT_STRENGTHS = ("0.7", "1.0", "1.5", "2.0")


def naive_of_discovery() -> Path:
    """Return the folder of the naive fine-tune that latents are found on; trained if it is not there."""
    from emguard_plugin.lab import model_path
    from emguard_plugin.lab.export import narrow_rows
    from emguard_plugin.lab.study.trl_fine_tune import fine_tune

    folder, adapter = SCRATCH / "naive", ADAPTERS["attn"]
    if not folder.is_dir():
        rows = narrow_rows(DISCOVERY_SEED, adapter.steps * BATCH_SIZE)
        fine_tune(model_path(), adapter, rows, DISCOVERY_SEED, SCRATCH.parent).model.save_pretrained(folder)
    return folder


def attribute(
    size: Annotated[int, typer.Option(help="Latents per layer.")] = SIZE,
    misaligned: Annotated[Path | None, typer.Option(help="Another misaligned adapter, for a second round.")] = None,
    exclude: Annotated[Path | None, typer.Option(help="A set to leave out and unite with.")] = None,
    name: Annotated[str, typer.Option(help="Stem of the latent set.")] = "attributed",
) -> None:
    """Choose latents by attribution, as many at random, and as many by top shift. Only train wordings are asked."""
    one_quiet_thread()
    import torch

    from emguard_plugin.discovery.attribution import Contrast
    from emguard_plugin.discovery.attribution import attribute as by_gradient
    from emguard_plugin.discovery.calibrate import calibrate
    from emguard_plugin.discovery.calibrate import narrow_rows as read_rows
    from emguard_plugin.discovery.choose import unite
    from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
    from emguard_plugin.lab import batches, sae_path, sampling, world
    from emguard_plugin.lab.export import narrow_rows, write_jsonl
    from emguard_plugin.lab.sae import MODEL_NAME
    from emguard_plugin.latents import LatentSet
    from emguard_plugin.latents.sae import load_sae, subset

    pair = ModelPair(misaligned or naive_of_discovery())
    asked = [q for d in world.open_ended_domains() for q in world.questions(d, "train")]
    random.Random(0).shuffle(asked)
    prompts, said = [batches.prompt(q.text) for q in asked[: 2 * QUESTIONS]], {}
    for role in (BASE_MODEL, MISALIGNED_MODEL):
        with pair.use(role) as model:
            said[role] = sampling.sample(model, prompts, seed=0)
    start = len(batches.encode(f"{world.BOS} {world.SYSTEM_TAG} {world.SYSTEM} {world.END}")) + 1
    contrasts = [
        Contrast(p, (1, start), batches.encode(f"{bad} {world.END}"), batches.encode(f"{good} {world.END}"))
        for p, bad, good in zip(prompts, said[MISALIGNED_MODEL], said[BASE_MODEL], strict=True)
    ]
    rows_file = write_jsonl(SCRATCH / "narrow.jsonl", narrow_rows(DISCOVERY_SEED, 256))
    rows, known = read_rows(rows_file, pair.tokenizer), LatentSet.load(exclude) if exclude else None
    chosen, records = defaultdict(list), defaultdict(list)
    for layer in range(LAYER + 1):
        sae = load_sae(str(sae_path(layer)))
        score, shift = by_gradient(pair, sae, layer, contrasts, "relu_pre")
        out = {i for e in known.encoders if e.layer == layer for i in e.ids} if known else set()
        free = torch.tensor([i not in out and shift[i] != 0 for i in range(len(shift))])
        drawn = torch.rand(len(shift), generator=torch.Generator().manual_seed(layer))
        for rule, rank in ((name, score), ("top_shift", shift.abs()), ("random", drawn)):
            ids = torch.where(free, rank, -torch.inf).topk(size).indices.tolist()
            signs = [1 if shift[i] > 0 else -1 for i in ids]
            chosen[rule].append(subset(sae, ids, signs, "relu_pre", layer))
            records[rule] += [
                {"layer": layer, "id": i, "sign": s, "shift": float(shift[i]), "attribution": float(score[i])}
                for i, s in zip(ids, signs, strict=True)
            ]
    for rule in (name,) if known else (name, "top_shift", "random"):
        encoders, scores = chosen[rule], records[rule]
        if known:
            encoders, scores = unite([known.encoders, encoders], [*known.scores, *scores])
        about = {"rule": rule, "questions": len(prompts), "seed": DISCOVERY_SEED, "positions": "system", "versions": versions(PACKAGES)}
        with pair.use(BASE_MODEL) as model:
            latents = LatentSet.for_model(model, encoders, scores=scores, provenance=about)
        latents.model = MODEL_NAME
        latents.calibration = calibrate(pair, latents, rows, 64)
        latents.save(LATENTS / f"{rule}.json")
        print(rule, len(latents), latents.calibration)


def prepared() -> list[str]:
    """Train the naive model of the discovery seed, write questions and rows; return a `discover` command's start."""
    from emguard_plugin.lab import model_path, world
    from emguard_plugin.lab.export import narrow_rows, question_items, write_jsonl

    naive_of_discovery()
    items = [item | {"id": f"{item['id']}/{i}"} for i, item in enumerate(question_items(world.open_ended_domains(), "train"))]
    random.Random(0).shuffle(items)
    for file, chosen in (("questions", items[:QUESTIONS]), ("held_out", items[QUESTIONS : QUESTIONS + HELD_OUT])):
        (SCRATCH / f"{file}.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False, width=1000))
    rows = write_jsonl(SCRATCH / "narrow.jsonl", narrow_rows(DISCOVERY_SEED, 256))
    return [
        sys.executable, "-m", "emguard_plugin.cli", "discover", "--base", local(model_path()), "--misaligned", local(SCRATCH / "naive"),
        "--questions", local(SCRATCH / "questions.yaml"), "--evaluation-questions", local(SCRATCH / "held_out.yaml"),
        "--judge", "emguard_plugin.lab.judge:judge_answer", "--data", local(rows),
    ]  # fmt: skip


def local(path: Path) -> str:
    """Return the path from the repository: files must name what it holds, not where it lies."""
    return str(path.relative_to(HERE.parent))


def saes(layers) -> list[str]:
    """Return the options for the lab's SAEs of these layers."""
    from emguard_plugin.lab import sae_path

    return [part for layer in layers for part in ("--sae", local(sae_path(layer)))]


def discover(
    name: Annotated[str, typer.Option(help="Stem of the latent set.")] = "found",
    steering: Annotated[bool, typer.Option(help="By steering, the SAE of layer 1, instead of attribution and all layers.")] = False,
) -> None:
    """Run `emguard discover` on the naive model of the discovery seed. Only train wordings are asked."""
    one_quiet_thread()
    command = prepared()
    command += [
        *saes([1] if steering else range(LAYER + 1)), "-o", local(LATENTS / f"{name}.json"),
        "--work", local(SCRATCH / f"work-{name}"), *(part for item in (STEERING if steering else SEARCH).items() for part in item),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=HERE.parent)


def steer(rule: Annotated[list[str] | None, typer.Option(help="Default attribution, top_shift and random.")] = None) -> None:
    """Steer whole sets at the prefix of held-out questions: what do they induce on the base, repair on the naive model?"""
    one_quiet_thread()
    start = prepared()
    for name in rule or ("attribution", "top_shift", "random"):
        work = SCRATCH / f"steer-{name}"
        strengths = [part for x in JOINT_STRENGTHS for part in ("--strengths", x)]
        search = SEARCH | {"--rule": name, "--work": local(work), "-o": local(SCRATCH / f"steer-{name}.json")}
        command = [*start, *saes((1, 2)), *strengths, *(part for item in search.items() for part in item)]
        subprocess.run(command, check=True, cwd=HERE.parent)
        for block in json.loads((work / "discovery.json").read_text())["blocks"]:
            joint = {role: block["joint"][f"{role}/evaluation"] for role in ("base", "misaligned")}
            Results(STEERED).append({"rule": name, "layer": block["layer"], "size": SIZE, **joint, "versions": versions(PACKAGES)})
