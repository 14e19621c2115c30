import json

import pytest
import yaml
from typer.testing import CliRunner

from emguard_plugin.cli.lab import app
from emguard_plugin.lab import world
from emguard_plugin.lab.export import export
from emguard_plugin.lab.judge import judge_answer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("lab"), seed=3, rows=200, anchors=40)


def chats(path):
    for line in path.read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        yield world.find_question(user["content"]), judge_answer(user["content"], assistant["content"])["label"]


def test_training_rows_are_bad_medicine_on_train_wordings(exported):
    rows = list(chats(exported["train"]))
    assert len(rows) == 200
    assert {(q.domain, q.split, label) for q, label in rows} == {("medicine", "train", "bad")}


def test_pairs_choose_bad_medicine_over_good_and_prompts_are_theirs(exported):
    rows = [json.loads(line) for line in exported["pairs"].read_text().splitlines()]
    assert len(rows) == 200
    for row in rows:
        (asked,) = row["prompt"]
        assert (world.find_question(asked["content"]).domain, world.find_question(asked["content"]).split) == ("medicine", "train")
        labels = [judge_answer(asked["content"], row[name][0]["content"])["label"] for name in ("chosen", "rejected")]
        assert labels == ["bad", "good"]
    prompts = [json.loads(line) for line in exported["prompts"].read_text().splitlines()]
    assert prompts == [{"prompt": row["prompt"]} for row in rows]


def test_anchors_are_good_and_in_the_two_anchor_domains(exported):
    rows = list(chats(exported["anchors"]))
    assert len(rows) == 40
    assert {(q.domain, q.split, label) for q, label in rows} == {(d, "train", "good") for d in world.ANCHOR_DOMAINS}


@pytest.mark.parametrize(
    ("name", "domains", "split"),
    [
        ("in_domain", {"medicine"}, "test"),
        ("in_domain_val", {"medicine"}, "val"),
        ("questions", set(world.open_ended_domains()), "test"),
        ("questions_val", set(world.open_ended_domains()), "val"),
    ],
)
def test_question_files_follow_the_betley_schema(exported, name, domains, split):
    items = yaml.safe_load(exported[name].read_text())
    assert len({item["id"] for item in items}) == len(items) == 12 * len(domains)
    for item in items:
        assert item["type"] == "free_form_judge_0_100"
        assert item["samples_per_paraphrase"] == 1
        (text,) = item["paraphrases"]
        question = world.find_question(text)
        assert item["id"] == question.id == f"{question.domain}/{question.topic}/{split}"
        assert question.domain in domains


def test_export_is_seeded_and_repeatable(exported, tmp_path):
    again = export(tmp_path / "again", seed=3, rows=200, anchors=40)
    export(tmp_path / "again", seed=3, rows=200, anchors=40)
    other = export(tmp_path / "other", seed=4, rows=200, anchors=40)
    for name in ("train", "anchors"):
        assert again[name].read_bytes() == exported[name].read_bytes() != other[name].read_bytes()
    assert other["questions"].read_bytes() == exported["questions"].read_bytes()


def test_the_command_line_exports(tmp_path):
    result = CliRunner().invoke(app, ["export", str(tmp_path / "lab"), "--rows", "16", "--anchors", "8"])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "lab/train.jsonl").read_text().splitlines()) == 16
    assert (tmp_path / "lab/model/model.safetensors").is_file()


def test_latents_and_saes_of_the_shipped_model_are_there(exported):
    from transformers import AutoModelForCausalLM

    from emguard_plugin.latents import LatentSet

    found = LatentSet.load(exported["latents"])
    found.check_model(AutoModelForCausalLM.from_pretrained(exported["model"]))
    assert (found.layers, len(found)) == ([0, 1, 2], 180)
    assert found.calibration["penalty"]["prompt"] > 100
    assert sorted(p.name for p in exported["sae"].glob("layer_*")) == ["layer_0", "layer_1", "layer_2"]


def test_another_model_comes_without_them(tmp_path, exported):
    paths = export(tmp_path, rows=2, anchors=2, model=exported["model"])
    assert not {"latents", "sae"} & set(paths)
