"""What a discovery run is asked for, read and checked before any model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from emguard_plugin.chats import Book
from emguard_plugin.discovery import plan
from emguard_plugin.discovery.calibrate import narrow_book, narrow_rows
from emguard_plugin.discovery.prompts import refuse_overlap
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, ModelPair
from emguard_plugin.evaluation.asking.prompts import Prompt, render_prompts
from emguard_plugin.evaluation.asking.questions import load_questions
from emguard_plugin.evaluation.asking.rendering import Rendering
from emguard_plugin.latents import LatentSet
from emguard_plugin.latents.description import check_place
from emguard_plugin.latents.sae import layer_of, load_sae

if TYPE_CHECKING:
    from sae_lens import SAE

    from emguard_plugin.chats.sources import TokenizedChat
    from emguard_plugin.evaluation.judges import Judge


@dataclass(frozen=True)
class Job:
    """What a run is asked for.

    Attributes:
        misaligned: Folder of the misaligned model: a PEFT adapter or a whole model.
        saes: `RELEASE/ID` or folders, one per block.
        questions: Suite on which latents are chosen.
        output: The `.json` to write.
        base: The model before the narrow fine-tune; default is the one the adapter names.
        evaluation: Suite that the whole set is measured on besides; must share no question with `questions`.
        data: Narrow training chats; gives the calibration of `coef: auto`.
        exclude: Latent sets whose latents are left out.
        union: Latent sets that the result is united with.
        work: Folder for answers and judgments; default lies beside the output.
        baselines: Also write the sets of the baseline rules, as `OUTPUT.RULE.json`.
        chat: How chats are rendered besides the tokenizer's own template, as the training did.
    """

    misaligned: str
    saes: tuple[str, ...]
    questions: str
    output: Path
    base: str | None = None
    evaluation: str | None = None
    data: str | None = None
    exclude: tuple[str, ...] = ()
    union: tuple[str, ...] = ()
    work: Path | None = None
    baselines: bool = False
    chat: Rendering = field(default_factory=Rendering)

    def folder(self) -> Path:
        """Return the folder of answers and judgments."""
        return self.work or self.output.with_suffix(".discovery")


@dataclass
class Discovery:
    """A run, ready to begin.

    Attributes:
        job: What is asked for.
        settings: Every number.
        judge: Decides over answers.
        saes: By block.
        prompts: Selection prompts, then evaluation prompts.
        selection: How many choose.
        known: Sets whose latents are left out.
        united: Sets that the result is united with.
        rows: The narrow training chats, where given.
        book: Whose text is whose in them.
    """

    job: Job
    settings: Settings
    judge: Judge
    pair: ModelPair
    saes: dict[int, tuple[str, SAE]]
    prompts: list[Prompt]
    selection: int
    known: list[LatentSet] = field(default_factory=list)
    united: list[LatentSet] = field(default_factory=list)
    rows: list[TokenizedChat] | None = None
    book: Book | None = None

    def plans(self) -> dict[int, list[plan.Step]]:
        """Return the steps of each block's search, as far as they are known before stage 1."""
        evaluation = len(self.prompts) - self.selection
        found = {}
        for layer, (_, sae) in self.saes.items():
            pool = min(self.settings.pool, sae.cfg.d_sae // 2)
            found[layer] = plan.plan(self.settings, self.selection, pool, pool, evaluation)
        return found


def prepare(job: Job, settings: Settings, judge: Judge) -> Discovery:
    """Read and check everything, without asking a model.

    Returns:
        All that `run` needs.

    Raises:
        ValueError: For what cannot work: questions in both suites, an SAE of another width or of a block that the model lacks,
            two SAEs for one block, latent sets of another model.
    """
    try:
        check_place(job.output)  # hours before it is written
    except ValueError as exc:
        raise ValueError(f"`-o {job.output}`: {exc}") from exc
    questions = load_questions(job.questions)
    evaluation = load_questions(job.evaluation) if job.evaluation else []
    refuse_overlap(questions, evaluation, f"`--evaluation-questions {job.evaluation}`")
    pair = ModelPair(job.misaligned, job.base)
    pair.tokenizer = job.chat.baked(pair.tokenizer)  # everything renders by it: prompts, narrow chats, calibration
    prompts = render_prompts(pair.tokenizer, job.chat.with_system([*questions, *evaluation]))
    saes = _load(job.saes, pair)
    known, united = ([LatentSet.load(path) for path in paths] for paths in (job.exclude, job.union))
    with pair.use(BASE_MODEL) as model:
        for other in (*known, *united):
            other.check_model(model)
    rows = narrow_rows(job.data, pair.tokenizer) if job.data else None
    book = narrow_book(job.data, pair.tokenizer) if job.data else None
    return Discovery(job, settings, judge, pair, saes, prompts, len(questions), known, united, rows, book)


def _load(sources: Sequence[str], pair: ModelPair) -> dict[int, tuple[str, SAE]]:
    found: dict[int, tuple[str, SAE]] = {}
    for source in sources:
        sae = load_sae(source)
        layer, width = layer_of(sae), sae.cfg.d_in
        if width != pair.width:
            raise ValueError(f"`--sae {source}` reads a width of {width}, the model's hidden size is {pair.width}: another model's.")
        if layer >= pair.depth:
            raise ValueError(f"`--sae {source}` reads block {layer}, the model has blocks 0 to {pair.depth - 1}: another model's.")
        if layer in found:
            raise ValueError(f"`--sae {found[layer][0]}` and `--sae {source}` both read block {layer}. Give one SAE per block.")
        found[layer] = (source, sae)
    return dict(sorted(found.items()))
