"""What is asked for is read as meant, or refused (cases em-evaluation, boolean-number, judge-after-training)."""

import dataclasses
import re
import sys

import pytest
import yaml
from pydantic import Field, ValidationError

from emguard_plugin.axolotl_plugin.asked import look_at_settings
from emguard_plugin.config import Block, EMEvalConfig, EMRegularizerConfig, misspelt_blocks
from emguard_plugin.config.block import _flat
from emguard_plugin.config.names import misplaced_blocks, suggest
from emguard_plugin.evaluation.ready import get_ready, read_eval_file

JUDGE = {"function": "emguard_plugin.lab.judge:judge_answer"}
EVAL = {"questions": "open_ended", "judges": [JUDGE]}


# Names


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *(
            (k, "em_eval")
            for k in [
                "em_evaluation",
                "em_evaluator",
                "eval_em",
                "em_judge",
                "em_gate",
                "em_metrics",
                "EM_EVAL",
                "emEval",
                "em-eval",
                "evalEM",
                "em.eval",
                "judges",
                "questions",
            ]
        ),
        *(
            (k, "em_regularizer")
            for k in [
                "em_treft",
                "em_penalty",
                "emRegularizer",
                "EM_REGULARIZER",
                "treft",
                "block_em",
                "kl",
                "emguard_config",
                "em_regularisation",
            ]
        ),
        ("em_eval ", "em_eval"),
        ("em_r\u0435gularizer", "em_regularizer"),  # a Cyrillic letter
    ],
)
def test_what_resembles_a_block_is_named(key, meant):
    assert misspelt_blocks(["seed", key]) == {key: meant}


def test_no_key_of_trl_resembles_a_block():
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    names = {f.name for c in (SFTConfig, ScriptArguments, ModelConfig, DatasetMixtureConfig) for f in dataclasses.fields(c)}
    assert len(names) > 150
    assert misspelt_blocks(names) == {}


def test_blocks_in_the_wrong_place_are_found_unless_they_are_an_anchor():
    assert misplaced_blocks({"trainer": {"em_regularizer": {"treft": {}}}}) == ["trainer.em_regularizer"]
    assert misplaced_blocks({"datasets": [{"em_eval": EVAL}]}) == ["datasets[0].em_eval"]
    block = {"treft": {}}
    assert misplaced_blocks({"x-shared": {"em_regularizer": block}, "em_regularizer": block}) == []
    assert misplaced_blocks(yaml.safe_load("x: &a {em_regularizer: {treft: {}}}\n<<: *a\n")) == []


@pytest.mark.parametrize("word", ["lambda", "alpha", "weight", "strength", "Coef", "COEF", "coefficient", "lambda_treft"])
def test_usual_names_of_the_coefficient_get_a_suggestion(word):
    assert suggest(word, ["coef", "tokens", "layers"]) == " Did you mean 'coef'?"


def test_a_key_one_level_too_high_is_told_where_it_belongs():
    with pytest.raises(ValidationError, match="It belongs into `treft:`"):
        EMRegularizerConfig.model_validate({"coef": 5})
    with pytest.raises(ValidationError, match="move it to the top level"):
        EMRegularizerConfig.model_validate({"treft": {}, "em_eval": EVAL})


# Switches, numbers, texts


def blocks():
    """Every block that a YAML can hold."""
    found, left = [], [EMRegularizerConfig, EMEvalConfig]
    while left:
        model = left.pop()
        found.append(model)
        inside = [kind for info in model.model_fields.values() for kind in _flat(info.annotation)]
        left += [kind for kind in inside if isinstance(kind, type) and issubclass(kind, Block) and kind not in (*found, *left)]
    return found


def test_no_block_is_forgotten():
    assert {"TReFTConfig", "ExactJudgeConfig", "ReplayColumns", "VLLMSamplerConfig"} <= {model.__name__ for model in blocks()}
    assert all(field.description for model in blocks() for field in model.model_fields.values())


FIELDS = [(model, name) for model in blocks() for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_switch_is_no_number_and_no_text_in_any_field(model, name):
    """For every field there is, so for every one that will be added."""
    info = model.model_fields[name]
    switch = info.annotation is bool
    for value in (True, False, [True]) if not switch else ("yes", 1, 0, "true", [True]):
        with pytest.raises((ValidationError, ValueError)) as error:
            model.model_validate({name: value})
        assert any(name in (*map(str, e["loc"]), *re.findall(r"\w+", e["msg"])) for e in error.value.errors()), error.value


@pytest.mark.parametrize("text", ["1e1", "1E+1", "1.0e1", "0.1e2", "+1e1"])
def test_exponents_that_yaml_leaves_texts_are_numbers(text):
    assert isinstance(yaml.safe_load(text), str)
    assert EMRegularizerConfig.model_validate({"treft": {"coef": yaml.safe_load(text)}}).treft.coef == 10.0


@pytest.mark.parametrize("value", ["5", "5.0", "1_000", "5 %", "", " ", "five", "1e400", float("nan"), float("inf"), 1e30, True, None])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValidationError):
        EMRegularizerConfig.model_validate({"treft": {"coef": value}})


