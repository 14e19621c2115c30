"""Discovery on the lab by the published schedule and by halving: answers, generated tokens, and whether the sets are equal.

    python benchmarks/discovery.py ADAPTER --work FOLDER                     # 60 candidates per sign, 15 strengths
    python benchmarks/discovery.py ADAPTER --work FOLDER --pool 250 --prompts 84

ADAPTER is a naive fine-tune of the shipped lab base, for instance from benchmarks/lab_study.py. Both searches share a folder of
answers, so what both ask is drawn once; what each asks is counted in full. Run it again after an interruption.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.results import Results

RESULTS = Path(__file__).parent / "results" / "discovery.jsonl"


def search(adapter: Path, sae_folder: Path, work: Path, settings, prompts: int, every: int, questions: list):
    """Run both schedules on one pool. Returns {schedule: (set, spent)}."""
    from emguard_plugin.discovery.kept import Kept
    from emguard_plugin.discovery.search import LayerSearch
    from emguard_plugin.evaluation.asking.pair import ModelPair
    from emguard_plugin.evaluation.asking.prompts import render_prompts
    from emguard_plugin.evaluation.judges.named import read_judge
    from emguard_plugin.latents.sae import layer_of, load_sae

    pair, sae = ModelPair(adapter), load_sae(str(sae_folder))
    rendered = render_prompts(pair.tokenizer, questions)[:prompts]
    judge, found = read_judge("emguard_plugin.lab:judge_answer"), {}
    work.mkdir(parents=True, exist_ok=True)
    for schedule in ("full", "halving"):
        layer_search = LayerSearch(
            pair,
            sae,
            sae_folder.name,
            layer_of(sae),
            rendered,
            len(rendered),
            judge,
            replace(settings, schedule=schedule),
            Kept(work, "benchmark"),
        )
        with layer_search.bench as bench:
            layer_search.screen.ask_unsteered()
            # Every n-th candidate of each sign: a smaller pool that still reaches down to small shifts.
            pool = layer_search.stage_one()
            sides = [[c for c in pool if c.sign == sign][::every] for sign in (1, -1)]
            pool = sorted((c for side in sides for c in side), key=lambda c: (-abs(c.delta), c.id))
            valid = layer_search.screen.calibrate(layer_search.screen.shortlist(pool))
            found[schedule] = ([(f.candidate.id, f.candidate.sign) for f in valid], bench.spent() | {"candidates": len(pool)})
    return found


def main(
    adapter: Annotated[Path, typer.Argument(help="A naive LoRA on the lab's base.", exists=True)],
    work: Annotated[Path, typer.Option(help="Folder of answers.")],
    sae: Annotated[Path | None, typer.Option(help="Default: the lab's SAE of block 1.")] = None,
    pool: Annotated[int, typer.Option(help="Candidates per sign before thinning.")] = 250,
    every: Annotated[int, typer.Option(help="Take every n-th of them.")] = 4,
    prompts: Annotated[int, typer.Option(help="Selection prompts (of 84 val wordings).")] = 28,
    shortlist: int = 20,
    size: int = 10,
    out: Annotated[Path, typer.Option(help="Append the figures as a JSON line.")] = RESULTS,
) -> None:
    """Run both schedules and print a table."""
    import torch
    import yaml
    from rich.console import Console
    from rich.table import Table

    from emguard_plugin.discovery.settings import Settings
    from emguard_plugin.evaluation.asking.questions import load_questions
    from emguard_plugin.lab import model_path, world
    from emguard_plugin.lab.export import question_items

    torch.set_num_threads(1)
    items = list(question_items(world.open_ended_domains(), "val"))
    work.mkdir(parents=True, exist_ok=True)
    suite = work / "questions.yaml"
    suite.write_text(yaml.safe_dump(items[:: max(1, len(items) // prompts)], sort_keys=False, width=1000))
    settings = Settings(
        positions="prefix", steer_at="prefix", pool=pool, shortlist=shortlist, size=size, induce=0.8, repair=0.6,
        max_new_tokens=26, batch_size=256,
    )  # fmt: skip
    found = search(adapter, sae or model_path().parent / "sae" / "layer_1", work, settings, prompts, every, load_questions(suite))
    table = Table("schedule", "candidates", "answers", "generated tokens", "judgments", "set")
    for schedule, (chosen, spent) in found.items():
        figures = [f"{spent[key]:,}" for key in ("candidates", "answers", "tokens", "judgments")]
        table.add_row(schedule, *figures, " ".join(f"{'+' if sign > 0 else '-'}{latent}" for latent, sign in chosen))
    Console(width=150).print(table)
    (full, most), (halved, least) = found["full"], found["halving"]
    ratio = most["tokens"] / least["tokens"]
    typer.echo(
        f"{ratio:.1f} x fewer tokens, {'OTHER SETS' if set(full) != set(halved) else 'the same set' if full else 'both sets are empty'}"
    )
    row = {
        "settings": settings.to_dict() | {"every": every, "prompts": prompts, "sae": "layer_1"}, "tokens_ratio": ratio,
        "same": set(full) == set(halved), "runs": found,
        "versions": versions(("torch", "transformers", "peft", "sae-lens")),
    }  # fmt: skip
    Results(out).append(row)


if __name__ == "__main__":
    typer.run(main)
