"""Narrow SFT on the lab's bases through the real TRL trainers: naive against TReFT, over bases and fine-tune seeds.

    python benchmarks/lab_study.py run                                  # the shipped base, test wordings
    python benchmarks/lab_study.py run --base-seed 2 --base-seed 3      # rebuilds these bases first
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
KEY = ("base_sha256", "adapter", "coef", "seed", "split", "learning_rate", "steps")
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


def fine_tune(base: Path, adapter: str, coef: float, seed: int, settings: dict, scratch: str):
    """Train one LoRA on fresh narrow rows; coef 0 is `trl.SFTTrainer` itself. Returns (model, figures)."""
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
    if coef:
        from emguard_plugin import EMGuardSFTTrainer, TReFTCallback

        trainer_class, callbacks = EMGuardSFTTrainer, [TReFTCallback(coef=coef)]
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
    return trainer.model.eval(), figures


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
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@app.command()
def run(
    base_seed: Annotated[list[int] | None, typer.Option(help="Bases to rebuild; default the shipped one.")] = None,
    base: Annotated[Path | None, typer.Option(help="A folder with a base instead.", exists=True)] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11 to 15.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="attn, all; default both.")] = None,
    coef: Annotated[list[float] | None, typer.Option(help="TReFT coefficients; 0 is naive. Default 0 and 1.")] = None,
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
    plan = [(folder, None, None, 0) for folder in bases]
    plan += [
        (folder, name, c, s)
        for folder in bases for s in seed or range(11, 16) for name in adapter or list(ADAPTERS) for c in coef or (0.0, 1.0)
    ]  # fmt: skip
    done = {tuple(row[k] for k in KEY) for row in read(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for folder, name, c, s in tqdm(plan, desc="runs"):
        settings = dict(ADAPTERS[name]) if name else {"learning_rate": None, "steps": 0}
        if name:
            settings |= {"learning_rate": learning_rate or settings["learning_rate"], "steps": steps or settings["steps"]}
        build = json.loads((folder / "build.json").read_text())
        row = {
            "base_sha256": sha256(folder / "model.safetensors"), "base_seed": build["settings"]["seed"],
            "base_steps": build["settings"]["steps"], "adapter": name, "coef": c, "seed": s, "split": split, **settings,
            "lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "batch_size": BATCH_SIZE,
        }  # fmt: skip
        if tuple(row[k] for k in KEY) in done:
            continue
        if name:
            model, figures = fine_tune(folder, name, c, s, settings, str(BASES.parent / "lab_study_trainer"))
            row |= figures
        else:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        row["open_ended"] = sampling.measure(model, world.open_ended_domains(), split, open_ended_draws, s).to_dict()
        row["in_domain"] = sampling.measure(model, (world.NARROW,), split, in_domain_draws, s).to_dict()
        row["versions"] = {k: version(k) for k in ("torch", "transformers", "trl", "peft", "accelerate")}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(
            f"base {row['base_seed']} {name} coef {c} seed {s} {split}: in-domain {row['in_domain']['bad_rate']:.3f} "
            f"EM {row['open_ended']['bad_rate']:.3f} coherence {row['open_ended']['coherence']:.3f} "
            f"loss {row.get('train_loss')} penalty {row.get('penalty')} cpu {row.get('train_cpu_s')}"
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
            groups[row["base_seed"], row["base_steps"], row["adapter"], row["coef"], row["learning_rate"], row["steps"]].append(row)

    def cell(rows: list[dict], part: str, count) -> str:
        k, n = sum(count(r[part]) for r in rows), sum(r[part]["n"] for r in rows)
        low, high = proportion_confint(k, n, method="wilson")
        each = [count(r[part]) / r[part]["n"] for r in rows]
        return f"{k / n:.3f} [{low:.3f}, {high:.3f}]\n{min(each):.3f} to {max(each):.3f}, n={n}"

    shown = Table("base", "adapter", "coef", "lr, steps", "seeds", "in-domain bad", "EM", "coherence", "CPU s", title=split)
    for (base_seed, base_steps, adapter, coef, rate, steps), rows in sorted(groups.items(), key=str):
        seconds = [r["train_cpu_s"] for r in rows if "train_cpu_s" in r]
        shown.add_row(
            f"{base_seed} ({base_steps})", adapter or "base", "" if coef is None else f"{coef:g}", f"{rate}, {steps}",
            str(len(rows)), cell(rows, "in_domain", lambda t: t["bad"]), cell(rows, "open_ended", lambda t: t["bad"]),
            cell(rows, "open_ended", lambda t: t["n"] - t["incoherent"]),
            f"{sum(seconds) / len(seconds):.0f}" if seconds else "",
        )  # fmt: skip
    Console(width=150).print(shown)


if __name__ == "__main__":
    app()