def test_python_has_the_same_rules():
    from emguard_plugin.regularizers.kl.callback import KLCallback
    from emguard_plugin.regularizers.treft.callback import TReFTCallback

    for call in (
        lambda: TReFTCallback(coef=True),
        lambda: TReFTCallback(layers=[True]),
        lambda: TReFTCallback(layers=3),
        lambda: TReFTCallback(compat="yes"),
        lambda: TReFTCallback(extra_prefixes="one text"),
        lambda: KLCallback(coef=False),
        lambda: KLCallback(anchors=True),
        lambda: KLCallback(ratio=True),
    ):
        with pytest.raises(ValueError, match=r"coef|layers|compat|extra_prefixes|anchors|ratio"):
            call()


def test_a_new_block_is_under_the_rules():
    class New(Block):
        share: float = 0.5
        names: list[str] = Field(default_factory=list)
        deep: bool = False

    for wrong in (
        {"share": True},
        {"names": [True]},
        {"deep": 1},
        {"share": "0.5"},
        {"names": "x"},
        {"shear": 1},
        {"names": ["sk-" + "a1B2" * 6]},
    ):
        with pytest.raises(Exception, match=r"share|names|deep"):
            New.model_validate(wrong)


# Before training


def in_eval(**over):
    return EMEvalConfig.model_validate({**EVAL, **over})


def test_a_dead_server_is_a_warning_and_what_no_server_can_have_an_error():
    judge = {"provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    (warning,) = get_ready(in_eval(judges=[judge])).warnings
    assert warning.startswith("em_eval: http://127.0.0.1:9/v1 does not answer now (")
    with pytest.raises(ValidationError, match=r"Port out of range"):
        in_eval(judges=[{**judge, "base_url": "http://127.0.0.1:99999/v1"}])


def test_the_folder_of_results_is_looked_at_and_not_made(tmp_path):
    get_ready(in_eval(), tmp_path / "deep" / "em_eval")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        get_ready(in_eval(output_dir=str(tmp_path / "file" / "out")))


def test_a_judge_beside_the_yaml_is_found_by_every_entry_point(tmp_path, monkeypatch):
    """Case judge-after-training: the same function for the file, the hook and the command, from any folder."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a_judge_beside.py").write_text("def f(question, answer):\n    return {'aligned': 1, 'coherent': 1}\n")
    file = tmp_path / "there" / "run.yaml"
    file.write_text(yaml.safe_dump({"em_eval": {**EVAL, "judges": [{"function": "a_judge_beside:f"}]}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    get_ready(read_eval_file(file))
    assert sys.path[0] != str(tmp_path / "there"), "it shadows nothing"


def test_the_hook_stores_where_the_judge_lies(tmp_path, monkeypatch):
    from emguard_plugin.evaluation import post_train

    monkeypatch.setattr(post_train.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 2})())
    (tmp_path / "beside").mkdir()
    post_train.measure_saved_model(in_eval(), tmp_path / "out", import_from=[str(tmp_path / "beside")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert read_eval_file(tmp_path / "out" / "em_eval" / "config.json") == in_eval()
    assert str(tmp_path / "beside") in sys.path


def test_settings_are_looked_at_with_their_file(tmp_path):
    """A key that stands twice is lost in what Axolotl hands over."""
    file = tmp_path / "run.yaml"
    file.write_text("em_regularizer:\n  treft: {coef: 5}\n  treft: {coef: 0}\n")
    with pytest.raises(ValueError, match=r"line 3: `treft:` stands twice, first in line 2"):
        look_at_settings({**yaml.safe_load(file.read_text()), "axolotl_config_path": str(file)})


# Trainers that do not read the blocks


def test_a_config_with_a_block_is_refused_by_another_trainer(tmp_path):
    from transformers import Trainer
    from trl import SFTTrainer

    from emguard_plugin import EMGuardSFTConfig, EMGuardSFTTrainer
    from tests.tiny import chat_rows, chatml_tokenizer, lora, tiny_model

    tokenizer = chatml_tokenizer()
    args = EMGuardSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, em_regularizer={"treft": {}})
    import datasets

    rows = datasets.Dataset.from_list(chat_rows(4))
    model = lora(tiny_model("llama", vocab=len(tokenizer)))
    for make in (
        lambda: SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer),
        lambda: Trainer(model=model, args=args, train_dataset=rows),
    ):
        with pytest.raises(
            ValueError, match=r"does not read `em_regularizer` of its EMGuardSFTConfig\. Use `emguard_plugin\.EMGuardSFTTrainer`"
        ):
            make()
    EMGuardSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    plain = EMGuardSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    SFTTrainer(model=model, args=plain, train_dataset=rows, processing_class=tokenizer)


def test_a_guarded_trainer_without_a_guard_says_so(tmp_path, capsys):
    import datasets

    from emguard_plugin import EMGuardSFTConfig, EMGuardSFTTrainer
    from tests.tiny import chat_rows, chatml_tokenizer, tiny_model

    tokenizer = chatml_tokenizer()
    args = EMGuardSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    rows = datasets.Dataset.from_list(chat_rows(4))
    EMGuardSFTTrainer(model=tiny_model("llama", vocab=len(tokenizer)), args=args, train_dataset=rows, processing_class=tokenizer).train()
    said = "There is no `em_regularizer:` block and no regularizer among the callbacks: this run is NOT regularized."
    assert said in capsys.readouterr().out
