import re

import pytest
from pydantic import ValidationError

from emguard_plugin.config import (
    METHODS,
    EMEvalConfig,
    EMRegularizerConfig,
    TReFTConfig,
    misspelt_blocks,
    read_block,
)
from emguard_plugin.regularizers import build_regularizers
from emguard_plugin.regularizers.kl.callback import KLCallback
from emguard_plugin.regularizers.treft.callback import TReFTCallback

JUDGE = {"provider": "exact", "function": "a.b:c"}


def test_every_method_of_the_block_can_be_built():
    assert set(METHODS) == set(EMRegularizerConfig.model_fields)
    (callback,) = build_regularizers(EMRegularizerConfig.model_validate({"treft": {"coef": 2, "layers": [1]}}))
    assert isinstance(callback, TReFTCallback)
    assert (callback.coef, callback.layers, callback.tokens) == (2.0, [1], "prefix")


def test_both_methods_of_the_block_are_built():
    block = {"treft": {"coef": 2}, "kl": {"target": 0.02, "anchors": "train", "cache": "./x", "direction": "model||base"}}
    treft, kl = build_regularizers(EMRegularizerConfig.model_validate(block))
    assert isinstance(treft, TReFTCallback)
    assert isinstance(kl, KLCallback)
    assert (kl.coef, kl.target, kl.anchors, kl.cache, kl.direction) == (0.7, 0.02, "train", "./x", "model||base")


@pytest.mark.parametrize("block", [{"kl": {}}, {"kl": {"target": 0.1, "cache": "./x"}, "treft": {}}])
def test_a_dump_of_kl_validates_again(block):
    block = EMRegularizerConfig.model_validate(block)
    assert EMRegularizerConfig.model_validate(block.model_dump(exclude_none=True)) == block


@pytest.mark.parametrize("kwargs", [{}, {"exclude_none": True}, {"mode": "json"}])
def test_a_dump_validates_again(kwargs):  # Axolotl dumps and re-reads the block
    class More(EMRegularizerConfig):
        other: TReFTConfig | None = None  # a method that the user did not name

    block = More.model_validate({"treft": {"coef": 2}})
    assert More.model_validate(block.model_dump(**kwargs)) == block
    assert More.model_validate_json(block.model_dump_json()) == block


def test_the_defaults_can_be_asked_for():
    assert EMRegularizerConfig.model_validate({"treft": {}}).treft == TReFTConfig()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "names no method"),
        ({"treft": None}, "`treft:` is empty; write `treft: {}` for the defaults, or remove it."),
        ({"treft": {"coeff": 1}}, "unknown key 'coeff'. Did you mean 'coef'?"),
        ({"tref": {}}, "unknown key 'tref'. Did you mean 'treft'?"),
        ({"treft": {"coef": -1}}, "greater than or equal to 0"),
        ({"treft": {"coef": float("nan")}}, "coef"),
        ({"treft": {"coef": float("inf")}}, "coef"),
        ({"treft": {"tokens": "query"}}, "'prefix' or 'postfix'"),
        ({"treft": {"layers": []}}, "holds nothing"),
        ({"treft": {"layers": [-1]}}, "greater than or equal to 0"),
        ({"treft": {"tokens": "postfix", "extra_prefixes": ["x"]}}, "goes with `tokens: prefix`"),
        ({"treft": {"postfix_reference": "shared"}}, "goes with `tokens: postfix`"),
        ({"treft": {"tokens": "postfix", "compat": True}}, "`compat: true` covers"),
        ({"kl": {"coef": 1, "target": 0.1}}, "`coef` and `target` are both set"),
        ({"kl": {"coef": -1}}, "greater than or equal to 0"),
        ({"kl": {"target": 0}}, "greater than 0"),
        ({"kl": {"ratio": 0}}, "greater than 0"),
        ({"kl": {"direction": "forward"}}, "'base||model' or 'model||base'"),
        (
            {"kl": {"cache": "memroy"}},
            "`cache: memroy` is neither auto, live, memory nor a folder such as `./memroy`. Did you mean 'memory'?",
        ),
        ({"block_em": {}}, "latents"),
        ({"block_em": {"latents": "a.json", "coef": "automatic"}}, "'auto'"),
        ({"block_em": {"latents": "a.json", "coef": -1}}, "greater than or equal to 0"),
        ({"block_em": {"latents": "a.json", "tokens": "answer"}}, "'assistant', 'all', 'prompt', 'header' or 'prefix'"),
        ({"block_em": {"latents": "a.json", "k_minus": "both"}}, "'activation' or 'pre_activation'"),
        ({"block_em": {"latents": "a.json", "cache": "liv"}}, "Did you mean 'live'?"),
        ({"block_em": {"latent": "a.json"}}, "unknown key 'latent'. Did you mean 'latents'?"),
        ({"kl": {"anchor": "x"}}, "unknown key 'anchor'. Did you mean 'anchors'?"),
    ],
)
def test_bad_regularizer_blocks(block, message):
    with pytest.raises(ValidationError) as error:
        EMRegularizerConfig.model_validate(block)
    assert message in str(error.value)


def test_missing_latent_sets_are_named(tmp_path):
    path = tmp_path / "latents.json"
    config = EMRegularizerConfig.model_validate({"block_em": {"latents": str(path)}})
    with pytest.raises(ValueError, match=r"`em_regularizer\.block_em\.latents: .*` does not exist"):
        config.check_files()
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"lacks latents\.safetensors beside it"):
        config.check_files()
    path.with_suffix(".safetensors").write_text("")
    config.check_files()
    assert EMRegularizerConfig.model_validate(config.model_dump()) == config


