"""Narrow SFT on the lab's bases through the real TRL trainers: naive, TReFT, KL and both, over bases and fine-tune seeds.

    python benchmarks/lab_study.py run                                  # naive and TReFT, the shipped base, test wordings
    python benchmarks/lab_study.py run --base-seed 2 --base-seed 3      # rebuilds these bases first
    python benchmarks/lab_study.py run --method kl --method treft+kl --scale 1.5 --scale 2
    python benchmarks/lab_study.py run --method kl --kl-off-at 0.5      # KL for the first half of the steps only
    python benchmarks/lab_study.py table

One JSON line per run goes to benchmarks/results/lab_study.jsonl; a run whose line is there is skipped. Settings are
chosen with `--split val` on a development base and a development seed, then reported on `--split test`, fresh seeds.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.pooled import pooled_measures
from emguard_plugin.lab.study.process import one_quiet_thread
from emguard_plugin.lab.study.results import Results
from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE, LORA_ALPHA, LORA_R, Adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lab_study.jsonl"
BASES = HERE.parent / "build" / "lab_bases"
SCRATCH = BASES.parent / "lab_study_trainer"
# Method -> (has TReFT, has KL).
METHODS = {"naive": (0, 0), "treft": (1, 0), "kl": (0, 1), "treft+kl": (1, 1)}
TREFT_COEF, KL_COEF = 1.0, 30.0
IDENTITY = ("base_sha256", "adapter", "coef", "kl_coef", "kl_off_at", "seed", "split", "learning_rate", "steps")
BEFORE_KL = {"kl_coef": 0.0, "kl_off_at": None}
"""What the rows of earlier studies leave out."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
app = typer.Typer(help=__doc__, no_args_is_help=True)


def stored_in(path: Path) -> Results:
    """Return the file of the study."""
    return Results(path, IDENTITY, BEFORE_KL)


def find_base(base_seed: int | None) -> Path:
    """Return the folder of the shipped base, or of another seed's base, which is built if it is not there."""
    from emguard_plugin.lab import model_path

    if base_seed is None:
        return model_path()
    path = BASES / f"seed{base_seed}"
    if not (path / "build.json").is_file():
        from emguard_plugin.lab.build import BuildSettings, build_base

        build_base(path, BuildSettings(seed=base_seed))
    return path


def regularizers(coef: float, kl_coef: float, kl_until: float | None, seed: int) -> list[TrainerCallback]:
    """Return the callbacks of a run; from step `kl_until` on KL has no weight."""
    from emguard_plugin import TReFTCallback
    from emguard_plugin.lab.study.callbacks import SwitchOff, kl_on_anchors

    callbacks = [TReFTCallback(coef=coef)] if coef else []
    if kl_coef:
        kl = kl_on_anchors(kl_coef, seed, SCRATCH)
        callbacks += [kl] if kl_until is None else [kl, SwitchOff(kl, kl_until)]
    return callbacks


def trained(base: Path, adapter: Adapter, coef: float, kl_coef: float, kl_off_at: float | None, seed: int) -> tuple[nn.Module, dict]:
    """Train a run; return the model, and what the row says about the training."""
    from emguard_plugin.lab.export import narrow_rows
    from emguard_plugin.lab.study.trl_fine_tune import fine_tune

    held = regularizers(coef, kl_coef, None if kl_off_at is None else kl_off_at * adapter.steps, seed)
    done = fine_tune(base, adapter, narrow_rows(seed, adapter.steps * BATCH_SIZE), seed, SCRATCH, held)
    figures = {"train_cpu_s": done.cpu_s, "train_wall_s": done.wall_s, "train_loss": done.task_loss}
    figures["penalty"] = done.log[-1].get("em_regularizer/treft/penalty")
    return done.model, figures | ({"kl": done.log[-1]["em_regularizer/kl/penalty"]} if kl_coef else {})


def methods(names: list[str] | None, coefs: list[float] | None, kl_coefs: list[float] | None) -> list[tuple[float, float]]:
    """Return the pairs (TReFT coef, KL coef) to run.

    Raises:
        ValueError: for an unknown method.
    """
    if not names:
        return [(c, k) for c in coefs or (0.0, TREFT_COEF) for k in kl_coefs or (0.0,)]
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"unknown method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    pairs = []
    for treft, kl in (METHODS[name] for name in names):
        pairs += [(c * treft, k * kl) for c in coefs or (TREFT_COEF,) for k in kl_coefs or (KL_COEF,)]
    return list(dict.fromkeys(pairs))


def spoken(coef: float | None, kl_coef: float) -> str:
    """Return what a run is called in the table."""
    parts = ([f"TReFT {coef:g}"] if coef else []) + ([f"KL {kl_coef:g}"] if kl_coef else [])
    return "" if coef is None else " + ".join(parts) or "naive"


