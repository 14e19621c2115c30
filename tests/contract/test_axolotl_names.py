"""Axolotl's own names and ours: none of its keys resembles a block, and what resembles one stops `axolotl train`."""

import pytest

from emguard_plugin.config import misspelt_blocks
from tests.e2e.axolotl_runs import Failed, validate
from tests.e2e.tiny_run import tiny_yaml, treft

FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "state_dict_type": "FULL_STATE_DICT",
}


def schema_names():
    from axolotl.utils.schemas.config import AxolotlConfigWCapabilities, AxolotlInputConfig

    return sorted({*AxolotlInputConfig.model_fields, *AxolotlConfigWCapabilities.model_fields})


def test_no_key_of_axolotl_resembles_a_block(axolotl, tmp_path):
    names = axolotl.call(schema_names, tmp_path)
    assert len(names) > 300
    assert misspelt_blocks(names) == {}


@pytest.mark.parametrize("key", ["em_evaluation", "em_judge", "emRegularizer", "treft"])
def test_axolotl_train_stops_at_what_resembles_a_block(axolotl, tiny, tmp_path, key):
    """Case em-evaluation."""
    with pytest.raises(Failed, match=f"unknown key `{key}:`. Did you mean"):
        axolotl.call(validate, tmp_path, tiny_yaml(tiny, **{key: {"coef": 5}}))


@pytest.mark.parametrize("block", [{"treft": {"coef": False}}, {"treft": {"coef": True}}, {"treft": {"layers": [True]}}])
def test_axolotl_train_stops_at_a_switch_in_place_of_a_number(axolotl, tiny, tmp_path, block):
    """Case boolean-number."""
    with pytest.raises(Failed, match="is a switch"):
        axolotl.call(validate, tmp_path, tiny_yaml(tiny, em_regularizer=block))


@pytest.mark.parametrize("key", ["fsdp_version", "version"])
def test_axolotl_train_accepts_nested_fsdp_2(axolotl, tiny, tmp_path, key):
    """Case fsdp2-nested, through Axolotl's own validation."""
    assert axolotl.call(validate, tmp_path, tiny_yaml(tiny, fsdp_config={key: 2, **FSDP}, **treft()))["fsdp_version"] == 2


@pytest.mark.parametrize("place", ["openai_api_key", "access_token", "model", "api_key_env", "name"])
def test_axolotl_train_never_prints_a_key(axolotl, tiny, tmp_path, place):
    """Case key-in-unknown-field: neither our errors, nor pydantic's, nor Axolotl's print of the configuration."""
    key = "hf_" + "aB3dE5fG7h" * 3
    judge = {"provider": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", place: key}
    with pytest.raises(Failed) as failed:
        axolotl.call(validate, tmp_path, tiny_yaml(tiny, em_eval={"questions": "open_ended", "judges": [judge]}))
    assert "leaked" in str(failed.value)
    assert key[3:13] not in str(failed.value) + "".join(f.read_text(errors="replace") for f in tmp_path.glob("log*"))


def folders_of_modules():
    from axolotl.utils.dict import DictDefault

    from emguard_plugin.axolotl_plugin.plugin import _folder

    return [str(_folder(DictDefault(cfg))) for cfg in ({}, {"axolotl_config_path": "runs/a.yaml"})]


def test_modules_are_looked_for_beside_the_yaml_and_in_the_current_folder_alone(axolotl, tmp_path):
    assert axolotl.call(folders_of_modules, tmp_path) == [str(tmp_path), str(tmp_path / "runs")]
