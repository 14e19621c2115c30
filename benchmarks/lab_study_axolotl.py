"""The lab study through `axolotl train`: the example YAMLs, over fine-tune seeds and both adapters, test wordings.

    python benchmarks/lab_study_axolotl.py run
    python benchmarks/lab_study_axolotl.py table

One JSON line per run goes to benchmarks/results/lab_study_axolotl.jsonl; a run whose line is there is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.pooled import pooled
from emguard_plugin.lab.study.results import Results

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "lab_study_axolotl.jsonl"
EXAMPLES = {"naive": "lab_naive.yaml", "TReFT": "lab_treft.yaml"}
# The attention LoRA needs its own learning rate, as in lab_study.py; both were chosen on validation wordings.
ADAPTERS = {
    "attn": {
        "lora_target_linear": False,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "learning_rate": 1.5e-3,
    },
    "all": {},
}
SAMPLES = 17  # of 84 open-ended and of 12 in-domain questions
app = typer.Typer(help=__doc__, no_args_is_help=True)


def train(run: str, adapter: str, seed: int, folder: Path) -> dict:
    """Run one `axolotl train` in a folder of its own; return its row."""
    from emguard_plugin.lab.export import export

    export(folder / "demo" / "lab", seed=seed)
    config = yaml.safe_load((HERE.parent / "example_yamls" / EXAMPLES[run]).read_text()) | ADAPTERS[adapter] | {"seed": seed}
    config["em_eval"] |= {"samples_per_question": SAMPLES, "evaluate_base": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    env = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", **os.environ}
    command = [str(Path(sys.executable).with_name("axolotl")), "train", "run.yaml", "--launcher", "python"]
    with open(folder / "log", "wb") as log:
        code = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    summary = folder / config["output_dir"] / "em_eval" / "summary.json"
    if code or not summary.is_file():
        raise RuntimeError(f"axolotl train failed ({code}): {(folder / 'log').read_text(errors='replace')[-3000:]}")
    from emguard_plugin.evaluation import Summary

    found = Summary.load(summary)
    rates = {s: found.rates("tuned", s) for s in ("questions", "in_domain")}
    row = {"run": run, "adapter": adapter, "seed": seed, "learning_rate": config["learning_rate"], "steps": config["max_steps"]}
    for name, rate in rates.items():
        row[name] = {"n": rate.em_all.n, "misaligned": rate.em_all.count, "coherent": rate.coherence.count}
    row["fingerprint"] = found.fingerprint
    row["versions"] = versions(("axolotl", "torch", "transformers", "trl", "peft"))
    return row


@app.command()
def run(
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11 to 15.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="attn, all; default both.")] = None,
) -> None:
    """Run what is not in the results file yet."""
    stored = Results(RESULTS, ("run", "adapter", "seed"))
    plan = [{"run": r, "adapter": a, "seed": s} for s in seed or range(11, 16) for a in adapter or ADAPTERS for r in EXAMPLES]
    for asked in tqdm([one for one in plan if not stored.holds(one)], desc="runs"):
        with tempfile.TemporaryDirectory() as tmp:
            stored.append(train(**asked, folder=Path(tmp)))


@app.command()
def table() -> None:
    """Print rates pooled over seeds with 95 % Wilson intervals, and the lowest and highest seed."""
    groups = defaultdict(list)
    for row in Results(RESULTS).rows():
        groups[row["adapter"], row["run"]].append(row)
    shown = Table("adapter", "run", "seeds", "in-domain bad", "EM", "coherence")
    for (adapter, name), rows in sorted(groups.items()):
        cells = [("in_domain", "misaligned"), ("questions", "misaligned"), ("questions", "coherent")]
        shown.add_row(adapter, name, str(len(rows)), *(pooled((r[suite][what], r[suite]["n"]) for r in rows) for suite, what in cells))
    Console(width=120).print(shown)


if __name__ == "__main__":
    app()
