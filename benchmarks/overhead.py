"""What a guard costs: step time and peak memory of guarded SFT over plain SFT, through the real TRL trainers.

    python benchmarks/overhead.py                                # random 8-layer, 512-wide Llama, 8 x 512 tokens, LoRA
    python benchmarks/overhead.py --full                         # full fine-tuning
    python benchmarks/overhead.py --device cuda --llama-8b       # the shape of Llama-3.1-8B in bf16
    python benchmarks/overhead.py --method kl                    # KL on anchors, 1/8 anchor token per training token
    python benchmarks/overhead.py --method block_em              # BLOCK-EM, 20 latents at 60 % depth

With `MALLOC_ARENA_MAX=1` in the environment glibc gives memory back between variants; without it `--method kl` needs 20 GB.

All variants train in one process, each in its own thread of which one runs at a time: they take turns step by step, in
an order that rotates, so that other users of the machine slow them alike. A step is all that the training loop does:
batch, forward, backward, clipping, optimizer, logging. Reported is the median over rounds of the ratio to plain SFT in
the same round, by the clock and, on the CPU, by processor time, which other users of the machine disturb less; "plain
SFT again" shows the noise. Where that exceeds the cost, "alone" says more: 1 + the time of TReFT's forward and backward
pass by itself, measured after the round's steps, over the round's plain step. Peak memory is counted per allocation
(CPU: the profiler's record on top of weights, optimizer state and reference; CUDA: `max_memory_allocated`), one variant
at a time.

"In-batch hidden states" does what TReFT's released code does (arXiv 2606.06667): it asks every forward pass for all
hidden states and puts k_proj and v_proj on the columns of the prefix. Written from its description. "Second model, all
logits" is the published recipe of KL (arXiv 2602.07852) on the very anchors that the others draw: see `overhead_kl.py`.
"Second model, whole encoder" is that of BLOCK-EM (arXiv 2602.00767): see `overhead_block_em.py`. With it there is a warm-up of
an epoch, so that the recorded variant has recorded; "extra over weights" is its peak minus plain SFT's, over the model's weights.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from overhead_measures import alone, peak_memory, time_rounds
from overhead_variants import AGAIN, BLOCK_CACHED, BLOCK_LIVE, BY_ITSELF, KL_CACHED, KL_LIVE, PLAIN, TREFT, VARIANTS, weight_bytes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from emguard_plugin.files.versions import versions

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
RESULTS = Path(__file__).parent / "results" / "overhead.json"
# Guarded variant -> most step time and peak memory that its issue allows, over plain SFT.
TARGETS = {
    TREFT: {"time": 1.03, "memory": 1.02},
    KL_LIVE: {"time": 1.20, "memory": 1.10},
    KL_CACHED: {"time": 1.15, "memory": 1.10},
    BLOCK_LIVE: {"time": 1.35, "extra": 0.02},
    BLOCK_CACHED: {"time": 1.05, "extra": 0.02},
}


def summarise(
    rounds: list[dict[str, tuple[float, float]]], memory: dict[str, int], variants: tuple[str, ...], weights: int
) -> dict[str, Any]:
    """Return the figures per variant; `weights` are the model's, in bytes."""
    rows = {}
    for v in variants:
        clock = [r[v][0] / r[PLAIN][0] for r in rounds]
        low, _, high = statistics.quantiles(clock, n=4) if len(clock) > 1 else (clock[0],) * 3
        rows[v] = {
            "median_seconds": statistics.median(r[v][0] for r in rounds),
            "time_ratio": statistics.median(clock),
            "time_ratio_quartiles": [low, high],
            "cpu_time_ratio": statistics.median(r[v][1] / r[PLAIN][1] for r in rounds),
        }
        if v in BY_ITSELF:
            by_itself = [(r[alone(v)][0], 1 + r[alone(v)][0] / r[PLAIN][0]) for r in rounds]
            rows[v] |= {
                "alone_seconds": statistics.median(t for t, _ in by_itself),
                "alone_ratio": statistics.median(x for _, x in by_itself),
            }
        if v in memory:
            rows[v] |= {"peak_bytes": memory[v], "memory_ratio": memory[v] / memory[PLAIN]}
            rows[v]["extra_over_weights"] = (memory[v] - memory[PLAIN]) / weights
    return rows


