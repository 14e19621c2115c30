"""`EMGuardSFTConfig`: the blocks of the YAML as fields."""

import json
import re

import pytest
from transformers import TrainingArguments

from emguard_plugin import EMGuardSFTConfig, TReFTCallback
from emguard_plugin.config import EMRegularizerConfig
from emguard_plugin.training import trl_config
from tests.trl_runs import LOG, build, column, run, settings

JUDGES = [{"provider": "exact", "function": "a.b:c"}]


def config(folder, **over):
    return EMGuardSFTConfig(**settings(folder, **over))


@pytest.mark.parametrize("form", [dict, json.dumps])
def test_a_block_as_mapping_and_as_json(tmp_path, form):
    block = {"treft": {"coef": 2.5, "layers": [0, 2]}}
    trainer = run(tmp_path, args=EMGuardSFTConfig, callbacks=[], em_regularizer=form(block))
    assert column(trainer, f"{LOG}/coef") == [2.5] * 3
    (treft,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, TReFTCallback))
    assert treft.layers == [0, 2]
    again = EMGuardSFTConfig(**{**settings(tmp_path), "em_regularizer": trainer.args.to_dict()["em_regularizer"]})
    assert again.em_regularizer == block


def test_without_blocks_nothing_is_active(tmp_path):
    trainer = run(tmp_path, args=EMGuardSFTConfig, callbacks=[])
    assert column(trainer, f"{LOG}/penalty") == []


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"em_regularizer": {"treft": {"coeff": 1}}}, "unknown key 'coeff'. Did you mean 'coef'?"),
        ({"em_regularizer": '{"treft": {"coeff": 1}}'}, "unknown key 'coeff'. Did you mean 'coef'?"),
        ({"em_regularizer": {"trefft": {}}}, "unknown key 'trefft'. Did you mean 'treft'?"),
        ({"em_regularizer": {"coef": 5}}, "unknown key 'coef'"),
        ({"em_regularizer": {}}, "names no method"),
        ({"em_regularizer": "{}"}, "names no method"),
        ({"em_regularizer": "treft"}, "`em_regularizer: treft` is neither a mapping nor JSON"),
        ({"em_regularizer": "5"}, "`em_regularizer:` is a number; it takes a mapping"),
        ({"em_regularizer": ["treft"]}, "`em_regularizer:` is a list; it takes a mapping"),
        ({"em_regularizer": {"treft": {"coef": -1}}}, "takes a number of at least 0"),
        ({"em_eval": {"questions": "q.yaml", "judges": JUDGES, "sample": 3}}, "unknown key 'sample'. Did you mean"),
        ({"em_eval": {"questions": "q.yaml"}}, "judges"),
        ({"em_eval": "questions"}, "`em_eval: questions` is neither a mapping nor JSON"),
    ],
)
def test_a_faulty_block_is_found_when_the_config_is_made(tmp_path, over, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **over)


@pytest.mark.parametrize("key", ["em_regulariser", "em_regularizers", "treft", "em_evl"])
def test_a_misspelt_field_is_refused(tmp_path, key):
    with pytest.raises(TypeError, match=key):
        config(tmp_path, **{key: {"treft": {}}})


def test_the_block_and_a_callback_of_one_method_are_refused(tmp_path):
    with pytest.raises(ValueError, match="registered twice"):
        run(tmp_path, args=EMGuardSFTConfig, em_regularizer={"treft": {}}, callbacks=[TReFTCallback()])


def test_plain_training_arguments_work_as_for_trl(tmp_path):
    keys = ("output_dir", "max_steps", "bf16", "use_cpu", "report_to", "save_strategy", "logging_steps", "disable_tqdm")
    trainer = build(tmp_path, args=lambda **s: TrainingArguments(**{k: s[k] for k in keys}))
    trainer.train()
    assert column(trainer, f"{LOG}/coef") == [5] * 3


@pytest.mark.parametrize("block", [None, {"questions": "q.yaml", "judges": JUDGES}])
def test_the_trainer_says_that_it_does_not_measure(tmp_path, capsys, block):
    run(tmp_path, args=EMGuardSFTConfig, callbacks=[], em_eval=block)
    said = f"`emguard eval {tmp_path} --config FILE`" in capsys.readouterr().out
    assert said == (block is not None)


def test_a_block_is_validated_once_however_often_the_host_asks(tmp_path, monkeypatch):
    made = []

    class Counted(EMRegularizerConfig):
        @classmethod
        def model_validate(cls, block):
            made.append(block)
            return EMRegularizerConfig.model_validate(block)

    monkeypatch.setattr(trl_config, "EMRegularizerConfig", Counted)
    block = {"treft": {"coef": 1.25}}
    trainer = run(tmp_path, args=EMGuardSFTConfig, callbacks=[], em_regularizer=block)
    assert trainer.args.regularizer_config().treft.coef == 1.25
    assert made == [block]
    block["treft"]["coef"] = 2.5
    assert trainer.args.regularizer_config().treft.coef == 2.5, "what was changed since is read anew"
