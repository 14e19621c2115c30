"""`emguard check` says what training would: data types, named templates, layers, FSDP versions. The cases are named in the docstrings."""

import json

import pytest
import yaml

from emguard_plugin.axolotl_plugin.conflicts import find_conflicts
from emguard_plugin.check import check_config
from tests.e2e.tiny_run import tiny_yaml, treft, write_tiny

ROWS = {"path": "./rows.jsonl"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def check(tiny, tmp_path):
    def go(**over):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_yaml(tiny, **over)))
        return check_config(path)

    return go


@pytest.mark.parametrize("kind", ["alpaca", "alpaca:phi", "alpaca_chat.load_qa", "completion", "pygmalion", "context_qa.load_v2"])
def test_types_without_turns_are_a_problem(check, kind):
    """Case check-alpaca-ok."""
    report = check(datasets=[{**ROWS, "type": kind}], **treft())
    assert report.problems == [
        f"`datasets: type: {kind}` writes prompts of its own, not the chat template's turns, so `treft` (`tokens: prefix`) finds nothing to "
        "hold: training would stop after the model is loaded. Use `type: chat_template`."
    ]
    assert check(datasets=[{**ROWS, "type": kind}], em_regularizer={"kl": {}}).problems == [], "KL holds its own anchors"


@pytest.mark.parametrize("kind", ["chat_template", "chat_template.default", "messages.chat", None])
def test_types_with_turns_are_fine(check, kind):
    report = check(datasets=[{**ROWS, **({} if kind is None else {"type": kind})}], **treft())
    assert report.problems == []
    assert not [n for n in report.notes if "type" in n]


@pytest.mark.parametrize("kind", ["my_package.my_chats", {"field_instruction": "q", "field_output": "a"}, "input_output"])
def test_a_type_of_the_users_own_may_render_chats(check, kind):
    report = check(datasets=[{**ROWS, "type": kind}], **treft())
    assert report.problems == []
    assert "`datasets: type:` is one of your own: whether its rows show the chat template's turns is checked at start." in report.notes


def test_some_rows_without_turns_are_a_note(check):
    report = check(datasets=[{**ROWS, "type": "alpaca"}, {**ROWS, "type": "chat_template"}], **treft())
    assert report.problems == []
    assert any("at most 5 % of the rows" in note for note in report.notes)


@pytest.mark.parametrize("over", [{"processor_type": "AutoProcessor"}, {"skip_prepare_dataset": True}])
def test_images_are_a_problem(check, over):
    (problem,) = check(**over, **treft()).problems
    assert problem.startswith(f"`{next(iter(over))}: ")


@pytest.mark.parametrize("value", ["./text", [{"path": "./text"}], [{"path": "./text", "type": "pretrain"}]])
def test_pretraining_is_a_problem(check, value):
    (problem,) = check(pretraining_dataset=value, datasets=None, **treft()).problems
    assert problem.startswith("`pretraining_dataset` trains on plain text")


def test_named_templates_are_resolved(check):
    """Case check-named-template: the date is found, and pinning it as advised is enough where the template lets it be pinned."""
    for name in ("mistral_v7_tekken", "llama3_2_vision"):
        (problem,) = check(chat_template=name, **treft()).problems
        assert "prints today's date in the prefix" in problem
    pinned = check(chat_template="llama3_2_vision", chat_template_kwargs={"date_string": "26 Jul 2024"}, **treft())
    assert pinned.problems == []
    assert "26 Jul 2024" in " ".join(pinned.active)
    unknown = check(chat_template="lama3", **treft()).problems[0]
    assert "`chat_template: lama3` is neither a Jinja file nor a known name. Did you mean 'llama3'?" in unknown


def test_a_named_template_is_looked_at_without_the_tokenizer(check):
    report = check(base_model="my-org/my-model", chat_template="mistral_v7_tekken", **treft())
    assert "prints today's date in the prefix" in report.problems[0]
    assert check(base_model="my-org/my-model", chat_template="chatml", **treft()).problems == []


def test_jinja_of_the_yaml_is_used(check, tmp_path):
    text = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    for over in (
        {"chat_template_jinja": text, "chat_template": None},
        {"chat_template": "jinja", "chat_template_jinja": str(tmp_path / "own.jinja")},
    ):
        report = check(**over, **treft())
        assert report.problems == []
        assert any("'[user]" in line for line in report.active)
    assert "needs `chat_template_jinja`" in check(chat_template="jinja", **treft()).problems[0]


