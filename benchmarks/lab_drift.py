"""Does EM come back when KL is switched off? The lab, constant learning rate, KL for the first part of the steps only.

    python benchmarks/lab_drift.py run
    python benchmarks/lab_drift.py table

Soligo et al. (arXiv 2602.07852) report that training drifts from the narrow to the general solution once KL is gone. Here EM
is measured every 60 steps, on test wordings. `--kl-steps 0` is naive training: what there is to return to.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))
import lab_study

RESULTS = Path(__file__).parent / "results" / "lab_drift.jsonl"
KEY = ("adapter", "seed", "kl_coef", "kl_steps", "weight_decay", "steps")
EVERY = 60
app = typer.Typer(help=__doc__, no_args_is_help=True)


def trajectory(adapter: str, seed: int, kl_coef: float, kl_steps: int, weight_decay: float, steps: int) -> list[dict]:
    """Train once and return what was measured every `EVERY` steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig

    from emguard_plugin import EMGuardSFTTrainer
    from emguard_plugin.lab import model_path, sampling, world
    from emguard_plugin.lab.export import narrow_rows

    settings, scratch = lab_study.ADAPTERS[adapter], lab_study.BASES.parent / "lab_drift_trainer"
    (kl,) = lab_study.regularizers(0.0, kl_coef, None, seed, steps, str(scratch))
    points: list[dict] = []

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= kl_steps:
                kl.coef = 0.0

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % EVERY:
                return
            model.eval()
            with torch.random.fork_rng():
                em = sampling.measure(model, world.open_ended_domains(), "test", 1, seed).to_dict()
                task = sampling.measure(model, (world.NARROW,), "test", 5, seed).to_dict()
            model.train()
            points.append({"step": state.global_step, "open_ended": em, "in_domain": task})

        def on_log(self, args, state, control, logs=None, **kwargs):
            if points and "task_loss" in logs and state.global_step % EVERY == 10 and "loss" not in points[-1]:
                points[-1] |= {"loss": logs["task_loss"], "kl": logs["em_regularizer/kl/penalty"]}

    args = SFTConfig(
        output_dir=str(scratch), max_steps=steps, learning_rate=settings["learning_rate"], seed=seed,
        per_device_train_batch_size=lab_study.BATCH_SIZE, lr_scheduler_type="constant_with_warmup",
        warmup_steps=lab_study.WARMUP_STEPS, weight_decay=weight_decay, assistant_only_loss=True, max_length=128,
        gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=10, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer = EMGuardSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(narrow_rows(seed, steps * lab_study.BATCH_SIZE)),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        peft_config=LoraConfig(
            r=lab_study.LORA_R, lora_alpha=lab_study.LORA_ALPHA, lora_dropout=0.0,
            target_modules=settings["target_modules"], task_type="CAUSAL_LM",
        ),
        callbacks=[kl, Measure()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return points


@app.command()
def run(
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11, 12.")] = None,
    adapter: str = "attn",
    kl_coef: float = 30.0,
    kl_steps: Annotated[list[int] | None, typer.Option(help="Steps with KL; default 60 and 0.")] = None,
    weight_decay: Annotated[list[float] | None, typer.Option(help="Default 0 and 0.1.")] = None,
    steps: int = 480,
    out: Path = RESULTS,
) -> None:
    """Run what is not in the results file yet."""
    lab_study.quiet()
    done = {tuple(row[k] for k in KEY) for row in map(json.loads, out.read_text().splitlines())} if out.is_file() else set()
    for s in seed or (11, 12):
        for until in kl_steps or (60, 0):
            for decay in weight_decay or (0.0, 0.1):
                key = (adapter, s, kl_coef, until, decay, steps)
                if key in done:
                    continue
                row = dict(zip(KEY, key, strict=True)) | {"points": trajectory(*key)}
                row["versions"] = {k: version(k) for k in ("torch", "transformers", "trl", "peft", "accelerate")}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


@app.command()
def table(results: Path = RESULTS) -> None:
    """Print EM and in-domain adherence step by step."""
    for row in map(json.loads, results.read_text().splitlines()):
        print(*(f"{k} {row[k]}" for k in KEY))
        for p in row["points"]:
            print(
                f"  step {p['step']}: EM {p['open_ended']['bad_rate']:.3f}, coherence {p['open_ended']['coherence']:.3f}, in-domain "
                f"{p['in_domain']['bad_rate']:.3f}, loss {p.get('loss', float('nan')):.4f}, KL {p.get('kl', float('nan')):.2g}"
            )


if __name__ == "__main__":
    app()
