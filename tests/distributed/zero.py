"""Runs of `scenarios.train` whose optimizer, gradients and weights DeepSpeed has cut into parts, on CPUs."""

import os
import sys
import traceback
from contextlib import nullcontext

import torch

from tests.distributed.scenarios import STEPS, block_em, kl, train


def trained(stage, folder, processes, **kw):
    """Train under ZeRO; on one process without DeepSpeed, which is what the parts are compared with."""
    if processes == 1:
        return plain(train(folder, 1, **kw))
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }  # fmt: skip
    return plain(train(folder, processes, deepspeed=config, **kw))


def plain(result):
    """Return a result's weights, logs and penalties, whole."""
    trainer = result["trainer"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    parts = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if parts:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parts)
    else:
        gathered = nullcontext()
    with gathered:
        weights = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"weights": weights, "logs": result["logs"], "cut": bool(parts), "coef": result["coef"]}


def whole_models_again():
    """Make transformers forget the last config: else the next model is made in parts already, and perturbed nowhere."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def resumed(stage, folder, processes, **kw):
    """Stop after the first step, and go on from its checkpoint."""
    saved = {"save_strategy": "steps", "save_only_model": False, **kw}
    trained(stage, folder, processes, max_steps=1, **saved)
    whole_models_again()
    return trained(stage, folder, processes, resume=str(folder / "checkpoint-1"), **saved)


FRESH = {"continued": False}
CELLS = {
    "treft, LoRA, coef 0": lambda s, f, n: trained(s, f, n, coef=0.0, **FRESH),
    "treft, full, coef 0": lambda s, f, n: trained(s, f, n, coef=0.0, full=True),
    "kl, full, coef 0": lambda s, f, n: trained(s, f, n, full=True, regularizer=kl(f, coef=0.0), **FRESH),
    "block_em, full, coef 0": lambda s, f, n: trained(s, f, n, full=True, regularizer=block_em(coef=0.0), **FRESH),
    "treft, LoRA": lambda s, f, n: trained(s, f, n, **FRESH),
    "treft, continued LoRA": lambda s, f, n: trained(s, f, n),
    "treft, full": lambda s, f, n: trained(s, f, n, full=True),
    "treft, LoRA, accumulated": lambda s, f, n: trained(
        s, f, n, per_device_train_batch_size=1, gradient_accumulation_steps=4 // n, **FRESH
    ),
    "treft, LoRA, resumed": lambda s, f, n: resumed(s, f, n, **FRESH),
    "kl, LoRA": lambda s, f, n: trained(s, f, n, regularizer=kl(f), **FRESH),
    "kl, LoRA, in memory": lambda s, f, n: trained(s, f, n, regularizer=kl(f, cache="memory"), **FRESH),
    "kl, continued LoRA": lambda s, f, n: trained(s, f, n, regularizer=kl(f)),
    "kl, full": lambda s, f, n: trained(s, f, n, full=True, regularizer=kl(f), **FRESH),
    "block_em, LoRA": lambda s, f, n: trained(s, f, n, regularizer=block_em(), **FRESH),
    "block_em, LoRA, in memory": lambda s, f, n: trained(s, f, n, regularizer=block_em(cache="memory"), **FRESH),
    "block_em, full": lambda s, f, n: trained(s, f, n, full=True, regularizer=block_em(coef=0.2), **FRESH),
}
"""By its name in README what a cell of the table runs, given the stage, a folder and the number of processes."""
REFUSED = {
    "kl, LoRA, checkpointing": lambda s, f, n: trained(
        s, f, n, regularizer=kl(f), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, **FRESH
    ),
}


def rank(number, processes, port, out, stage, names):
    """Run cells as one rank and leave the results in `out`."""
    os.environ.update(
        DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(processes),
    )  # fmt: skip
    import deepspeed
    import deepspeed.comm.torch  # noqa: F401  (in sys.modules below)

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for CPUs; gloo does without it
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for name in names:
        whole_models_again()
        try:
            result = {**CELLS, **REFUSED}[name](stage, out / name.replace(", ", "-"), processes)
        except Exception as exc:
            result = {"error": f"{type(exc).__name__}: {exc}", "trace": traceback.format_exc()}
        torch.save(result, out / f"{name}.{number}.pt")


assert STEPS > 1
