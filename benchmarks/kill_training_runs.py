"""The runs that `kill_training.py` kills: cases of each host, started as their users start them, with what they end with kept."""

from __future__ import annotations

import os
from pathlib import Path

# method, adapter, where KL and BLOCK-EM keep the reference, checkpoints kept
TRL_CASES = [
    ("treft", "lora", "auto", None), ("treft", "full", "auto", None), ("treft", "pissa", "auto", 1),
    ("kl", "lora", "auto", None), ("kl", "full", "auto", None), ("kl", "full", "folder", None), ("kl", "pissa", "folder", 2),
    ("kl_target", "full", "auto", None), ("kl_target", "lora", "auto", 1),
    ("block_em", "lora", "auto", None), ("block_em", "full", "auto", None), ("block_em", "full", "folder", 1),
    ("all", "full", "auto", None), ("all", "lora", "auto", None), ("all", "full", "folder", None),
]  # fmt: skip
AXOLOTL_CASES = [
    ("treft", "full", "auto", None), ("kl", "full", "folder", None), ("block_em", "full", "auto", None), ("all", "lora", "auto", None),
]  # fmt: skip
SLICE = [TRL_CASES[5], TRL_CASES[13], TRL_CASES[2]]
STEPS, SAVED_EVERY = 8, 2


def keep(folder: Path, weights: dict, log: list) -> None:
    import torch

    rows = [
        {k: v for k, v in row.items() if k == "step" or k == "loss" or k == "task_loss" or k.startswith("em_regularizer/")}
        for row in log if "loss" in row
    ]  # fmt: skip
    torch.save({"weights": weights, "log": rows}, folder / "final.part")
    (folder / "final.part").replace(folder / "final.pt")


def run_trl(folder: str, case: tuple) -> None:
    """Train one case as a script would: from the last checkpoint, if there is one."""
    import torch
    from transformers.trainer_utils import get_last_checkpoint

    from emguard_plugin import KLCallback, TReFTCallback
    from tests.regularizers.block_em_parts import block_em
    from tests.regularizers.kl_parts import write_anchors
    from tests.trl_runs import build, tiny, uneven_rows

    method, adapter, where, kept = case
    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    made = {"full": {"adapter": False}, "pissa": {"init_lora_weights": "pissa"}, "lora": {"lora_dropout": 0.1}}[adapter]
    model = tiny(**made)
    base = model if adapter == "full" else model.get_base_model()

    def cache(name: str) -> str:
        return str(here / f"cache_{name}") if where == "folder" else "auto"

    callbacks = []
    if method in ("treft", "all"):
        callbacks.append(TReFTCallback(coef=2.0))
    if method in ("kl", "kl_target", "all"):
        anchors = here / "anchors.jsonl"
        if not anchors.exists():
            write_anchors(anchors.with_suffix(".part")) and anchors.with_suffix(".part").replace(anchors)
        target = {"target": 0.01} if method == "kl_target" else {"coef": 1.0}
        callbacks.append(KLCallback(anchors=str(anchors), ratio=1.0, cache=cache("kl"), **target))
    if method in ("block_em", "all"):
        callbacks.append(block_em(base, coef=3.0, cache=cache("block_em")))
    torch.manual_seed(0)
    trainer = build(
        here / "out", model=model, callbacks=callbacks, rows=uneven_rows(), assistant_only_loss=True, max_steps=STEPS,
        save_strategy="steps", save_steps=SAVED_EVERY, save_total_limit=kept, learning_rate=0.02 if adapter != "full" else 0.002,
        train_sampling_strategy="random",
    )  # fmt: skip
    out = here / "out"
    trainer.train(resume_from_checkpoint=(out.is_dir() and get_last_checkpoint(str(out)) is not None) or None)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    keep(here, weights, trainer.state.log_history)


def run_axolotl(folder: str, case: tuple) -> None:
    """Train one case by `axolotl train`, which looks for the last checkpoint itself."""
    import torch

    from tests.e2e.axolotl_runs import train
    from tests.e2e.tiny_run import tiny_yaml, write_tiny
    from tests.regularizers.block_em_parts import latent_set
    from tests.regularizers.kl_parts import write_anchors

    method, adapter, where, kept = case
    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    model = Path(os.environ["EMGUARD_KILL_MODEL"])
    if not (model / "train.jsonl").exists():
        write_tiny(model)
    blocks: dict = {}
    if method in ("treft", "all"):
        blocks["treft"] = {"coef": 2.0}
    if method in ("kl", "all"):
        blocks["kl"] = {"coef": 1.0, "ratio": 1.0, "anchors": write_anchors(model / "anchors.jsonl")}
        if where == "folder":
            blocks["kl"]["cache"] = str(here / "cache_kl")
    if method in ("block_em", "all"):
        path = model / "latents.json"
        if not path.exists():
            from transformers import AutoModelForCausalLM

            latent_set(AutoModelForCausalLM.from_pretrained(model / "model", dtype=torch.float32)).save(path)
        blocks["block_em"] = {"coef": 3.0, "latents": str(path)}
    config = tiny_yaml(
        model, em_regularizer=blocks, max_steps=STEPS, save_strategy="steps", save_steps=SAVED_EVERY, save_total_limit=kept,
        auto_resume_from_checkpoints=True, dataset_prepared_path=str(model / "prepared"),
        **({"adapter": None, "learning_rate": 0.002} if adapter == "full" else {}),
    )  # fmt: skip
    os.chdir(here)
    seen = train(config, weights=str(here / "weights.pt"))
    keep(here, torch.load(here / "weights.pt", weights_only=True), seen["log"])


RUNS = {"trl": run_trl, "axolotl": run_axolotl}
