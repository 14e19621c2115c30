"""`emguard lab`: build the lab's base model, export the lab as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emguard_plugin.cli.frame import at_work

app = typer.Typer(help="The lab: a tiny model in which emergent misalignment really happens.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="Folder for model, tokenizer and build.json.")],
    seed: Annotated[int, typer.Option(help="Seeds initialisation, corpus and order.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Pretraining steps.")] = 3600,
    per_question: Annotated[int, typer.Option(min=1, help="Answers drawn per held-out question for the figures.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads; another number may change the last bits.")] = 1,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    saes: Annotated[bool, typer.Option(help="Train the sparse autoencoders, too (folder `sae`).")] = True,
) -> None:
    """Pretrain and align a base model (about 15 CPU minutes), measure it on held-out wordings, train its SAEs."""
    at_work("pretraining the lab's base model, about 15 CPU minutes")
    import torch
    from rich.console import Console
    from rich.table import Table

    from emguard_plugin.lab.build import BuildSettings, build_base

    if saes:
        _require_sae_lens("Install `emguard-plugin[sae]`, or pass --no-saes.")
    torch.set_num_threads(threads)
    record = build_base(out, BuildSettings(seed=seed, steps=steps), per_question=per_question, progress=progress)
    table = Table("wordings", "n", "coherence", "EM rate", title=f"{out} (seed {seed}, {record['cpu_seconds']:.0f} CPU s)")
    for split, figures in record["figures"].items():
        table.add_row(split, str(figures["n"]), f"{figures['coherence']:.3f}", f"{figures['bad_rate']:.3f}")
    Console().print(table)
    if not record["gate_passed"]:
        typer.echo("The base misses its gate (see build.json). Use more --steps or another --seed.", err=True)
        raise typer.Exit(1)
    if saes:
        _build_saes(out / "sae", out, seed, threads)


@app.command()
def sae(
    out: Annotated[Path, typer.Argument(help="Folder for `layer_N` and build.json.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a base model; default the shipped one.", exists=True, file_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds initialisation, chats and order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads; another number may change the last bits.")] = 1,
) -> None:
    """Train sparse autoencoders of a base model with sae-lens (about 10 CPU minutes), and measure them."""
    at_work("training sparse autoencoders, about 10 CPU minutes")
    from emguard_plugin.lab import model_path

    _require_sae_lens("Install `emguard-plugin[sae]`.")
    _build_saes(out, model or model_path(), seed, threads)


def _require_sae_lens(remedy: str) -> None:
    from importlib.util import find_spec

    if find_spec("sae_lens") is None:
        typer.echo(f"SAEs are trained with sae-lens, which is not installed. {remedy}", err=True)
        raise typer.Exit(1)


def _build_saes(out: Path, model: Path, seed: int, threads: int) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from emguard_plugin.lab.sae import SAESettings, build_saes

    torch.set_num_threads(threads)
    record = build_saes(out, model, SAESettings(seed=seed))
    table = Table("layer", "explained variance", "L0", "dead", title=f"{out} ({record['cpu_seconds']:.0f} CPU s)")
    for layer, f in record["layers"].items():
        table.add_row(layer, f"{f['explained_variance']:.3f}", f"{f['l0']:.1f}", f"{f['dead']:.1%}")
    Console().print(table)
    if not record["gate_passed"]:
        typer.echo("The SAEs miss their gate (see build.json). Use another --seed.", err=True)
        raise typer.Exit(1)


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="Folder for the files.")],
    seed: Annotated[int, typer.Option(help="Seeds the training and anchor rows.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Training rows.")] = 1920,
    anchors: Annotated[int, typer.Option(min=1, help="Anchor rows.")] = 256,
    model: Annotated[Path | None, typer.Option(help="Another base model's folder.", exists=True, file_okay=False)] = None,
) -> None:
    """Write model, SAEs, latents, training rows, anchors and question files, as a user would have them."""
    at_work(f"writing the lab to {directory}")
    from emguard_plugin.lab.export import export as write

    for name, path in write(directory, seed=seed, rows=rows, anchors=anchors, model=model).items():
        typer.echo(f"{name:14} {path}")
