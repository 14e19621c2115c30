"""A discovery run: from models, SAEs and questions to the file that `em_regularizer.block_em.latents` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from emguard_plugin.discovery.calibrate import calibrate
from emguard_plugin.discovery.choose import baseline, unite
from emguard_plugin.discovery.examples import top_activating
from emguard_plugin.discovery.job import Discovery
from emguard_plugin.discovery.kept import SearchFiles, run_id
from emguard_plugin.discovery.record import protocol_of, provenance_of, record_of
from emguard_plugin.discovery.report import write_report
from emguard_plugin.discovery.screen import Finding
from emguard_plugin.discovery.search import LayerSearch, Result
from emguard_plugin.discovery.settings import Rule
from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL
from emguard_plugin.files import result_folder as store
from emguard_plugin.latents import LatentSet, SubsetEncoder
from emguard_plugin.latents.sae import subset

WORK = "--work"
BASELINES: tuple[Rule, ...] = ("top_shift", "random", "shuffled_signs", "k_plus", "k_minus")


def run(discovery: Discovery) -> LatentSet:
    """Search every block, unite what is found, and write the latent set, the record and the report.

    Safe to call again after an interruption: what was answered and judged is kept in the work folder.

    Returns:
        The latent set that was written.

    Raises:
        ValueError: See `LayerSearch.run` and `prepare`.
        RuntimeError: If the judge stops, or another process works in the folder.
    """
    job, settings = discovery.job, discovery.settings
    folder = store.prepare_folder(job.folder(), WORK)
    results: list[Result] = []
    with store.locked(folder, WORK):
        for layer, (source, sae) in discovery.saes.items():
            place = store.prepare_folder(folder / f"block{layer}", WORK)
            tied = store.claim(place, protocol_of(discovery, sae), entries=("protocol",), option=WORK)
            kept = SearchFiles(place, run_id(tied["protocol"]))
            exclude = {i for known in discovery.known for e in known.encoders if e.layer == layer for i in e.ids}
            search = LayerSearch(
                discovery.pair, sae, source, layer, discovery.prompts, discovery.selection, discovery.judge, settings, kept, exclude
            )  # fmt: skip
            results.append(search.run())
        latents = _latent_set(discovery, results, [result.chosen for result in results])
        if discovery.rows is not None:
            latents.calibration = calibrate(discovery.pair, latents, discovery.rows, settings.batch_size, discovery.book)
        latents.save(job.output)
        content = _record(discovery, results, latents)
        store.write_json(folder / "discovery.json", content)
        write_report(content, folder / "report.html")
        if job.baselines:
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
        latents.save(discovery.job.output.with_suffix(f".{rule}.json"))


def _latent_set(discovery: Discovery, results: Sequence[Result], sets: Sequence[Sequence[Candidate]]) -> LatentSet:
    encoders, scores = [], []
    for result, chosen in zip(results, sets, strict=True):
        if not chosen:
            continue
        encoders.append(_encoder(discovery, result.layer, chosen))
        scores += _records(result, chosen)
    groups = [*(other.encoders for other in discovery.united), encoders]
    encoders, scores = unite(groups, [*(r for other in discovery.united for r in other.scores), *scores])
    with discovery.pair.use(BASE_MODEL) as model:
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
        "latents": discovery.job.output.name,
        "sha256": latents.digest,
        "scores": latents.scores,
        "calibration": latents.calibration,
        "provenance": latents.provenance,
        "blocks": blocks,
        "roles": [BASE_MODEL, MISALIGNED_MODEL],
    }