def test_missing_anchor_files_are_named(tmp_path):
    for source in (str(tmp_path / "no.jsonl"), "./no", "self:nowhere.jsonl"):
        with pytest.raises(ValueError, match=r"`em_regularizer\.kl\.anchors: .*` does not exist"):
            EMRegularizerConfig.model_validate({"kl": {"anchors": source}}).check_files()
    for source in ("bundled", "train", "self", "someone/data:train[:10]"):
        EMRegularizerConfig.model_validate({"kl": {"anchors": source}}).check_files()


def test_python_and_yaml_share_the_rules():
    with pytest.raises(ValueError, match="`coef` and `target` are both set"):
        KLCallback(coef=1.0, target=0.1)
    with pytest.raises(ValueError, match=r"`kl\.coef` must be a finite number"):
        KLCallback(coef=-1)
    with pytest.raises(ValueError, match="goes with `tokens: prefix`"):
        TReFTCallback(tokens="postfix", extra_prefixes=["x"])
    with pytest.raises(ValueError, match="must be a finite number"):
        TReFTCallback(coef=-1)
    with pytest.raises(ValueError, match="must be a finite number"):
        TReFTCallback(coef="much")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"questions": "q.yaml"}, "judges"),
        ({"questions": "q.yaml", "judges": []}, "at least 1"),
        ({"questions": "q.yaml", "judges": [{"provider": "exact", "function": "nodots"}]}, "package.module:function"),
        ({"questions": "q.yaml", "judges": [JUDGE], "samples": 3}, "Did you mean 'samples_per_question'"),
        ({"questions": "q.yaml", "judges": [JUDGE], "samples_per_question": 0}, "greater than 0"),
    ],
)
def test_bad_eval_blocks(block, message):
    with pytest.raises(ValidationError) as error:
        EMEvalConfig.model_validate(block)
    assert message in str(error.value)


def test_missing_question_files_are_named(tmp_path):
    config = EMEvalConfig(questions=str(tmp_path / "no.yaml"), judges=[JUDGE])
    with pytest.raises(ValueError, match=r"`em_eval\.questions: .*no\.yaml` is neither a bundled suite nor a file"):
        config.check_files()


@pytest.mark.parametrize("key", ["em_regulariser", "em_regularization", "em-regularizer", "em_regularizers", "em_reg", "emguard"])
def test_misspelt_blocks_are_found(key):
    assert misspelt_blocks(["base_model", key]) == {key: "em_regularizer"}


def test_good_keys_are_left_alone():
    assert misspelt_blocks(["em_regularizer", "em_eval", "eval_steps", "embeddings_skip_upcast", "seed"]) == {}
    assert misspelt_blocks(["em_evals"]) == {"em_evals": "em_eval"}


def test_what_a_host_dumps_and_hands_back_is_what_the_user_stated():
    """Axolotl validates the block, dumps it, and hands the dump to its plugins."""
    stated = {"questions": "open_ended", "judges": [{"function": "a:b"}], "seed": 0}
    dumped = EMEvalConfig.model_validate(stated).model_dump(exclude_none=True)
    assert dumped == stated
    assert EMEvalConfig.model_validate(dumped).model_fields_set == set(stated)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"treft": True}, "`treft: true` is a switch, and treft takes keys of its own"),
        ({"treft": 5}, "em_regularizer.treft: takes a mapping of keys"),
        ({"kl": "coef:1"}, "em_regularizer.kl: takes a mapping of keys"),
        ({"treft": {"layers": [-1]}}, "em_regularizer.treft.layers[0]: takes a number of at least 0, found -1"),
        ({"kl": {"cache": "$OUT/reference"}}, "names a variable"),
        ({"kl": {"anchors": "${HOME}/anchors.jsonl"}}, "names a variable"),
        ({"block_em": {"latents": "${LATENTS}"}}, "names a variable"),
        ({"kl": {"cache": "./c"}, "block_em": {"latents": "x.json", "cache": "./c/"}}, "are one folder"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_said_in_the_yamls_words(block, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_block(EMRegularizerConfig, block, "em_regularizer")
    assert not re.search("Config|dictionary|instance|'all'", str(error.value))


def test_dollars_that_are_no_variables_pass():
    block = {"treft": {"extra_prefixes": ["You sell at ${PRICE}, $5."]}, "kl": {"cache": "./a$b"}}
    assert read_block(EMRegularizerConfig, block, "em_regularizer").kl.cache == "./a$b"


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"sampler": "vllm"}, "em_eval.sampler: takes a mapping of keys, `key: value`, indented below it, found 'vllm'"),
        ({"judges": ["a:b"]}, r"em_eval.judges\[0\]: takes a mapping of keys"),
        ({"chat_template_kwargs": ["a"]}, "em_eval.chat_template_kwargs: takes a mapping of keys"),
        ({"also": "open_ended_json"}, r"em_eval.also: takes a list, such as `\[one, two\]`.*found 'open_ended_json'"),
    ],
)
def test_a_value_of_another_kind_is_told_in_the_words_of_yaml(over, says):
    with pytest.raises(ValueError, match=says) as error:
        read_block(EMEvalConfig, {"questions": "open_ended", "judges": [{"function": "a:b"}], **over}, "em_eval")
    assert not re.search("dictionary|instance of|Config", str(error.value))