def with_config(tmp_path, tiny, **config):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (tiny / "model").iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", ["MambaLMHeadModel", "Mamba2ForCausalLM"])
def test_mamba_by_its_class(check, name):
    """Case check-mamba."""
    (problem,) = check(base_model="my-org/my-mamba", model_type=name, **treft()).problems
    assert problem == f"`model_type: {name}`: Mamba keeps no keys and values. Remove `em_regularizer`."


def test_mamba_by_its_configuration(check, tiny, tmp_path):
    model = with_config(tmp_path, tiny, model_type="mamba", num_hidden_layers=4, hidden_size=32, vocab_size=330)
    assert "keep no keys and values" in check(base_model=model, **treft()).problems[0]


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        ({"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1}, [1, 5]),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}, [1, 3]),
    ],
)
def test_hybrids_by_their_layers_and_the_advice_works(check, tiny, tmp_path, config, attention):
    model = with_config(tmp_path, tiny, hidden_size=32, vocab_size=330, **config)
    (problem,) = check(base_model=model, **treft()).problems
    assert problem.endswith(f"List those that do: `em_regularizer.treft.layers: {attention}`.")
    assert check(base_model=model, **treft(layers=attention)).problems == []


def test_layers_beyond_the_model(check):
    (problem,) = check(**treft(layers=[0, 99])).problems
    assert problem.startswith("`em_regularizer.treft.layers: 99` is out of range: the model has layers 0 to ")


FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "state_dict_type": "FULL_STATE_DICT",
}


@pytest.mark.parametrize(
    ("over", "fine"),
    [
        ({"fsdp_config": {"fsdp_version": 2, **FSDP}}, True),
        ({"fsdp_config": {"version": 2, **FSDP}}, True),
        ({"fsdp_config": FSDP, "fsdp_version": 2}, True),
        ({"fsdp_config": FSDP, "fsdp_version": "2"}, True),
        ({"fsdp_config": {"fsdp_version": 1, **FSDP}}, False),
        ({"fsdp_config": {"fsdp_version": 2, **FSDP}, "fsdp_version": 1}, False),
        ({"fsdp_config": FSDP}, False),
        ({"fsdp": ["full_shard"]}, False),
    ],
)
def test_the_fsdp_version_is_read_where_axolotl_lifts_it(check, over, fine):
    """Case fsdp2-nested."""
    refused = ["FSDP version 1 is not supported. Set `fsdp_version: 2`."]
    assert check(**over, **treft()).problems == ([] if fine else refused)
    assert find_conflicts({**over, **treft()}) == ([] if fine else refused)


def no_rotary(folder, tiny, kind):
    sizes = {
        "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
        "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
        "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    }[kind]
    return with_config(folder, tiny, model_type=kind, vocab_size=330, **sizes)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "opt"])
def test_models_without_rotary_positions_hold_no_shared_postfix(check, tiny, tmp_path, kind):
    model = no_rotary(tmp_path, tiny, kind)
    (problem,) = check(base_model=model, **treft(tokens="postfix")).problems
    assert "shared` (the default) needs rotary positions" in problem
    assert check(base_model=model, adapter="lora", **treft(tokens="postfix", postfix_reference="per_row")).problems == []
    assert check(base_model=model, **treft()).problems == []


def test_a_postfix_per_row_needs_an_adapter(check):
    block = treft(tokens="postfix", postfix_reference="per_row")
    (problem,) = check(adapter=None, **block).problems
    assert "needs a fresh LoRA adapter to switch off, and there is none" in problem
    assert check(adapter="lora", **block).problems == []


@pytest.mark.parametrize(("kind", "why"), [("gpt2", "separate k_proj and v_proj"), ("opt", "list of decoder layers"), ("llama", None)])
def test_compat_needs_projections_of_their_own(check, tiny, tmp_path, kind, why):
    over = {} if kind == "llama" else {"base_model": no_rotary(tmp_path, tiny, kind)}
    problems = check(**over, **treft(compat=True)).problems
    assert [why in p for p in problems] == ([] if why is None else [True])
