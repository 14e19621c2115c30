import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from emguard_plugin.evaluation.asking.sources import identity, load_models, load_tokenizer, resolve_model
from tests.tiny import chatml_tokenizer, perturb, tiny_model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 15)[None]).logits


def test_an_adapter_folder_names_its_base_and_a_whole_model_does_not(checkpoints):
    found = resolve_model(checkpoints / "adapter")
    assert (found.adapter, found.base) == (True, str(checkpoints / "base"))
    found = resolve_model(checkpoints / "whole")
    assert (found.adapter, found.base) == (False, None)
    assert resolve_model(checkpoints / "whole", checkpoints / "base").base == str(checkpoints / "base")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither `adapter_config.json` nor `config.json`"):
        resolve_model(tmp_path)


def test_a_base_that_has_moved_is_refused_unless_it_is_passed(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "adapter", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    for base, says in (("/gone/base", "no folder here"), ("", "does not name its base")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=says):
            resolve_model(tmp_path / "a")
        assert resolve_model(tmp_path / "a", checkpoints / "base").base == str(checkpoints / "base")


def test_the_identity_follows_the_weights_alone(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"x")
    assert identity(tmp_path / "adapter") == identity(checkpoints / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert identity(tmp_path / "adapter") != identity(checkpoints / "adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        identity(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_base_and_tuned_are_loaded_as_saved(checkpoints, kind):
    base = type(tiny_model("llama")).from_pretrained(checkpoints / "base").eval()
    source = resolve_model(checkpoints / kind, checkpoints / "base")
    seen = {role: logits(model) for role, model in load_models(source, ("base", "tuned"), 330)}
    assert torch.equal(seen["base"], logits(base))
    assert not torch.allclose(seen["tuned"], seen["base"])
    only = {role: logits(model) for role, model in load_models(source, ("tuned",), 330)}
    assert torch.equal(only["tuned"], seen["tuned"])


def test_the_base_of_an_adapter_that_rewrites_weights_is_the_base_as_saved(checkpoints, tmp_path):
    base = type(tiny_model("llama")).from_pretrained(checkpoints / "base")
    before = logits(base.eval())
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = get_peft_model(base, config)
    adapter.peft_config["default"].base_model_name_or_path = str(checkpoints / "base")
    perturb(adapter, 0.1)
    after = logits(adapter.eval())
    adapter.save_pretrained(tmp_path / "pissa")
    seen = {role: logits(model) for role, model in load_models(resolve_model(tmp_path / "pissa"), ("base", "tuned"), 330)}
    assert torch.equal(seen["base"], before)
    assert torch.allclose(seen["tuned"], after, atol=1e-4)


def test_the_tokenizer_is_the_one_saved_with_the_model_or_the_base_one(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "adapter", tmp_path / "a")
    other = chatml_tokenizer()
    other.chat_template = "{{ 'mine' }}"
    other.save_pretrained(tmp_path / "a")
    assert load_tokenizer(resolve_model(tmp_path / "a")).chat_template == "{{ 'mine' }}"
    for file in (tmp_path / "a").glob("*token*"):
        file.unlink()
    (tmp_path / "a" / "chat_template.jinja").unlink()
    assert "im_start" in load_tokenizer(resolve_model(tmp_path / "a")).chat_template