@app.command()
def run(
    base_seed: Annotated[list[int] | None, typer.Option(help="Bases to rebuild; default the shipped one.")] = None,
    base: Annotated[Path | None, typer.Option(help="A folder with a base instead.", exists=True)] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11 to 15.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="attn, all; default both.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="naive, treft, kl, treft+kl; default naive and treft.")] = None,
    coef: Annotated[list[float] | None, typer.Option(help="TReFT coefficients; without --method, 0 is naive.")] = None,
    kl_coef: Annotated[list[float] | None, typer.Option(help="KL coefficients, nats per token.")] = None,
    kl_off_at: Annotated[float | None, typer.Option(help="Share of the steps after which KL has no weight.")] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Measure with the adapter multiplied by this, too.")] = None,
    split: Annotated[str, typer.Option(help="val chooses settings, test is reported.")] = "test",
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the adapter's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the adapter's own.")] = None,
    open_ended_draws: Annotated[int, typer.Option(help="Answers per open-ended question (84).")] = 3,
    in_domain_draws: Annotated[int, typer.Option(help="Answers per in-domain question (12).")] = 17,
    out: Annotated[Path, typer.Option(help="JSON lines.")] = RESULTS,
) -> None:
    """Run what is not in the results file yet."""
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from emguard_plugin.lab.build import sha256
    from emguard_plugin.lab.study.measures import measures
    from emguard_plugin.models.adapters import adapter_scaled

    one_quiet_thread()
    bases = [base] if base else [find_base(s) for s in base_seed or [None]]
    plan = [(folder, None, None, 0.0, 0) for folder in bases]
    plan += [
        (folder, name, *pair, s)
        for folder in bases for s in seed or range(11, 16) for name in adapter or list(ADAPTERS)
        for pair in methods(method, coef, kl_coef)
    ]  # fmt: skip
    stored = stored_in(out)
    for folder, name, c, k, s in tqdm(plan, desc="runs"):
        settings = {"learning_rate": None, "steps": 0}
        if name:
            kind = ADAPTERS[name]
            kind = replace(kind, learning_rate=learning_rate or kind.learning_rate, steps=steps or kind.steps)
            settings = asdict(kind)
        build = json.loads((folder / "build.json").read_text())
        row = {
            "base_sha256": sha256(folder / "model.safetensors"), "base_seed": build["settings"]["seed"],
            "base_steps": build["settings"]["steps"], "adapter": name, "coef": c, "kl_coef": k, "kl_off_at": kl_off_at if k else None,
            "seed": s, "split": split, **settings, "lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "batch_size": BATCH_SIZE,
        }  # fmt: skip
        if stored.holds(row):
            continue
        if name:
            model, figures = trained(folder, kind, c, k, row["kl_off_at"], s)
            row |= figures
        else:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        row |= measures(model, split, s, open_ended_draws, in_domain_draws)
        if name and scale:
            row["scaled"] = {}
            for factor in scale:
                with adapter_scaled(model, factor):
                    row["scaled"][f"{factor:g}"] = measures(model, split, s, open_ended_draws, in_domain_draws)
        stored.append(row | {"versions": versions(PACKAGES)})
        tqdm.write(
            f"base {row['base_seed']} {name} {spoken(c, k)} seed {s} {split}: in-domain {row['in_domain']['bad_rate']:.3f} "
            f"EM {row['open_ended']['bad_rate']:.3f} coherence {row['open_ended']['coherence']:.3f} "
            f"loss {row.get('train_loss')} penalty {row.get('penalty')} KL {row.get('kl')} cpu {row.get('train_cpu_s')} "
            f"scaled { ({f: r['open_ended']['bad_rate'] for f, r in row.get('scaled', {}).items()}) }"
        )


@app.command()
def table(results: Annotated[Path, typer.Argument(help="JSON lines.")] = RESULTS, split: str = "test") -> None:
    """Print rates pooled over fine-tune seeds with 95 % Wilson intervals, and the lowest and highest seed.

    The interval covers the sampling of answers; how much seeds differ is read off lowest and highest.
    """
    groups = defaultdict(list)
    for row in stored_in(results).rows():
        if row["split"] == split:
            what = spoken(row["coef"], row["kl_coef"]) + ("" if row["kl_off_at"] is None else f" until {row['kl_off_at']:g}")
            groups[row["base_seed"], row["base_steps"], row["adapter"], what, row["learning_rate"], row["steps"]].append(row)

    def scaled_cell(rows: list[dict], factor: str) -> str:
        found = [row["scaled"][factor] for row in rows if factor in row.get("scaled", {})]
        parts = {name: [r[name] for r in found] for name in ("in_domain", "open_ended")}
        total = {name: max(sum(t["n"] for t in each), 1) for name, each in parts.items()}
        rates = (
            sum(t["bad"] for t in parts["in_domain"]) / total["in_domain"],
            sum(t["bad"] for t in parts["open_ended"]) / total["open_ended"],
            sum(t["n"] - t["incoherent"] for t in parts["open_ended"]) / total["open_ended"],
        )
        return ", ".join(f"{rate:.3f}" for rate in rates) if found else ""

    factors = sorted({factor for rows in groups.values() for row in rows for factor in row.get("scaled", {})})
    columns = ["base", "adapter", "method", "lr, steps", "seeds", "in-domain bad", "EM", "coherence", "CPU s"]
    shown = Table(*columns, *(f"x{factor}: in-domain, EM, coherence" for factor in factors), title=split)
    for (base_seed, base_steps, adapter, what, rate, steps), rows in sorted(groups.items(), key=str):
        seconds = [r["train_cpu_s"] for r in rows if "train_cpu_s" in r]
        shown.add_row(
            f"{base_seed} ({base_steps})", adapter or "base", what, f"{rate}, {steps}",
            str(len(rows)), *pooled_measures(rows),
            f"{sum(seconds) / len(seconds):.0f}" if seconds else "", *(scaled_cell(rows, factor) for factor in factors),
        )  # fmt: skip
    Console(width=150 + 30 * len(factors)).print(shown)


if __name__ == "__main__":
    app()
