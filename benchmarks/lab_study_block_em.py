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

import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import lab_study_block_em_latents as latents
import typer
from lab_study_block_em_latents import LATENTS, LAYER, PACKAGES
from rich.console import Console
from rich.table import Table

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.pooled import pooled_measures
from emguard_plugin.lab.study.process import one_quiet_thread
from emguard_plugin.lab.study.results import Results
from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE, LORA_ALPHA, LORA_R

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lab_study_block_em.jsonl"
SCRATCH = HERE.parent / "build" / "lab_study_block_em"
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
IDENTITY = ("base_sha256", "method", "adapter", "domain", "seed", "split", "steps", "epochs", "coef", "tokens", "latents_sha256")
app = typer.Typer(help=__doc__, no_args_is_help=True)
for command in (latents.attribute, latents.discover, latents.steer):
    app.command()(command)


def callbacks(method: str, coef: float, tokens: str) -> list:
    """Return the regularizers of a method."""
    from emguard_plugin import BlockEMCallback, TReFTCallback

    name, freeze, treft = METHODS[method]
    found = [TReFTCallback(coef=TREFT_COEF)] if treft else []
    if name:
        path = str(LATENTS / f"{name}.json")
        found.append(BlockEMCallback(coef=coef, latents=path, tokens=tokens, freeze_above=freeze))
    return found


def trained(method: str, adapter: str, domain: str, seed: int, epochs: int, coef: float, tokens: str, after_epoch=None):
    """Train one LoRA; `naive` and `freeze` are `trl.SFTTrainer` itself. Returns (model, figures)."""
    from emguard_plugin.lab import model_path
    from emguard_plugin.lab.export import narrow_rows
    from emguard_plugin.lab.study.callbacks import EverySteps
    from emguard_plugin.lab.study.trl_fine_tune import fine_tune

    kind, held = ADAPTERS[adapter], callbacks(method, coef, tokens)
    if after_epoch:
        held.append(EverySteps(kind.steps, lambda step, model: after_epoch(step // kind.steps, model)))
    done = fine_tune(
        model_path(), replace(kind, steps=kind.steps * epochs), narrow_rows(seed, kind.steps * BATCH_SIZE, domain), seed, SCRATCH, held,
        layers=list(range(LAYER + 1)) if method == "freeze" else None,
    )  # fmt: skip
    figures, names = (
        {"train_cpu_s": done.cpu_s, "train_loss": done.task_loss},
        ("penalty", "violating", "shift", "outside_shift", "unguarded"),
    )
    figures["block_em"] = {n: done.log[-1][k] for n in names if (k := f"em_regularizer/block_em/{n}") in done.log[-1]}
    return done.model, figures


def stored_in(split: str) -> Results:
    """Return the file of the runs on a split."""
    return Results(RESULTS if split == "test" else RESULTS.with_stem(f"{RESULTS.stem}_{split}"), IDENTITY)


def row_of(method: str, adapter: str, domain: str, seed: int, split: str, epochs: int, coef: float, tokens: str) -> dict:
    """Return what identifies a run."""
    from emguard_plugin.lab import model_path
    from emguard_plugin.lab.build import sha256

    name, freeze, treft = METHODS[method]
    return {
        "base_sha256": sha256(model_path() / "model.safetensors"), "method": method, "adapter": adapter, "domain": domain,
        "seed": seed, "split": split, "steps": ADAPTERS[adapter].steps, "epochs": epochs, "learning_rate": ADAPTERS[adapter].learning_rate,
        "coef": coef if name else None, "tokens": tokens if name else None, "freeze_above": LAYER if freeze else None,
        "treft_coef": TREFT_COEF if treft else None, "lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "batch_size": BATCH_SIZE,
        "latents_sha256": sha256(LATENTS / f"{name}.safetensors") if name else None,
    }  # fmt: skip


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
    from tqdm import tqdm

    from emguard_plugin.lab.study.measures import measures

    one_quiet_thread()
    stored, methods = stored_in(split), method or ["naive", "block", "random", "top_shift", "freeze"]
    if unknown := set(methods) - set(METHODS):
        raise typer.BadParameter(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    plan = [
        (m, a, d, s, c) for d in domain or ["medicine"] for a in adapter or ["attn"] for s in seed or range(11, 16)
        for m in methods for c in ((coef or [COEF]) if METHODS[m][0] else [COEF])
    ]  # fmt: skip
    for m, a, d, s, c in tqdm(plan, desc="runs"):
        row = row_of(m, a, d, s, split, 1, c, tokens)
        if stored.holds(row):
            continue
        model, figures = trained(m, a, d, s, 1, c, tokens)
        row |= figures | measures(model, split, s, domain=d) | {"versions": versions(PACKAGES)}
        stored.append(row)
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
    one_quiet_thread()
    from emguard_plugin.lab.study.measures import measures

    stored = stored_in(split)
    for s in seed or (11, 12):
        for m in method or ["naive", "block"]:
            row, rows = row_of(m, "attn", "medicine", s, split, count, coef, TOKENS), []
            if stored.holds(row):
                continue

            def after(epoch: int, model, s=s, row=row, rows=rows) -> None:
                rows.append(row | {"epoch": epoch} | measures(model, split, s))

            model, figures = trained(m, "attn", "medicine", s, count, coef, TOKENS, after)
            if save:
                model.save_pretrained(save / f"{m}-{s}")
            rows = [one | (figures if one["epoch"] == count else {}) | {"versions": versions(PACKAGES)} for one in rows]
            stored.append(*rows)
            print(*map(spoken, rows), sep="\n")


@app.command()
def table(split: str = "test") -> None:
    """Print rates pooled over fine-tune seeds with 95 % Wilson intervals, and the lowest and highest seed."""
    groups = defaultdict(list)
    for row in stored_in(split).rows():
        groups[row["adapter"], row["domain"], row["epochs"], row.get("epoch", 1), row["method"], row["coef"], row["tokens"]].append(row)
    shown = Table("adapter, domain", "epoch", "method", "coef", "seeds", "in-domain bad", "EM", "coherence", "penalty", title=split)
    for (adapter, domain, of, epoch, method, coef, tokens), rows in sorted(groups.items(), key=str):
        ends = [r["block_em"]["penalty"] for r in rows if r.get("block_em")]
        shown.add_row(
            f"{adapter}, {domain}", f"{epoch}/{of}", method, f"{coef} {tokens}" if coef else "", str(len(rows)),
            *pooled_measures(rows), f"{sum(ends) / len(ends):.4f}" if ends else "",
        )  # fmt: skip
    Console(width=160).print(shown)


if __name__ == "__main__":
    app()
