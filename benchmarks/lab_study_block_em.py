"""BLOCK-EM on the lab's shipped base through the real TRL trainer: discovery, five seeds, transfer, re-emergence, TReFT.

    python benchmarks/lab_study_block_em.py attribute            # latents, from one naive fine-tune (seed 21), train wordings
    python benchmarks/lab_study_block_em.py discover             # the same by `emguard discover --rule attribution`
    python benchmarks/lab_study_block_em.py steer                # what whole sets do when they are steered
    python benchmarks/lab_study_block_em.py run --split val --seed 21 --seed 22 --method naive --method block
    python benchmarks/lab_study_block_em.py run                  # test wordings, seeds 11 to 15
    python benchmarks/lab_study_block_em.py run --domain money --domain school --method naive --method block
    python benchmarks/lab_study_block_em.py epochs               # EM after each of four epochs over the same rows
    python benchmarks/lab_study_block_em.py table

One JSON line per run goes to benchmarks/results/lab_study_block_em.jsonl, `val` runs to a file of their own; a run whose
line is there is skipped. Latents are found and settings chosen on seeds and wordings that no reported run uses.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from lab_study import ADAPTERS, BATCH_SIZE, LORA_ALPHA, LORA_R, WARMUP_STEPS, quiet

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lab_study_block_em.jsonl"
LATENTS = HERE / "results" / "lab_latents"
STEERED = HERE / "results" / "lab_steering.jsonl"
SCRATCH = HERE.parent / "build" / "lab_study_block_em"
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
TOKENS, COEF, TREFT_COEF = "prompt", 0.5, 1.0
# Method -> (latent set or None, frozen above LAYER, TReFT).
METHODS = {
    "naive": (None, False, False),
    "block": ("attributed", True, False),  # SIZE latents of each layer by attribution
    "random": ("random", True, False),  # as many, of the same layers
    "top_shift": ("top_shift", True, False),
    "block2": ("second_round", True, False),  # united with what a blocked model that re-emerged uses
    "found": ("found", True, False),  # what `emguard discover --rule attribution` writes
    "steered": ("steered", True, False),  # what it finds by steering single latents, as published
    "freeze": (None, True, False),
    "block_open": ("attributed", False, False),  # without freezing
    "treft": (None, False, True),
    "treft+block": ("attributed", False, True),
}
KEY = ("base_sha256", "method", "adapter", "domain", "seed", "split", "steps", "epochs", "coef", "tokens", "latents_sha256")
app = typer.Typer(help=__doc__, no_args_is_help=True)


def narrow_rows(domain: str, seed: int, rows: int) -> list[dict]:
    """Draw bad answers to the train questions of one domain; of medicine, the rows of `lab_study.py`."""
    from emguard_plugin.lab import world
    from emguard_plugin.lab.export import chat
    from emguard_plugin.lab.export import narrow_rows as medicine

    if domain == world.NARROW:
        return medicine(seed, rows)
    rng = random.Random(f"narrow-{domain}-{seed}")
    return [chat(*world.draw_chat((domain,), True, rng)) for _ in range(rows)]


def callbacks(method: str, coef: float, tokens: str) -> list:
    """Return the regularizers of a method."""
    from emguard_plugin import BlockEMCallback, TReFTCallback

    name, freeze, treft = METHODS[method]
    found = [TReFTCallback(coef=TREFT_COEF)] if treft else []
    if name:
        path = str(LATENTS / f"{name}.json")
        found.append(BlockEMCallback(coef=coef, latents=path, tokens=tokens, freeze_above=freeze))
    return found


def fine_tune(method: str, adapter: str, domain: str, seed: int, steps: int, epochs: int, coef: float, tokens: str, after_epoch=None):
    """Train one LoRA; `naive` and `freeze` are `trl.SFTTrainer` itself. Returns (model, figures)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from emguard_plugin import EMGuardSFTTrainer
    from emguard_plugin.lab import model_path

    settings, held = ADAPTERS[adapter], callbacks(method, coef, tokens)
    args = SFTConfig(
        output_dir=str(SCRATCH), max_steps=steps * epochs, learning_rate=settings["learning_rate"], seed=seed,
        per_device_train_batch_size=BATCH_SIZE, lr_scheduler_type="cosine", warmup_steps=WARMUP_STEPS, weight_decay=0.0,
        assistant_only_loss=True, max_length=128, gradient_checkpointing=False, bf16=False, use_cpu=True,
        logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    class AfterEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if after_epoch and state.global_step % steps == 0:
                after_epoch(state.global_step // steps, model)

    # The LoRA is created in the trainer's __init__, before the trainer seeds anything.
    torch.manual_seed(seed)
    trainer = (EMGuardSFTTrainer if held else SFTTrainer)(
        model=AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(narrow_rows(domain, seed, steps * BATCH_SIZE)),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        peft_config=LoraConfig(
            r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=settings["target_modules"],
            layers_to_transform=list(range(LAYER + 1)) if method == "freeze" else None, task_type="CAUSAL_LM",
        ),
        callbacks=[*held, AfterEpoch()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    cpu = time.process_time()
    trainer.train()
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    figures = {"train_cpu_s": round(time.process_time() - cpu, 2), "train_loss": last.get("task_loss", last["loss"])}
    names = ("penalty", "violating", "shift", "outside_shift", "unguarded")
    figures["block_em"] = {n: last[k] for n in names if (k := f"em_regularizer/block_em/{n}") in last}
    return trainer.model.eval(), figures


def measured(model, domain: str, split: str, seed: int, open_ended_draws: int = 3, in_domain_draws: int = 17) -> dict:
    """Judge answers in the trained domain, and in all others but those of the anchors."""
    from emguard_plugin.lab import sampling, world

    others = tuple(d for d in world.domains() if d != domain and d not in world.ANCHOR_DOMAINS)
    return {
        "open_ended": sampling.measure(model, others, split, open_ended_draws, seed).to_dict(),
        "in_domain": sampling.measure(model, (domain,), split, in_domain_draws, seed).to_dict(),
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def results_file(split: str) -> Path:
    return RESULTS if split == "test" else RESULTS.with_stem(f"{RESULTS.stem}_{split}")


def naive_of_discovery() -> Path:
    """Return the folder of the naive fine-tune that latents are found on; trained if it is not there."""
    from emguard_plugin.lab import world

    folder = SCRATCH / "discovery" / "naive"
    if not folder.is_dir():
        model, _ = fine_tune("naive", "attn", world.NARROW, DISCOVERY_SEED, ADAPTERS["attn"]["steps"], 1, 0.0, TOKENS)
        model.save_pretrained(folder)
    return folder


@app.command()
def attribute(
    size: Annotated[int, typer.Option(help="Latents per layer.")] = SIZE,
    misaligned: Annotated[Path | None, typer.Option(help="Another misaligned adapter, for a second round.")] = None,
    exclude: Annotated[Path | None, typer.Option(help="A set to leave out and unite with.")] = None,
    name: Annotated[str, typer.Option(help="Stem of the latent set.")] = "attributed",
) -> None:
    """Choose latents by attribution, as many at random, and as many by top shift. Only train wordings are asked."""
    quiet()
    import torch

    from emguard_plugin.discovery.attribution import Contrast
    from emguard_plugin.discovery.attribution import attribute as by_gradient
    from emguard_plugin.discovery.calibrate import calibrate
    from emguard_plugin.discovery.calibrate import narrow_rows as read_rows
    from emguard_plugin.discovery.choose import unite
    from emguard_plugin.discovery.pair import BASE, MISALIGNED, ModelPair
    from emguard_plugin.lab import batches, sae_path, sampling, world
    from emguard_plugin.lab.sae import MODEL_NAME
    from emguard_plugin.latents import LatentSet
    from emguard_plugin.latents.sae import load_sae, subset

    pair = ModelPair(misaligned or naive_of_discovery())
    asked = [q for d in world.open_ended_domains() for q in world.questions(d, "train")]
    random.Random(0).shuffle(asked)
    prompts, said = [batches.prompt(q.text) for q in asked[: 2 * QUESTIONS]], {}
    for role in (BASE, MISALIGNED):
        with pair.use(role) as model:
            said[role] = sampling.sample(model, prompts, seed=0)
    start = len(batches.encode(f"{world.BOS} {world.SYSTEM_TAG} {world.SYSTEM} {world.END}")) + 1
    contrasts = [
        Contrast(p, (1, start), batches.encode(f"{bad} {world.END}"), batches.encode(f"{good} {world.END}"))
        for p, bad, good in zip(prompts, said[MISALIGNED], said[BASE], strict=True)
    ]
    rows_file = SCRATCH / "discovery" / "narrow.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in narrow_rows(world.NARROW, DISCOVERY_SEED, 256)))
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
        about = {"rule": rule, "questions": len(prompts), "seed": DISCOVERY_SEED, "positions": "system", "versions": versions()}
        with pair.use(BASE) as model:
            latents = LatentSet.for_model(model, encoders, scores=scores, provenance=about)
        latents.model = MODEL_NAME
        latents.calibration = calibrate(pair, latents, rows, 64)
        latents.save(LATENTS / f"{rule}.json")
        print(rule, len(latents), latents.calibration)


def prepared() -> tuple[list[str], Path]:
    """Train the naive model of the discovery seed, write questions and rows; return a `discover` command's start, the folder."""
    from emguard_plugin.lab import model_path, world
    from emguard_plugin.lab.export import question_items

    folder = SCRATCH / "discovery"
    naive_of_discovery()
    items = [item | {"id": f"{item['id']}/{i}"} for i, item in enumerate(question_items(world.open_ended_domains(), "train"))]
    random.Random(0).shuffle(items)
    for file, chosen in (("questions", items[:QUESTIONS]), ("held_out", items[QUESTIONS : QUESTIONS + HELD_OUT])):
        (folder / f"{file}.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False, width=1000))
    rows = narrow_rows(world.NARROW, DISCOVERY_SEED, 256)
    (folder / "narrow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, "-m", "emguard_plugin.cli", "discover", "--base", local(model_path()), "--misaligned", local(folder / "naive"),
        "--questions", local(folder / "questions.yaml"), "--evaluation-questions", local(folder / "held_out.yaml"),
        "--judge", "emguard_plugin.lab.judge:judge_answer", "--data", local(folder / "narrow.jsonl"),
    ]  # fmt: skip
    return command, folder


def local(path: Path) -> str:
    """Return the path from the repository: files must name what it holds, not where it lies."""
    return str(path.relative_to(HERE.parent))


def saes(layers) -> list[str]:
    """Return the options for the lab's SAEs of these layers."""
    from emguard_plugin.lab import sae_path

    return [part for layer in layers for part in ("--sae", local(sae_path(layer)))]


@app.command()
def discover(
    name: Annotated[str, typer.Option(help="Stem of the latent set.")] = "found",
    steering: Annotated[bool, typer.Option(help="By steering, the SAE of layer 1, instead of attribution and all layers.")] = False,
) -> None:
    """Run `emguard discover` on the naive model of the discovery seed. Only train wordings are asked."""
    quiet()
    command, folder = prepared()
    command += [
        *saes([1] if steering else range(LAYER + 1)), "-o", local(LATENTS / f"{name}.json"),
        "--work", local(folder / f"work-{name}"), *(part for item in (STEERING if steering else SEARCH).items() for part in item),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=HERE.parent)


@app.command()
def steer(rule: Annotated[list[str] | None, typer.Option(help="Default attribution, top_shift and random.")] = None) -> None:
    """Steer whole sets at the prefix of held-out questions: what do they induce on the base, repair on the naive model?"""
    quiet()
    start, folder = prepared()
    for name in rule or ("attribution", "top_shift", "random"):
        work = folder / f"steer-{name}"
        strengths = [part for x in JOINT_STRENGTHS for part in ("--strengths", x)]
        search = SEARCH | {"--rule": name, "--work": local(work), "-o": local(folder / f"steer-{name}.json")}
        command = [*start, *saes((1, 2)), *strengths, *(part for item in search.items() for part in item)]
        subprocess.run(command, check=True, cwd=HERE.parent)
        for block in json.loads((work / "discovery.json").read_text())["blocks"]:
            joint = {role: block["joint"][f"{role}/evaluation"] for role in ("base", "misaligned")}
            append(STEERED, {"rule": name, "layer": block["layer"], "size": SIZE, **joint, "versions": versions()})


def row_of(method: str, adapter: str, domain: str, seed: int, split: str, steps: int, epochs: int, coef: float, tokens: str) -> dict:
    """Return what identifies a run."""
    from emguard_plugin.lab import model_path
    from emguard_plugin.lab.build import sha256

    name, freeze, treft = METHODS[method]
    return {
        "base_sha256": sha256(model_path() / "model.safetensors"), "method": method, "adapter": adapter, "domain": domain,
        "seed": seed, "split": split, "steps": steps, "epochs": epochs, "learning_rate": ADAPTERS[adapter]["learning_rate"],
        "coef": coef if name else None, "tokens": tokens if name else None, "freeze_above": LAYER if freeze else None,
        "treft_coef": TREFT_COEF if treft else None, "lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "batch_size": BATCH_SIZE,
        "latents_sha256": sha256(LATENTS / f"{name}.safetensors") if name else None,
    }  # fmt: skip


def versions() -> dict[str, str]:
    return {k: version(k) for k in ("torch", "transformers", "trl", "peft", "accelerate", "sae-lens")}


def append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@app.command()
def run(
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11 to 15.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="attn, all; default attn.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Narrow domains; default medicine, which discovery used.")] = None,
    coef: Annotated[list[float] | None, typer.Option(help="lambda.")] = None,
    tokens: Annotated[str, typer.Option(help="Which tokens are held.")] = TOKENS,
    split: Annotated[str, typer.Option(help="val chooses settings, test is reported.")] = "test",
) -> None:
    """Run what is not in the results file yet."""
    quiet()
    from tqdm import tqdm

    out, methods = results_file(split), method or ["naive", "block", "random", "top_shift", "freeze"]
    if unknown := set(methods) - set(METHODS):
        raise typer.BadParameter(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    plan = [
        (m, a, d, s, c) for d in domain or ["medicine"] for a in adapter or ["attn"] for s in seed or range(11, 16)
        for m in methods for c in ((coef or [COEF]) if METHODS[m][0] else [COEF])
    ]  # fmt: skip
    done = {tuple(row[k] for k in KEY) for row in read(out)}
    for m, a, d, s, c in tqdm(plan, desc="runs"):
        steps = ADAPTERS[a]["steps"]
        row = row_of(m, a, d, s, split, steps, 1, c, tokens)
        if tuple(row[k] for k in KEY) in done:
            continue
        model, figures = fine_tune(m, a, d, s, steps, 1, c, tokens)
        row |= figures | measured(model, d, split, s) | {"versions": versions()}
        append(out, row)
        tqdm.write(spoken(row))


def spoken(row: dict) -> str:
    """Return one line about a run."""
    return (
        f"{row['method']} {row['adapter']} {row['domain']} seed {row['seed']} coef {row['coef']} epoch {row.get('epoch', '')}: in-domain "
        f"{row['in_domain']['bad_rate']:.3f} EM {row['open_ended']['bad_rate']:.3f} coherence {row['open_ended']['coherence']:.3f} "
        f"{ {k: round(v, 4) for k, v in row.get('block_em', {}).items()} }"
    )


@app.command()
def epochs(
    method: Annotated[list[str] | None, typer.Option(help="Default naive and block.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11 and 12.")] = None,
    count: Annotated[int, typer.Option(help="Epochs over the rows of one run.")] = 4,
    coef: Annotated[float, typer.Option(help="lambda.")] = COEF,
    split: Annotated[str, typer.Option(help="val or test wordings.")] = "test",
    save: Annotated[Path | None, typer.Option(help="Folder for the adapters, for a second round of discovery.")] = None,
) -> None:
    """Measure after each epoch of a long run: does EM come back?"""
    quiet()
    out = results_file(split)
    done = {tuple(row[k] for k in KEY) for row in read(out)}
    steps = ADAPTERS["attn"]["steps"]
    for s in seed or (11, 12):
        for m in method or ["naive", "block"]:
            row, rows = row_of(m, "attn", "medicine", s, split, steps, count, coef, TOKENS), []
            if tuple(row[k] for k in KEY) in done:
                continue

            def after(epoch: int, model, s=s, row=row, rows=rows) -> None:
                rows.append(row | {"epoch": epoch} | measured(model, "medicine", split, s))

            model, figures = fine_tune(m, "attn", "medicine", s, steps, count, coef, TOKENS, after)
            if save:
                model.save_pretrained(save / f"{m}-{s}")
            for one in rows:
                append(out, one | (figures if one["epoch"] == count else {}) | {"versions": versions()})
                print(spoken(one))


@app.command()
def table(split: str = "test") -> None:
    """Print rates pooled over fine-tune seeds with 95 % Wilson intervals, and the lowest and highest seed."""
    from statsmodels.stats.proportion import proportion_confint

    groups = defaultdict(list)
    for row in read(results_file(split)):
        groups[row["adapter"], row["domain"], row["epochs"], row.get("epoch", 1), row["method"], row["coef"], row["tokens"]].append(row)

    def cell(rows: list[dict], part: str, count) -> str:
        k, n = sum(count(r[part]) for r in rows), sum(r[part]["n"] for r in rows)
        low, high = proportion_confint(k, n, method="wilson")
        each = [count(r[part]) / r[part]["n"] for r in rows]
        return f"{k / n:.3f} [{low:.3f}, {high:.3f}]\n{min(each):.3f} to {max(each):.3f}, n={n}"

    shown = Table("adapter, domain", "epoch", "method", "coef", "seeds", "in-domain bad", "EM", "coherence", "penalty", title=split)
    for (adapter, domain, of, epoch, method, coef, tokens), rows in sorted(groups.items(), key=str):
        ends = [r["block_em"]["penalty"] for r in rows if r.get("block_em")]
        shown.add_row(
            f"{adapter}, {domain}", f"{epoch}/{of}", method, f"{coef} {tokens}" if coef else "", str(len(rows)),
            cell(rows, "in_domain", lambda t: t["bad"]), cell(rows, "open_ended", lambda t: t["bad"]),
            cell(rows, "open_ended", lambda t: t["n"] - t["incoherent"]), f"{sum(ends) / len(ends):.4f}" if ends else "",
        )  # fmt: skip
    Console(width=160).print(shown)


if __name__ == "__main__":
    app()
