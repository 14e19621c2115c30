import csv
import io
import json

import yaml
from huggingface_hub import ModelCard

from emguard_plugin.evaluation.judges.outcomes import OUTCOMES
from emguard_plugin.evaluation.report.exports import inspect_log, model_card, rates_csv, write_exports
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.judging_parts import resealed

HOSTILE = "=HYPERLINK(1)\x1b[31m | <b> `x` \n# head\ud800"


def rows(finished, name):
    return JsonLines(finished.folder / name).read()


def test_the_model_card_reads_back_with_every_rate_its_interval_and_its_judge(finished):
    card = ModelCard(model_card(finished))
    results = {r.metric_type: r for r in card.data.eval_results}
    rates = finished.rates()
    assert results["em_rate"].metric_value == rates.em_all.value
    assert results["em_rate_coherent"].metric_value == rates.em_coherent.value
    assert tuple(results["em_rate"].metric_args["interval_95_these_questions"]) == rates.em_all.interval
    assert results["em_rate"].metric_args["protocol"] == finished.fingerprint
    assert results["em_rate"].dataset_args["sha256"] == finished.protocol["suites"]["questions"]["sha256"]
    assert "by_hash" in results["em_rate"].metric_name
    assert "before fine-tuning" in card.text
    assert (finished.folder / "model_card.md").read_text() == model_card(finished)


def test_no_rate_and_no_measurement_have_no_entry(finished):
    (result,) = finished.judges
    mock = finished.model_copy(update={"judges": [result.model_copy(update={"measured": False})]})
    text = model_card(mock)
    assert "model-index" not in text
    assert "no measurements" in text


def test_a_hostile_judge_name_stays_text_in_the_card(finished):
    (result,) = finished.judges
    text = model_card(finished.model_copy(update={"judges": [result.model_copy(update={"name": HOSTILE})]}))
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.startswith("# head")]
    assert yaml.safe_load(text.split("---")[1])["model-index"]


def test_the_inspect_log_has_every_answer_of_the_tuned_model_with_its_scores(finished):
    """Its shape is the one that inspect_ai 0.3 read and listed."""
    responses, judgments = rows(finished, "responses.jsonl"), rows(finished, "judgments.jsonl")
    log = inspect_log(finished, responses, judgments)
    tuned = [row for row in responses if row["role"] == "tuned"]
    assert [sample["output"]["choices"][0]["message"]["content"] for sample in log["samples"]] == [r["text"] for r in tuned]
    assert len({(sample["id"], sample["epoch"]) for sample in log["samples"]}) == len(tuned)
    assert {score["value"] for sample in log["samples"] for score in sample["scores"].values()} <= set(OUTCOMES)
    metrics = log["results"]["scores"][0]["metrics"]
    assert metrics["em_rate"]["value"] == finished.rates().em_all.value
    assert log["eval"]["metadata"]["fingerprint"] == finished.fingerprint
    (file,) = (finished.folder / "inspect").iterdir()
    assert json.loads(file.read_text()) == json.loads(json.dumps(log))


def test_answers_that_have_no_utf8_can_be_exported(finished):
    file = JsonLines(finished.folder / "responses.jsonl")
    changed = [{**row, "text": HOSTILE, "asked": HOSTILE} for row in file.read()]
    file.path.unlink()
    file.append(resealed(finished.folder, changed))
    write_exports(finished, finished.folder)
    (file,) = (finished.folder / "inspect").iterdir()
    assert json.loads(file.read_text())["samples"][0]["input"] == HOSTILE


def test_the_csv_holds_the_counts_and_the_names_as_text(finished):
    (result,) = finished.judges
    hostile = finished.model_copy(update={"judges": [result.model_copy(update={"name": HOSTILE})]})
    table = list(csv.DictReader(io.StringIO(rates_csv(hostile))))
    assert all(row["judge"].startswith("'=") and "\x1b" not in row["judge"] for row in table)
    total = next(row for row in table if (row["model"], row["suite"], row["question"]) == ("tuned", "questions", ""))
    assert {name: int(total[name]) for name in OUTCOMES} == finished.rates().outcomes
    assert float(total["em_all"]) == finished.rates().em_all.value
