"""Discovery on the lab: real misalignment, the SAE that ships, held-out questions."""

import pytest

from emguard_plugin.discovery.job import Job, prepare
from emguard_plugin.discovery.kept import SearchFiles
from emguard_plugin.discovery.run import run
from emguard_plugin.discovery.settings import Settings
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL
from emguard_plugin.evaluation.judges.named import read_judge
from emguard_plugin.lab import model_path
from emguard_plugin.latents import LatentSet

pytestmark = pytest.mark.slow

SAE = model_path().parent / "sae" / "layer_1"
# The lab keeps the persona in the system prompt's tokens; pushing everywhere breaks its answers, whatever the direction.
SETTINGS = Settings(
    positions="prefix", steer_at="prefix", pool=384, shortlist=10, size=6, induce=0.8, repair=0.6, strengths=(0.4, 0.7, 1.0),
    max_new_tokens=26, batch_size=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def found(lab, tmp_path_factory):
    output = tmp_path_factory.mktemp("lab_latents") / "latents.json"
    request = Job(
        str(lab / "adapter"), (str(SAE),), str(lab / "questions_val.yaml"), output, evaluation=str(lab / "questions.yaml"),
        data=str(lab / "train.jsonl"),
    )  # fmt: skip
    run(prepare(request, SETTINGS, read_judge("emguard_plugin.lab:judge_answer")))
    return output


def joint(found, role):
    import json

    record = json.loads((found.with_suffix(".discovery") / "discovery.json").read_text())
    return {float(alpha): tally for alpha, tally in record["blocks"][0]["joint"][f"{role}/evaluation"].items()}


def test_the_set_induces_and_repairs_on_held_out_questions(found):
    safe = {role: [t for t in joint(found, role).values() if t["incoherent"] <= 0.1 * t["n"]] for role in (BASE_MODEL, MISALIGNED_MODEL)}
    assert max(t["rate"] for t in safe[BASE_MODEL]) >= 0.2
    assert min(t["rate"] for t in safe[MISALIGNED_MODEL]) <= 0.5 * max(t["rate"] for t in safe[MISALIGNED_MODEL])


def test_each_latent_does_so_alone(found):
    for score in LatentSet.load(found).scores:
        assert score["induce_gain"] > 0
        assert score["repair_gain"] > 0


def test_the_yardstick_of_coef_auto(found):
    calibration = LatentSet.load(found).calibration
    assert calibration["task_loss_gap"] > 0.1
    assert calibration["penalty"]["all"] > 0


@pytest.mark.parametrize("layer", [0, 2])
def test_the_sae_of_another_layer_is_refused(lab, layer, tmp_path):
    from emguard_plugin.discovery.shift import check_reconstruction
    from emguard_plugin.evaluation.asking.pair import ModelPair
    from emguard_plugin.evaluation.asking.prompts import render_prompts
    from emguard_plugin.evaluation.asking.questions import load_questions
    from emguard_plugin.latents.sae import load_sae

    pair = ModelPair(lab / "adapter")
    prompts = render_prompts(pair.tokenizer, load_questions(lab / "questions_val.yaml"))
    rows = [(p.ids, *p.span("prompt")) for p in prompts]
    with pair.use(BASE_MODEL) as model:
        assert check_reconstruction(load_sae(str(SAE)), model, 1, rows, 64) < 0.1
        with pytest.raises(ValueError, match="is it an SAE of this very model and layer"):
            check_reconstruction(load_sae(str(SAE)), model, layer, rows, 64)


def test_attribution_finds_a_set_that_repairs_with_a_twentieth_of_the_answers(lab, found, tmp_path):
    settings = Settings(
        rule="attribution", positions="prefix", steer_at="prefix", size=20, strengths=(0.7,), max_new_tokens=26, batch_size=256
    )
    saes = tuple(str(SAE.parent / f"layer_{layer}") for layer in (1, 2))
    request = Job(
        str(lab / "adapter"), saes, str(lab / "questions_val.yaml"), tmp_path / "k.json", evaluation=str(lab / "questions.yaml"),
        data=str(lab / "train.jsonl"),
    )  # fmt: skip
    latents = run(prepare(request, settings, read_judge("emguard_plugin.lab:judge_answer")))
    assert [len(e.ids) for e in latents.encoders] == [20, 20]
    # What the fine-tune really moves: the steered set's latents hardly move at all.
    assert latents.calibration["penalty"]["prefix"] > 100 * LatentSet.load(found).calibration["penalty"]["prefix"]
    assert joint(tmp_path / "k.json", MISALIGNED_MODEL)[0.0]["rate"] >= 0.8
    assert joint(tmp_path / "k.json", MISALIGNED_MODEL)[0.7]["rate"] <= 0.2
    assert 20 * latents.provenance["spent"]["answers"] < LatentSet.load(found).provenance["spent"]["answers"]


def test_halving_finds_the_set_of_the_published_schedule_with_a_fifth_of_the_tokens(lab, found, tmp_path):
    """A pool of every 12th candidate and the set itself, the paper's 15 strengths; benchmarks/discovery.py has the larger run."""
    import dataclasses

    from emguard_plugin.discovery.search import LayerSearch
    from emguard_plugin.discovery.settings import PAPER_STRENGTHS
    from emguard_plugin.evaluation.asking.pair import ModelPair
    from emguard_plugin.evaluation.asking.prompts import render_prompts
    from emguard_plugin.evaluation.asking.questions import load_questions
    from emguard_plugin.latents.sae import load_sae

    pair, sae, known = ModelPair(lab / "adapter"), load_sae(str(SAE)), set(LatentSet.load(found).encoders[0].ids)
    prompts = render_prompts(pair.tokenizer, load_questions(lab / "questions_val.yaml"))[:10]
    judge, sets, spent = read_judge("emguard_plugin.lab:judge_answer"), {}, {}
    for schedule in ("full", "halving"):
        settings = dataclasses.replace(SETTINGS, strengths=PAPER_STRENGTHS, schedule=schedule, shortlist=6)
        # One folder: what both ask is drawn once, and counted for each.
        search = LayerSearch(pair, sae, "lab", 1, prompts, len(prompts), judge, settings, SearchFiles(tmp_path, "lab"))
        with search.bench as bench:
            search.screen.ask_unsteered()
            pool = [c for i, c in enumerate(search.stage_one()) if not i % 12 or c.id in known]
            sets[schedule] = {f.candidate for f in search.screen.calibrate(search.screen.shortlist(pool))}
            spent[schedule] = bench.spent()["tokens"]
    assert sets["full"]
    assert sets["halving"] == sets["full"]
    assert spent["full"] > 5 * spent["halving"]
