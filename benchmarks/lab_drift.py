"""Does EM come back when KL is switched off? The lab, constant learning rate, KL for the first part of the steps only.

    python benchmarks/lab_drift.py run
    python benchmarks/lab_drift.py table

Soligo et al. (arXiv 2602.07852) report that training drifts from the narrow to the general solution once KL is gone. Here EM
is measured every 60 steps, on test wordings. `--kl-steps 0` is naive training: what there is to return to.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.process import one_quiet_thread
from emguard_plugin.lab.study.results import Results
from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "lab_drift.jsonl"
SCRATCH = Path(__file__).parent.parent / "build" / "lab_drift_trainer"
IDENTITY = ("adapter", "seed", "kl_coef", "kl_steps", "weight_decay", "steps")
EVERY, LOGGED = 60, 10
app = typer.Typer(help=__doc__, no_args_is_help=True)


def trajectory(adapter: str, seed: int, kl_coef: float, kl_steps: int, weight_decay: float, steps: int) -> list[dict]:
    """Train once and return what was measured every `EVERY` steps."""
    from emguard_plugin.lab import model_path
    from emguard_plugin.lab.export import narrow_rows
    from emguard_plugin.lab.study.callbacks import EverySteps, SwitchOff, kl_on_anchors
    from emguard_plugin.lab.study.measures import measures
    from emguard_plugin.lab.study.trl_fine_tune import fine_tune

    kl, points = kl_on_anchors(kl_coef, seed, SCRATCH), []

    def measure(step: int, model) -> None:
        points.append({"step": step, **measures(model, "test", seed, open_ended_draws=1, in_domain_draws=5)})

    done = fine_tune(
        model_path(), replace(ADAPTERS[adapter], steps=steps), narrow_rows(seed, steps * BATCH_SIZE), seed, SCRATCH,
        [kl, SwitchOff(kl, kl_steps), EverySteps(EVERY, measure)], schedule="constant_with_warmup", weight_decay=weight_decay,
    )  # fmt: skip
    logged = {log["step"]: log for log in done.log}
    for point in points:
        # The first log behind a measure is of the steps that follow it.
        if log := logged.get(point["step"] + LOGGED):
            point |= {"loss": log["task_loss"], "kl": log["em_regularizer/kl/penalty"]}
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
    one_quiet_thread()
    stored = Results(out, IDENTITY)
    for s in seed or (11, 12):
        for until in kl_steps or (60, 0):
            for decay in weight_decay or (0.0, 0.1):
                row = dict(zip(IDENTITY, (adapter, s, kl_coef, until, decay, steps), strict=True))
                if not stored.holds(row):
                    row["points"] = trajectory(**row)
                    stored.append(row | {"versions": versions(("torch", "transformers", "trl", "peft", "accelerate"))})


@app.command()
def table(results: Path = RESULTS) -> None:
    """Print EM and in-domain adherence step by step."""
    for row in Results(results).rows():
        print(*(f"{k} {row[k]}" for k in IDENTITY))
        for p in row["points"]:
            print(
                f"  step {p['step']}: EM {p['open_ended']['bad_rate']:.3f}, coherence {p['open_ended']['coherence']:.3f}, in-domain "
                f"{p['in_domain']['bad_rate']:.3f}, loss {p.get('loss', float('nan')):.4f}, KL {p.get('kl', float('nan')):.2g}"
            )


if __name__ == "__main__":
    app()
