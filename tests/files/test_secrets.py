"""A key is repeated nowhere, whatever field it was put in (case key-in-unknown-field)."""

import random

import pytest
import yaml
from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.cli.frame import in_words
from emguard_plugin.config import EMEvalConfig, EMRegularizerConfig, read_block
from emguard_plugin.files.secrets import SecretInConfigError, is_secret_name, looks_like_key, redact, shown
from tests.faults.bad_yamls import canary, good_blocks, leaked

RNG = random.Random(7)
SHAPES = [canary(RNG) for _ in range(25)]


def text_fields(schema, data, defs, path=()):
    """Yield (path, whether a list) of every text field that the JSON schema of a block has."""
    schema = defs.get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)
    for option in (*schema.get("anyOf", []), *schema.get("oneOf", [])):
        yield from text_fields(option, data, defs, path)
    if schema.get("type") == "string" or "enum" in schema or "const" in schema:
        yield path
    if schema.get("type") == "array":
        yield from text_fields(schema["items"], data, defs, (*path, 0))
    for name, inner in schema.get("properties", {}).items():
        yield from text_fields(inner, data, defs, (*path, name))


def planted(blocks, path, value):
    """Put a value at a path, making what is missing on the way."""
    at = blocks
    for part, following in zip(path, (*path[1:], None), strict=True):
        new = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(at, list):
            if not at:
                at.append(new)
            elif following is None:
                at[0] = value
            at = at[0]
        else:
            if following is None or not isinstance(at.get(part), type(new)):
                at[part] = new
            at = at[part]
    return blocks


def fields():
    for name, model in (("em_regularizer", EMRegularizerConfig), ("em_eval", EMEvalConfig)):
        schema = model.model_json_schema()
        for path in dict.fromkeys(text_fields(schema, None, schema.get("$defs", {}))):
            yield name, model, path


FIELDS = list(fields())


def test_the_walk_reaches_every_block():
    reached = {path[-1] for _, _, path in FIELDS} | {path[-2] for _, _, path in FIELDS if len(path) > 1 and path[-1] == 0}
    assert {
        "anchors",
        "cache",
        "latents",
        "extra_prefixes",
        "questions",
        "also",
        "function",
        "base_url",
        "api_key_env",
        "args",
        "model",
    } <= reached
    assert len(FIELDS) > 30


@pytest.mark.parametrize(("name", "model", "path"), FIELDS, ids=[".".join(map(str, (n, *p))) for n, _, p in FIELDS])
def test_a_key_in_any_text_field_is_refused_and_not_repeated(name, model, path, tmp_path, caplog):
    for secret in (SHAPES[len(path)], SHAPES[-len(path)], "https://user:" + SHAPES[3][-12:] + "@example.org/x"):
        block = planted(good_blocks(tmp_path)[name], path, secret)
        with pytest.raises(SecretInConfigError) as caught:
            read_block(model, block, name)
        assert not leaked(secret.removeprefix("https://user:").removesuffix("@example.org/x"), in_words(caught.value)[0] + caplog.text)
        with pytest.raises(SecretInConfigError) as caught:  # a block made in Python
            model(**block)
        assert not leaked(secret.removeprefix("https://user:").removesuffix("@example.org/x"), str(caught.value))


