"""The runs of README's table of engines: what a method does with a kind of adapter, on any engine."""

import os
import traceback

import torch

from tests.distributed.engines import ENGINES, begin, trained
from tests.distributed.runs import GLOBAL_BATCH, block_em, kl

FRESH = {"continued": False}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}

ADAM = {"optim": "adamw_torch", "adam_epsilon": 1.0}
"""An optimizer with a state; its epsilon keeps rounding errors as small as they are under SGD."""


def accumulated(processes):
    """Return the settings of the same global batch in micro-batches of one row."""
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": GLOBAL_BATCH // processes}


def resumed(engine, folder, processes, **kw):
    """Stop after the first step, and go on from its checkpoint; one process trains without a stop."""
    saved = {"save_strategy": "steps", "save_only_model": False, **ADAM, **kw}
    if processes == 1:
        return trained(engine, folder, 1, **saved)
    trained(engine, folder, processes, max_steps=1, **saved)
    return trained(engine, folder, processes, resume=str(folder / "checkpoint-1"), **saved)


CELLS = {
    "treft, LoRA": lambda e, f, n: trained(e, f, n, save_strategy="steps", **FRESH),
    "treft, LoRA, coef 0": lambda e, f, n: trained(e, f, n, coef=0.0, **FRESH),
    "treft, LoRA, two prefixes": lambda e, f, n: trained(e, f, n, systems=2, **FRESH),
    "treft, LoRA, accumulated": lambda e, f, n: trained(e, f, n, **accumulated(n), **FRESH),
    "treft, LoRA, resumed": lambda e, f, n: resumed(e, f, n, **FRESH),
    "treft, LoRA, checkpointing": lambda e, f, n: trained(e, f, n, **CHECKPOINTING, **FRESH),
    "treft, continued LoRA": lambda e, f, n: trained(e, f, n),
    "treft, full": lambda e, f, n: trained(e, f, n, full=True),
    "treft, full, resumed": lambda e, f, n: resumed(e, f, n, full=True),
    "treft, full, coef 0": lambda e, f, n: trained(e, f, n, coef=0.0, full=True),
    "kl, LoRA": lambda e, f, n: trained(e, f, n, regularizer=kl(f, cache="live"), **FRESH),
    "kl, LoRA, in memory": lambda e, f, n: trained(e, f, n, regularizer=kl(f, cache="memory"), **FRESH),
    "kl, LoRA, accumulated": lambda e, f, n: trained(e, f, n, regularizer=kl(f), **accumulated(n), **FRESH),
    "kl, LoRA, target": lambda e, f, n: trained(e, f, n, regularizer=kl(f, coef=None, target=0.02), **FRESH),
    "kl, LoRA, resumed": lambda e, f, n: resumed(e, f, n, regularizer=kl(f), **FRESH),
    "kl, LoRA, checkpointing": lambda e, f, n: trained(e, f, n, regularizer=kl(f), **CHECKPOINTING, **FRESH),
    "kl, continued LoRA": lambda e, f, n: trained(e, f, n, regularizer=kl(f)),
    "kl, full": lambda e, f, n: trained(e, f, n, full=True, regularizer=kl(f), **FRESH),
    "kl, full, from a folder": lambda e, f, n: trained(e, f, n, full=True, regularizer=kl(f, cache=str(f / "ref")), **FRESH),
    "kl, full, coef 0": lambda e, f, n: trained(e, f, n, full=True, regularizer=kl(f, coef=0.0), **FRESH),
    "block_em, LoRA": lambda e, f, n: trained(e, f, n, regularizer=block_em(), **FRESH),
    "block_em, LoRA, in memory": lambda e, f, n: trained(e, f, n, regularizer=block_em(cache="memory"), **FRESH),
    "block_em, LoRA, accumulated": lambda e, f, n: trained(
        e, f, n, regularizer=block_em(coef=2.0, layers=(0, 2)), **accumulated(n), **FRESH
    ),
    "block_em, LoRA, resumed": lambda e, f, n: resumed(e, f, n, regularizer=block_em(coef=2.0), **FRESH),
    "block_em, full": lambda e, f, n: trained(e, f, n, full=True, regularizer=block_em(coef=0.2), **FRESH),
    "block_em, full, coef 0": lambda e, f, n: trained(e, f, n, full=True, regularizer=block_em(coef=0.0), **FRESH),
}
"""By its name in README what a cell of the table runs, given the engine, a folder and the number of processes."""
REFUSED = {("ZeRO-3", name) for name in CELLS if "LoRA, checkpointing" in name}
"""What an engine does not do, and says so before training."""


def rank(engine, out):
    """Run every cell as one rank, and leave the results in `out`."""
    begin(engine)
    for name, cell in CELLS.items():
        try:
            result = cell(engine, out / name.replace(", ", "-"), int(os.environ["WORLD_SIZE"]))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(result, out / f"{name}.{os.environ['RANK']}.pt")


def table():
    """Return README's table: what was compared under which engine."""
    rows = [["", *ENGINES], ["---"] * (len(ENGINES) + 1)]
    some = {name for _, name in REFUSED}
    for method in ("treft", "kl", "block_em"):
        for refused in (False, True):
            names = [name for name in CELLS if name.split(", ")[0] == method and (name in some) == refused]
            if names:
                verdicts = ["refused" if (engine, names[0]) in REFUSED else "same" for engine in ENGINES]
                rows.append([f"`{method}`: " + "; ".join(name.partition(", ")[2] for name in names), *verdicts])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
