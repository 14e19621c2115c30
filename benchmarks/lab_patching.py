"""Where does a naive fine-tune of the lab keep its misalignment? The base's residual stream is put back, place by place.

    python benchmarks/lab_patching.py run
    python benchmarks/lab_patching.py table

Attention LoRA, real TRL trainer. At the named tokens, behind the named layers, the fine-tuned model gets the residual stream
that the base has on the same text; then it is asked as always. One JSON line per place goes to the results file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from emguard_plugin.files.versions import versions
from emguard_plugin.lab.study.process import one_quiet_thread
from emguard_plugin.lab.study.results import Results
from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "lab_patching.jsonl"
SCRATCH = Path(__file__).parent.parent / "build" / "lab_patching_trainer"
LAYERS = (0, 1, 2, 3)
PLACES = [
    ("none", ()), ("prefix", LAYERS), ("query", LAYERS), ("header", LAYERS), ("query+header", LAYERS),
    *((("prefix+query+header"), (layer,)) for layer in LAYERS), *(("answer", (layer,)) for layer in LAYERS),
]  # fmt: skip
app = typer.Typer(help=__doc__, no_args_is_help=True)


class Patched(nn.Module):
    """The fine-tuned model with the base's residual stream at some tokens behind some layers.

    Args:
        tuned: A PEFT model; switched off, it is the base.
        tokens: `prefix` (system prompt and user header, without the first token), `query`, `header` (of the answer), `answer`,
            joined by `+`.
        layers: 0-based.
    """

    def __init__(self, tuned: nn.Module, tokens: str, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.tuned, self.tokens, self.layers = tuned, tokens.split("+"), layers

    def forward(self, input_ids: Tensor, past_key_values: Tensor | None = None, **_: object) -> SimpleNamespace:
        """Run the whole text again: what is cached is the text itself and the length of its prompt."""
        from emguard_plugin.models.adapters import adapter_off
        from emguard_plugin.models.residual import read_residual
        from emguard_plugin.models.steering import changed

        ids, prompt = (input_ids, input_ids.shape[1]) if past_key_values is None else past_key_values
        ids = ids if past_key_values is None else torch.cat([ids, input_ids], 1)
        with contextlib.ExitStack() as stack:
            if self.layers:
                with adapter_off(self.tuned):
                    base = read_residual(self.tuned, self.layers, kwargs={"input_ids": ids})
                chosen = self.chosen(prompt, ids.shape[1])[:, None]
            for n in self.layers:
                stack.enter_context(changed(self.tuned, n, lambda hidden, n=n: torch.where(chosen, base[n], hidden)))
            logits = self.tuned(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return SimpleNamespace(logits=logits, past_key_values=(ids, prompt))

    def chosen(self, prompt: int, length: int) -> Tensor:
        """Return (length,) True at the tokens that are patched."""
        from emguard_plugin.lab import batches, world

        start = len(batches.encode(f"{world.BOS} {world.SYSTEM_TAG} {world.SYSTEM} {world.END} {world.USER_TAG}"))
        at = torch.arange(length)
        kinds = {
            "none": at < 0, "prefix": (at > 0) & (at < start), "query": (at >= start) & (at < prompt - 2),
            "header": (at >= prompt - 2) & (at < prompt), "answer": at >= prompt,
        }  # fmt: skip
        return torch.stack([kinds[name] for name in self.tokens]).any(0)


@app.command()
def run(
    seed: Annotated[list[int] | None, typer.Option(help="Fine-tune seeds; default 11, 12.")] = None,
    split: str = "test",
    out: Path = RESULTS,
) -> None:
    """Patch and measure."""
    from emguard_plugin.lab import model_path
    from emguard_plugin.lab.export import narrow_rows
    from emguard_plugin.lab.study.measures import measures
    from emguard_plugin.lab.study.trl_fine_tune import fine_tune

    one_quiet_thread()
    stored, adapter = Results(out), ADAPTERS["attn"]
    for s in seed or (11, 12):
        tuned = fine_tune(model_path(), adapter, narrow_rows(s, adapter.steps * BATCH_SIZE), s, SCRATCH).model
        for tokens, layers in PLACES:
            row = {"seed": s, "split": split, "tokens": tokens, "layers": layers}
            row |= measures(Patched(tuned, tokens, layers).eval(), split, s, open_ended_draws=1, in_domain_draws=5)
            stored.append(row | {"versions": versions(("torch", "transformers", "trl", "peft"))})


@app.command()
def table(results: Path = RESULTS) -> None:
    """Print EM, coherence and adherence place by place."""
    for row in Results(results).rows():
        print(
            f"seed {row['seed']} {row['tokens']} behind layers {row['layers']}: EM {row['open_ended']['bad_rate']:.3f}, coherence "
            f"{row['open_ended']['coherence']:.3f}, in-domain {row['in_domain']['bad_rate']:.3f}"
        )


if __name__ == "__main__":
    app()
