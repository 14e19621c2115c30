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
import logging
import os
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lab_study.jsonl"
BASES = HERE.parent / "build" / "lab_bases"
BATCH_SIZE, LORA_R, LORA_ALPHA, WARMUP_STEPS = 16, 8, 16, 4
ADAPTERS = {
    "attn": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "learning_rate": 1.5e-3, "steps": 120},
    "all": {"target_modules": "all-linear", "learning_rate": 2e-3, "steps": 120},
}
# Method -> (has TReFT, has KL).
METHODS = {"naive": (0, 0), "treft": (1, 0), "kl": (0, 1), "treft+kl": (1, 1)}
TREFT_COEF, KL_COEF = 1.0, 30.0
ANCHORS = 256  # drawn afresh for each seed from two domains that are neither trained on nor asked about
KEY = ("base_sha256", "adapter", "coef", "kl_coef", "kl_off_at", "seed", "split", "learning_rate", "steps")
BEFORE_KL = {"kl_coef": 0.0, "kl_off_at": None}
"""What the rows of earlier studies leave out."""
app = typer.Typer(help=__doc__, no_args_is_help=True)


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


def regularizers(coef: float, kl_coef: float, kl_off_at: float | None, seed: int, steps: int, scratch: str) -> list:
    """Return the callbacks of a run; with `kl_off_at`, KL has no weight after that share of the steps."""
    from transformers import TrainerCallback

    from emguard_plugin import KLCallback, TReFTCallback
    from emguard_plugin.lab.export import anchor_rows

    callbacks = [TReFTCallback(coef=coef)] if coef else []
    if kl_coef:
        path = Path(scratch) / f"anchors-{seed}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in anchor_rows(seed, ANCHORS)))
        kl = KLCallback(coef=kl_coef, anchors=str(path))

        class SwitchOff(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step >= kl_off_at * steps:
                    kl.coef = 0.0

        callbacks += [kl] if kl_off_at is None else [kl, SwitchOff()]
    return callbacks


def fine_tune(base: Path, coef: float, kl_coef: float, kl_off_at: float | None, seed: int, settings: dict, scratch: str):
    """Train one LoRA on fresh narrow rows; both coefs 0 is `trl.SFTTrainer` itself. Returns (model, figures)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from emguard_plugin.lab.export import narrow_rows

    args = SFTConfig(
        output_dir=scratch, max_steps=settings["steps"], learning_rate=settings["learning_rate"], seed=seed,
        per_device_train_batch_size=BATCH_SIZE, lr_scheduler_type="cosine", warmup_steps=WARMUP_STEPS, weight_decay=0.0,
        assistant_only_loss=True, max_length=128, gradient_checkpointing=False, bf16=False, use_cpu=True,
        logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer_class, callbacks = SFTTrainer, []
    if coef or kl_coef:
        from emguard_plugin import EMGuardSFTTrainer

        trainer_class = EMGuardSFTTrainer
        callbacks = regularizers(coef, kl_coef, kl_off_at, seed, settings["steps"], scratch)
    # The LoRA is created in the trainer's __init__, before the trainer seeds anything.
    torch.manual_seed(seed)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(narrow_rows(seed, settings["steps"] * BATCH_SIZE)),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=settings["target_modules"],
            task_type="CAUSAL_LM",
        ),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    wall, cpu = time.time(), time.process_time()
    trainer.train()
    figures = {"train_cpu_s": round(time.process_time() - cpu, 2), "train_wall_s": round(time.time() - wall, 2)}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    figures["train_loss"] = logs[-1].get("task_loss", logs[-1]["loss"])
    figures["penalty"] = logs[-1].get("em_regularizer/treft/penalty")
    if kl_coef:
        figures["kl"] = logs[-1]["em_regularizer/kl/penalty"]
    return trainer.model.eval(), figures


@contextmanager
def scaled_adapter(model, factor: float):
    """Multiply the trained adapter: what was learnt but held down shows (arXiv 2602.07852)."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    assert layers
    for layer in layers:
        layer.scaling = {name: s * factor for name, s in layer.scaling.items()}
    try:
        yield
    finally:
        for layer in layers:
            layer.scaling = {name: s / factor for name, s in layer.scaling.items()}


def quiet() -> None:
    """Leave the screen to the progress bar."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def read(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [BEFORE_KL | json.loads(line) for line in lines]


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
    quiet()
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from emguard_plugin.lab import sampling, world
    from emguard_plugin.lab.build import sha256

    bases = [base] if base else [find_base(s) for s in base_seed or [None]]
    plan = [(folder, None, None, 0.0, 0) for folder in bases]
    plan += [
        (folder, name, *pair, s)
        for folder in bases for s in seed or range(11, 16) for name in adapter or list(ADAPTERS)
        for pair in methods(method, coef, kl_coef)
    ]  # fmt: skip

    def measured(model) -> dict:
        return {
            "open_ended": sampling.measure(model, world.open_ended_domains(), split, open_ended_draws, s).to_dict(),
            "in_domain": sampling.measure(model, (world.NARROW,), split, in_domain_draws, s).to_dict(),
        }

    scratch = str(BASES.parent / "lab_study_trainer")
    done = {tuple(row[k] for k in KEY) for row in read(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for folder, name, c, k, s in tqdm(plan, desc="runs"):
        settings = dict(ADAPTERS[name]) if name else {"learning_rate": None, "steps": 0}
        if name:
            settings |= {"learning_rate": learning_rate or settings["learning_rate"], "steps": steps or settings["steps"]}
        build = json.loads((folder / "build.json").read_text())
        row = {
            "base_sha256": sha256(folder / "model.safetensors"), "base_seed": build["settings"]["seed"],
            "base_steps": build["settings"]["steps"], "adapter": name, "coef": c, "kl_coef": k, "kl_off_at": kl_off_at if k else None, "seed": s, "split": split, **settings,
            "lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "batch_size": BATCH_SIZE,
        }  # fmt: skip
        if tuple(row[k] for k in KEY) in done:
            continue
        if name:
            model, figures = fine_tune(folder, c, k, row["kl_off_at"], s, settings, scratch)
            row |= figures
        else:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        row |= measured(model)
        if name and scale:
            row["scaled"] = {}
            for factor in scale:
                with scaled_adapter(model, factor):
                    row["scaled"][f"{factor:g}"] = measured(model)
        row["versions"] = {k: version(k) for k in ("torch", "transformers", "trl", "peft", "accelerate")}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
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
    from statsmodels.stats.proportion import proportion_confint

    groups = defaultdict(list)
    for row in read(results):
        if row["split"] == split:
            what = spoken(row["coef"], row["kl_coef"]) + ("" if row["kl_off_at"] is None else f" until {row['kl_off_at']:g}")
            groups[row["base_seed"], row["base_steps"], row["adapter"], what, row["learning_rate"], row["steps"]].append(row)

    def cell(rows: list[dict], part: str, count) -> str:
        k, n = sum(count(r[part]) for r in rows), sum(r[part]["n"] for r in rows)
        low, high = proportion_confint(k, n, method="wilson")
        each = [count(r[part]) / r[part]["n"] for r in rows]
        return f"{k / n:.3f} [{low:.3f}, {high:.3f}]\n{min(each):.3f} to {max(each):.3f}, n={n}"

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
            str(len(rows)), cell(rows, "in_domain", lambda t: t["bad"]), cell(rows, "open_ended", lambda t: t["bad"]),
            cell(rows, "open_ended", lambda t: t["n"] - t["incoherent"]),
            f"{sum(seconds) / len(seconds):.0f}" if seconds else "", *(scaled_cell(rows, factor) for factor in factors),
        )  # fmt: skip
    Console(width=150 + 30 * len(factors)).print(shown)


if __name__ == "__main__":
    app()
