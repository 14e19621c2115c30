"""A discovery run: from models, SAEs and questions to the file that `em_regularizer.block_em.latents` names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emguard_plugin.chats import Book
from emguard_plugin.discovery import plan
from emguard_plugin.discovery.calibrate import calibrate, narrow_book, narrow_rows
from emguard_plugin.discovery.choose import baseline, unite
from emguard_plugin.discovery.examples import top_activating
from emguard_plugin.discovery.kept import Kept, run_id
from emguard_plugin.discovery.pair import BASE, MISALIGNED, ModelPair
from emguard_plugin.discovery.prompts import Prompt, refuse_overlap, render_prompts
from emguard_plugin.discovery.record import protocol_of, provenance_of, record_of
from emguard_plugin.discovery.report import write_report
from emguard_plugin.discovery.screen import Finding
from emguard_plugin.discovery.search import LayerSearch, Result
from emguard_plugin.discovery.settings import Rule, Settings
from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.evaluation.asking.questions import load_questions
from emguard_plugin.evaluation.asking.rendering import Chat
from emguard_plugin.files import result_folder as store
from emguard_plugin.latents import LatentSet, SubsetEncoder
from emguard_plugin.latents.latent_set import check_place
from emguard_plugin.latents.sae import layer_of, load_sae, subset

if TYPE_CHECKING:
    from sae_lens import SAE

    from emguard_plugin.chats.anchors import Anchor
    from emguard_plugin.evaluation.judges import Judge

logger = logging.getLogger(__name__)

WORK = "--work"
BASELINES: tuple[Rule, ...] = ("top_shift", "random", "shuffled_signs", "k_plus", "k_minus")


@dataclass(frozen=True)
class Request:
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
    chat: Chat = field(default_factory=Chat)

    def folder(self) -> Path:
        """Return the folder of answers and judgments."""
        return self.work or self.output.with_suffix(".discovery")


@dataclass
class Discovery:
    """A run, ready to begin.

    Attributes:
        request: What is asked for.
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

    request: Request
    settings: Settings
    judge: Judge
    pair: ModelPair
    saes: dict[int, tuple[str, SAE]]
    prompts: list[Prompt]
    selection: int
    known: list[LatentSet] = field(default_factory=list)
    united: list[LatentSet] = field(default_factory=list)
    rows: list[Anchor] | None = None
    book: Book | None = None

    def plans(self) -> dict[int, list[plan.Step]]:
        """Return the steps of each block's search, as far as they are known before stage 1."""
        evaluation = len(self.prompts) - self.selection
        found = {}
        for layer, (_, sae) in self.saes.items():
            pool = min(self.settings.pool, sae.cfg.d_sae // 2)
            found[layer] = plan.plan(self.settings, self.selection, pool, pool, evaluation)
        return found


def prepare(request: Request, settings: Settings, judge: Judge) -> Discovery:
    """Read and check everything, without asking a model.

    Raises:
        ValueError: For what cannot work: questions in both suites, an SAE of another width or of a block that the model lacks,
            two SAEs for one block, latent sets of another model.
    """
    try:
        check_place(request.output)  # hours before it is written
    except ValueError as exc:
        raise ValueError(f"`-o {request.output}`: {exc}") from exc
    questions = load_questions(request.questions)
    evaluation = load_questions(request.evaluation) if request.evaluation else []
    refuse_overlap(questions, evaluation, f"`--evaluation-questions {request.evaluation}`")
    pair = ModelPair(request.misaligned, request.base)
    pair.tokenizer = request.chat.baked(pair.tokenizer)  # everything renders by it: prompts, narrow chats, calibration
    prompts = render_prompts(pair.tokenizer, request.chat.with_system([*questions, *evaluation]))
    saes = _load(request.saes, pair)
    known, united = ([LatentSet.load(path) for path in paths] for paths in (request.exclude, request.union))
    with pair.use(BASE) as model:
        for other in (*known, *united):
            other.check_model(model)
    rows = narrow_rows(request.data, pair.tokenizer) if request.data else None
    book = narrow_book(request.data, pair.tokenizer) if request.data else None
    return Discovery(request, settings, judge, pair, saes, prompts, len(questions), known, united, rows, book)


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


def run(discovery: Discovery) -> LatentSet:
    """Search every block, unite what is found, and write the latent set, the record and the report.

    Safe to call again after an interruption: what was answered and judged is kept in the work folder.

    Raises:
        ValueError: See `LayerSearch.run` and `prepare`.
        RuntimeError: If the judge stops, or another process works in the folder.
    """
    request, settings = discovery.request, discovery.settings
    folder = store.prepare_folder(request.folder(), WORK)
    results: list[Result] = []
    with store.locked(folder, WORK):
        for layer, (source, sae) in discovery.saes.items():
            place = store.prepare_folder(folder / f"block{layer}", WORK)
            tied = store.claim(place, protocol_of(discovery, sae), keys=("protocol",), option=WORK)
            kept = Kept(place, run_id(tied["protocol"]))
            exclude = {i for known in discovery.known for e in known.encoders if e.layer == layer for i in e.ids}
            search = LayerSearch(
                discovery.pair, sae, source, layer, discovery.prompts, discovery.selection, discovery.judge, settings, kept, exclude
            )  # fmt: skip
            results.append(search.run())
        latents = _latent_set(discovery, results, [result.chosen for result in results])
        if discovery.rows is not None:
            latents.calibration = calibrate(discovery.pair, latents, discovery.rows, settings.batch_size, discovery.book)
        latents.save(request.output)
        content = _record(discovery, results, latents)
        store.write_json(folder / "discovery.json", content)
        write_report(content, folder / "report.html")
        if request.baselines:
            _write_baselines(discovery, results)
    return latents


def _write_baselines(discovery: Discovery, results: Sequence[Result]) -> None:
    for rule in BASELINES:
        sets = [baseline(rule, len(r.chosen), r.pool, r.shortlist, r.chosen, discovery.settings.seed) for r in results]
        if not any(sets):
            continue
        alone = replace(discovery, united=[], settings=replace(discovery.settings, rule=rule))
        latents = _latent_set(alone, results, sets)
        if discovery.rows is not None:
            latents.calibration = calibrate(discovery.pair, latents, discovery.rows, discovery.settings.batch_size, discovery.book)
        latents.save(discovery.request.output.with_suffix(f".{rule}.json"))


def _latent_set(discovery: Discovery, results: Sequence[Result], sets: Sequence[Sequence[Candidate]]) -> LatentSet:
    encoders, scores = [], []
    for result, chosen in zip(results, sets, strict=True):
        if not chosen:
            continue
        encoders.append(_encoder(discovery, result.layer, chosen))
        scores += _records(result, chosen)
    groups = [*(other.encoders for other in discovery.united), encoders]
    encoders, scores = unite(groups, [*(r for other in discovery.united for r in other.scores), *scores])
    with discovery.pair.use(BASE) as model:
        return LatentSet.for_model(model, encoders, scores=scores, provenance=provenance_of(discovery, results))


def _records(result: Result, chosen: Sequence[Candidate], curves: bool = False) -> list[dict[str, Any]]:
    known = {finding.candidate.id: finding for finding in result.shortlist}
    share = result.attribution
    return [
        record_of(known.get(c.id) or Finding(c), result.layer, c.sign, curves, None if share is None else float(share[c.id]))
        for c in chosen
    ]


def _encoder(discovery: Discovery, layer: int, chosen: Sequence[Candidate]) -> SubsetEncoder:
    sae = discovery.saes[layer][1]
    return subset(sae, [c.id for c in chosen], [c.sign for c in chosen], discovery.settings.mode, layer)


def _record(discovery: Discovery, results: Sequence[Result], latents: LatentSet) -> dict[str, Any]:
    blocks = []
    for result in results:
        encoder, inside = _encoder(discovery, result.layer, result.chosen), {c.id for c in result.chosen}
        asked = discovery.prompts[: discovery.selection]
        shown = top_activating(discovery.pair, encoder, asked, result, discovery.settings.batch_size)
        blocks.append(
            {
                "layer": result.layer,
                "source": result.source,
                "unexplained_variance": result.error,
                "scale": result.scale,
                "funnel": result.funnel,
                "unsteered": {role: tally.to_dict() for role, tally in result.unsteered.items()},
                "chosen": _records(result, result.chosen, curves=True),
                "others": _records(result, [f.candidate for f in result.shortlist if f.candidate.id not in inside], curves=True),
                "joint": {
                    f"{role}/{suite}": {str(alpha): tally.to_dict() for alpha, tally in curve.items()}
                    for (role, suite), curve in result.joint.items()
                },
                "examples": {str(latent): hits for latent, hits in shown.items()},
            }
        )
    return {
        "latents": discovery.request.output.name,
        "sha256": latents.digest,
        "scores": latents.scores,
        "calibration": latents.calibration,
        "provenance": latents.provenance,
        "blocks": blocks,
        "roles": [BASE, MISALIGNED],
    }