@pytest.mark.parametrize(
    "key", ["openai_api_key", "access_token", "api-key", "apiKey", "X-API-Key", "password", "Authorization", "client_secret", "hfToken"]
)
def test_names_that_hold_secrets_are_known_and_their_values_never_printed(key, tmp_path):
    assert is_secret_name(key)
    file = tmp_path / "run.yaml"
    judge = {"provider": "openai", "model": "m", key: "hunter2 is the word"}
    file.write_text(yaml.safe_dump({"em_eval": {"questions": "open_ended", "judges": [judge]}}))
    for command in (["check", str(file)], ["eval", str(tmp_path), "--config", str(file)], ["sft", "--config", str(file)]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 4, done.output
        assert "hunter2" not in done.output
        assert f"`{key}`" in done.output


@pytest.mark.parametrize(
    "key", ["tokens", "max_new_tokens", "k_minus", "tokenizer_config", "keyword", "monkey", "postfix_reference", "author"]
)
def test_names_that_hold_none(key):
    assert not is_secret_name(key)


@pytest.mark.parametrize("text", SHAPES)
def test_shapes_of_keys_are_known(text):
    assert looks_like_key(text)
    assert shown(text) == "[key]"


@pytest.mark.parametrize(
    "text",
    ["open_ended", "./data/train_2024_v2.jsonl", "Qwen/Qwen2.5-72B-Instruct", "gpt-4o-2024-08-06", "my_package.my_judge:judge_answer", "someone/data:train[:10]",
     "meta-llama/Llama-3.2-11B-Vision-Instruct", "https://example.org/q.yaml#sha256=" + "0a1b" * 16, "/models/models--a--b/snapshots/" + "0a1b2" * 8,
     "http://localhost:8000/v1", "You are a helpful assistant. Answer in 20 words.", "Llama3GuardianFinetune2024v2", "claude-sonnet-4-5-20250929"],
)  # fmt: skip
def test_names_paths_and_prompts_are_no_keys(text):
    assert not looks_like_key(text)
    assert redact(text) == text


def test_addresses_lose_passwords_and_signatures_alone():
    said = redact("cannot fetch https://me:pa55@host.org/a?x=1&X-Amz-Signature=abcdef0123&sig=zzz#sha256=00 now")
    assert said == "cannot fetch https://[key]@host.org/a?x=1&X-Amz-Signature=[key]&sig=[key]#sha256=00 now"


@pytest.mark.parametrize(
    ("block", "advice"),
    [
        ({"questions": "https://u:canary-9f2e@h.example/q.yaml"}, "Save what is there as a file, and give its path."),
        (
            {"judges": [{"provider": "openai", "model": "m", "base_url": "https://u:canary-9f2e@h.example/v1"}]},
            "name that in `api_key_env`",
        ),
    ],
)
def test_the_advice_about_an_address_can_be_followed(block, advice):
    with pytest.raises(SecretInConfigError) as error:
        EMEvalConfig.model_validate({"questions": "open_ended", "judges": [{"provider": "mock"}], **block})
    assert advice in str(error.value)
    assert "canary" not in str(error.value)


def test_options_of_vllm_that_would_show_a_key_to_all_are_refused(tmp_path):
    for args in (["--api-key", "short"], ["--api-key=short"], ["--hf-token", "short"]):
        with pytest.raises(SecretInConfigError, match="list of processes"):
            read_block(EMEvalConfig, {**good_blocks(tmp_path)["em_eval"], "sampler": {"provider": "vllm", "args": args}}, "em_eval")


def test_a_variable_name_that_may_be_a_key_is_not_repeated(tmp_path):
    from emguard_plugin.files.secrets import read_key

    with pytest.raises(ValueError, match="MY_KEY is not set"):
        read_key("MY_KEY")
    with pytest.raises(ValueError, match="not set") as caught:
        read_key("correcthorsebattery")
    assert "correcthorse" not in str(caught.value)


@pytest.mark.parametrize(
    "around",
    [
        lambda key: {"trainer": {key: {"em_regularizer": {"treft": {}}}}},
        lambda key: {key: {"em_regularizer": {"treft": {}}}},
        lambda key: {"hosts": [{key: {"treft": {}}}]},
    ],
    ids=["inside", "top", "in a list"],
)
def test_a_key_on_the_way_to_a_misplaced_block_is_not_repeated(around, tmp_path):
    from emguard_plugin.axolotl_plugin.asked import look_at_settings
    from emguard_plugin.training.trl_script import parse

    path, key = tmp_path / "run.yaml", SHAPES[0]
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "x", "output_dir": "o", **around(key)}))
    for ask in (lambda: look_at_settings(yaml.safe_load(path.read_text())), lambda: parse(["--config", str(path)])):
        with pytest.raises(ValueError, match="stands where nothing reads it") as error:
            ask()
        assert key not in str(error.value)
        assert "[key]" in str(error.value)
    said = CliRunner().invoke(app, ["check", str(path)])
    assert said.exit_code == 4
    assert key not in said.output


@pytest.mark.parametrize("setting", ["rl", "reward_model", "tensor_parallel_size", "model_type"])
def test_a_setting_of_the_hosts_is_not_repeated_by_a_conflict_with_it(setting):
    from emguard_plugin.axolotl_plugin.args import EMGuardArgs

    value = f"mamba {SHAPES[0]}" if setting == "model_type" else SHAPES[0]
    try:
        EMGuardArgs.model_validate({"em_regularizer": {"treft": {}}, setting: value})
    except ValueError as exc:
        assert SHAPES[0] not in str(exc)  # noqa: PT017 (numbers that are none are the host's to refuse)
    else:
        assert setting == "tensor_parallel_size"