def show(console: Console, title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title)
    for column in ("", "s/step", "step time", "quartiles", "CPU time", "alone", "peak MB", "peak memory"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    for variant, row in rows.items():
        low, high = row["time_ratio_quartiles"]
        memory = (f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['memory_ratio']:.4f}") if "peak_bytes" in row else ("", "")
        table.add_row(
            variant,
            f"{row['median_seconds']:.3f}",
            f"{row['time_ratio']:.4f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['cpu_time_ratio']:.4f}",
            f"{row['alone_ratio']:.4f}" if "alone_ratio" in row else "",
            *memory,
        )
    console.print(table)


def store(out: Path, name: str, settings: dict[str, Any], raw: list[Any], peaks: dict[str, int]) -> None:
    """Write the record of this setting, leaving the others in the file; after every round, so that none is lost."""
    import torch

    cuda, variants = settings["device"] == "cuda", VARIANTS[settings["method"]]
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "emguard-plugin")
    record = {
        "settings": settings,
        "versions": {"python": platform.python_version(), **versions(packages)},
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "targets": {v: TARGETS[v] for v in VARIANTS[settings["method"]] if v in TARGETS},
        "results": summarise(raw, peaks, VARIANTS[settings["method"]], weight_bytes(settings)),
        "paired_ratios": {v: [round(r[v][0] / r[PLAIN][0], 5) for r in raw] for v in variants if v != PLAIN},
        "paired_cpu_ratios": {v: [round(r[v][1] / r[PLAIN][1], 5) for r in raw] for v in variants if v != PLAIN},
        "seconds": {v: [round(r[v][0], 5) for r in raw] for v in raw[0]},
    }
    stored = json.loads(out.read_text()) if out.is_file() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**stored, name: record}, indent=1, sort_keys=True) + "\n")


def main(
    method: Annotated[str, typer.Option(help="treft, kl or block_em.")] = "treft",
    ratio: Annotated[float, typer.Option(help="KL: anchor tokens per training token.")] = 0.125,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning instead of LoRA on all linear layers.")] = False,
    device: Annotated[str, typer.Option(help="cpu (fp32) or cuda (bf16).")] = "cpu",
    llama_8b: Annotated[bool, typer.Option("--llama-8b", help="The shape of Llama-3.1-8B, random weights.")] = False,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 24,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    batch: Annotated[int, typer.Option(help="Rows per micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per optimizer step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the prefix.")] = 30,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Non-reentrant gradient checkpointing.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory as well.")] = True,
    out: Annotated[Path, typer.Option(help="Result file; other settings in it are kept.")] = RESULTS,
) -> None:
    """Print and store step-time and peak-memory ratios."""
    import torch

    warnings.filterwarnings("ignore")
    warmup = max(warmup, 4) if method == "block_em" else warmup  # an epoch has four micro-batches
    settings: dict[str, Any] = {
        "method": method,
        "ratio": ratio,
        "alone_times": 9 if method == "treft" else 3,
        "shape": "llama-8b" if llama_8b else "8x512",
        "full": full,
        "device": device,
        "batch": batch,
        "accumulation": accumulation,
        "length": length,
        "prefix_tokens": prefix_tokens,
        "gradient_checkpointing": gradient_checkpointing,
        "rounds": rounds,
        "warmup": warmup,
        "threads": threads,
    }
    torch.set_num_threads(threads)
    console = Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    peaks: dict[str, int] = {}
    raw: list[dict[str, tuple[float, float]]] = []
    name = "-".join(
        [settings["shape"], "full" if full else "lora", device]
        + ([f"accumulation{accumulation}"] if accumulation > 1 else [])
        + (["checkpointing"] if gradient_checkpointing else [])
        + ([method] if method != "treft" else [])
    )
    with tempfile.TemporaryDirectory() as tmp, Progress(*columns, console=console) as progress:
        if memory:
            measured = [v for v in VARIANTS[method] if v != AGAIN]
            task = progress.add_task("peak memory", total=len(measured))
            for variant in measured:
                peaks[variant] = peak_memory(variant, settings, Path(tmp))
                progress.advance(task)
        task = progress.add_task("step time", total=rounds + warmup)
        for seconds in time_rounds(settings, Path(tmp), lambda: progress.advance(task)):
            raw.append(seconds)
            store(out, name, settings, raw, peaks)
    rows = summarise(raw, peaks, VARIANTS[method], weight_bytes(settings))
    show(console, f"{name}: {batch} x {length} tokens, prefix of {prefix_tokens}, {rounds} rounds", rows)
    for variant, targets in TARGETS.items():
        for what, key, kind in (
            ("step time, paired", "time_ratio", "time"),
            ("step time, alone", "alone_ratio", "time"),
            ("peak memory", "memory_ratio", "memory"),
            ("extra peak memory over weights", "extra_over_weights", "extra"),
        ):
            value = rows.get(variant, {}).get(key)
            if value is not None and kind in targets:  # memory may be left out
                verdict = "met" if value <= targets[kind] else "MISSED"
                console.print(f"{variant}, {what}: {value:.4f} (target {targets[kind]}) {verdict}")


if __name__ == "__main__":
    typer.run(main)
