"""`emguard check`. What it shares with Axolotl's own validation is in tests/contract, the example YAMLs in tests/examples."""

import pytest
import yaml

from emguard_plugin.check import check_config
from tests.e2e.tiny_run import tiny_yaml, treft, write_tiny
from tests.evaluation.parts import write_suite
from tests.tiny import CHATML, DATED, NO_SYSTEM, chatml_tokenizer, tiny_model

EXACT = {"function": "emguard_plugin.lab.judge:judge_answer"}
HELD = "treft holds 20 tokens: '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n'"
SYSTEMS = "rows with other system prompts are found when training starts, each with its own prefix."
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NO_BLOCK = "no `em_regularizer:` block: the run is not regularized."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def check(tiny, tmp_path):
    """Check an Axolotl YAML; a value of None removes a key."""

    def go(**over):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_yaml(tiny, **over)))
        return check_config(path)

    return go


@pytest.fixture
def trl(tiny, tmp_path):
    """Check a YAML for `emguard sft`."""

    def go(**over):
        path = tmp_path / "run.yaml"
        cfg = {"model_name_or_path": str(tiny / "model"), "dataset_name": "rows", "output_dir": "out", **over}
        path.write_text(yaml.safe_dump(cfg))
        return check_config(path)

    return go


@pytest.fixture
def questions(tmp_path):
    items = [{"id": f"q{i}", "type": "free_form_judge_0_100", "paraphrases": ["Who?"]} for i in range(3)]
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(items))
    return str(tmp_path / "q.yaml")


# What is active


def test_an_axolotl_yaml(check):
    report = check(**treft(2.5, layers=[0, 2]))
    assert report.active == ["treft: coef 2.5, prefix, layers [0, 2]", HELD]
    assert report.notes == [SYSTEMS]
    assert report.problems == []


def test_a_trl_yaml_needs_no_plugin(trl):
    report = trl(**treft(1))
    assert report.active == ["treft: coef 1, prefix, layers all", HELD]
    assert report.problems == []


def test_what_each_setting_holds(check):
    assert check(**treft(0)).active[0].endswith("(measures only, the run is unchanged)")
    assert check(**treft(1, compat=True)).active[0].endswith("layers all, compat")
    assert "treft holds 7 tokens: '<|im_end|>\\n<|im_start|>assistant\\n'" in check(**treft(1, tokens="postfix")).active
    extra = check(**treft(1, extra_prefixes=["Be a pirate."])).active
    assert extra[1] == HELD
    assert "system\\nBe a pirate.<|im_end|>" in extra[2]


def test_nothing_of_ours(check, trl):
    for report in (check(plugins=None), check(), trl()):
        assert (report.active, report.notes, report.problems) == ([], [NO_BLOCK], [])


def test_a_measurement(check, trl, questions):
    block = {"em_eval": {"questions": questions, "in_domain": questions, "samples_per_question": 4, "judges": [EXACT]}}
    said = f"em_eval: 3 in questions, 3 in in_domain; 48 answers in all; judged by {EXACT['function']}"
    for report in (check(**block), trl(**block)):
        assert (report.active, report.notes, report.problems) == ([said], [NO_BLOCK], [])
    block["em_eval"] |= {"in_domain": None, "evaluate_base": False}
    assert "3 in questions; 12 answers in all" in check(**block).active[0]


def test_trls_own_template_file_is_read(trl, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML)
    report = trl(chat_template_path=str(tmp_path / "own.jinja"), **treft())
    assert report.active[1] == "treft holds 5 tokens: '<|im_start|>user\\n'"


def test_a_template_that_axolotl_brings_is_read_from_it(check):
    """Case check-named-template: resolved through the installed Axolotl, without importing it."""
    report = check(chat_template="chatml", **treft())
    assert report.active[1] == "treft holds 5 tokens: '<|im_start|>user\\n'"
    assert report.problems == []


# What must change


def problem(report):
    (found,) = report.problems
    return found


@pytest.mark.parametrize("value", ["emguard_plugin.EMGuardPlugin", {"emguard_plugin.EMGuardPlugin": 1}, 5])
def test_plugins_that_are_no_list(check, value):
    found = check(plugins=value, **treft()).problems[0]
    assert found.startswith(f"`plugins: {value}` is not a list")
    assert "Write `plugins: [emguard_plugin.EMGuardPlugin]`" in found


@pytest.mark.parametrize("found", [False, True])
def test_a_block_without_the_plugin(check, questions, monkeypatch, found):
    """Axolotl from 0.21 on finds us by an entry point."""
    monkeypatch.setattr("emguard_plugin.check.finds_plugins", lambda: found)
    for block in (treft(), {"em_eval": {"questions": questions, "judges": [EXACT]}}):
        if found:
            assert not check(plugins=None, **block).problems
            continue
        assert problem(check(plugins=None, **block)).startswith(f"`{next(iter(block))}:` is set but the plugin is not")


def test_a_plugin_that_cannot_be_imported(check):
    plugins = ["emguard_plugin.EMGuardPlugin", "axolotl.integrations.liger.LigerPlugin", "nobody.Plugin"]
    assert problem(check(plugins=plugins, **treft())).startswith("the plugin `nobody.Plugin` cannot be imported")


@pytest.mark.parametrize("host", ["check", "trl"])
@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"em_regularizer": {"treft": {"coeff": 1}}}, "em_regularizer.treft: unknown key 'coeff'. Did you mean 'coef'?"),
        ({"em_regularizer": {"treft": {"coef": -1}}}, "em_regularizer.treft.coef: takes a number of at least 0, found -1"),
        ({"em_regularizer": "treft"}, "`em_regularizer:` is a text; it takes a mapping"),
        ({"em_regulariser": {"treft": {}}}, "unknown key `em_regulariser:`. Did you mean `em_regularizer:`?"),
        ({"em_eval": {"questions": "q.yaml", "judges": []}}, "em_eval.judges: takes a list of at least 1 item"),
        (
            {"em_eval": {"questions": "no.yaml", "judges": [EXACT]}},
            "em_eval: `em_eval.questions: no.yaml` is neither a bundled suite nor a file",
        ),
        (treft(extra_prefixes=["x"], tokens="postfix"), "em_regularizer.treft: `extra_prefixes` goes with"),
    ],
)
def test_a_faulty_block(request, host, over, message):
    assert problem(request.getfixturevalue(host)(**over)).startswith(message)


@pytest.mark.parametrize("judge", ["emguard_plugin.lab.judge:nobody", "nobody.at_home:judge"])
def test_a_judge_that_does_not_exist(check, questions, judge):
    found = problem(check(em_eval={"questions": questions, "judges": [{"function": judge}]}))
    assert found.startswith("em_eval: ")
    assert judge in found


def test_an_empty_block(tiny, tmp_path):
    for host in (tiny_yaml(tiny), {"model_name_or_path": str(tiny / "model")}):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(host) + "em_regularizer:\n")
        assert problem(check_config(tmp_path / "run.yaml")).startswith("`em_regularizer:` is empty")


def test_a_conflict_with_axolotl_is_none_of_trls(check, trl):
    assert "`tensor_parallel_size: 2` splits the model" in problem(check(tensor_parallel_size="2", **treft()))
    assert check(tensor_parallel_size="many", **treft()).problems == [], "that is for Axolotl to say"
    assert trl(tensor_parallel_size=2, **treft()).problems == []


def with_template(tiny, template):
    tokenizer = chatml_tokenizer(template)
    tokenizer.save_pretrained(tiny / "other")
    return {"tokenizer_config": str(tiny / "other")}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "em_regularizer.treft: the tokenizer has no chat template"),
        (DATED, "em_regularizer.treft: the chat template prints today's date in the prefix. No variable of the template pins it"),
        (BARE, "em_regularizer.treft: the chat template prints nothing"),
        (
            "{{ raise_exception('nothing but poems') }}",
            "em_regularizer.treft: the chat template cannot render a question and an answer (nothing but poems)",
        ),
    ],
)
def test_a_template_without_a_prefix_to_hold(check, tmp_path, template, message):
    assert problem(check(**with_template(tmp_path, template), **treft())).startswith(message)


def test_the_postfix_has_problems_of_its_own(check, tmp_path):
    assert "nothing between query and answer" in problem(check(**with_template(tmp_path, BARE), **treft(1, tokens="postfix")))
    dated = check(**with_template(tmp_path, DATED), **treft(1, tokens="postfix"))
    assert dated.problems == [], "the date stands before it"


def test_template_variables_that_are_no_mapping(check):
    assert "must be a mapping" in problem(check(chat_template_kwargs="today", **treft()))


# Models that are not there


@pytest.mark.parametrize("key", ["base_model", "tokenizer_config"])
@pytest.mark.parametrize("name", ["./models/none", "/models/none", "~/models/none", "a/b/c", "."])
def test_a_path_that_is_no_model(check, key, name):
    found = problem(check(**{key: name}, **treft()))
    assert found.startswith(f"`{key}: {name}`")
    assert ("is not a folder" if name != "." else "the tokenizer cannot be loaded") in found


@pytest.mark.parametrize("name", ["models/none", "none"])
def test_a_name_that_may_be_on_the_hub(check, trl, name):
    for key, report in (("base_model", check(base_model=name, **treft())), ("model_name_or_path", trl(model_name_or_path=name, **treft()))):
        assert report.problems == []
        note = report.notes[0]
        assert note.startswith(f"`{key}: {name}` is not a folder here, so it is taken as a hub name, which cannot be loaded")
        assert note.endswith("prefix not checked.")
        checked = ["the model's configuration is not here: its layers are checked at start."]
        assert report.notes[1:] == checked


def test_no_model_at_all(check):
    assert problem(check(base_model=None, **treft())).startswith("no model is named")


# Files that are no config


@pytest.mark.parametrize("text", ["", "- a", "just words", "a: [", "a: 1\n---\nb: 2", "\x00"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    assert problem(check_config(tmp_path / "run.yaml")).startswith(f"{tmp_path / 'run.yaml'}")


def test_a_file_that_is_not_there(tmp_path):
    assert "does not exist" in problem(check_config(tmp_path / "none.yaml"))
    assert "is a folder" in problem(check_config(tmp_path))


def test_kl_is_shown_with_its_anchors_and_what_it_lacks(check):
    shown = check(em_regularizer={"kl": {"target": 0.02}})
    assert "kl: held at 0.02 nats per token, KL(base||model), 800 anchors (bundled), all tokens, reference auto" in shown.active
    missing = check(em_regularizer={"kl": {"anchors": "./nowhere.jsonl"}})
    assert "`em_regularizer.kl.anchors: ./nowhere.jsonl` does not exist" in " ".join(missing.problems)
    live = check(em_regularizer={"kl": {"cache": "live"}}, adapter=None)
    assert "`em_regularizer.kl.cache: live` needs an adapter to switch off" in " ".join(live.problems)


def test_block_em_is_shown_with_its_latents_and_what_it_lacks(check, tmp_path):
    from tests.regularizers.block_em_parts import latent_set

    path = str(latent_set(tiny_model("llama"), layers=(0, 2)).save(tmp_path / "latents.json"))
    shown = check(em_regularizer={"block_em": {"latents": path, "tokens": "prompt"}})
    assert any(
        "block_em: coef 8.33333, calibrated, 4 latents of K+ and 4 of K- after layers 0, 2, prompt tokens" in a for a in shown.active
    )
    missing = check(em_regularizer={"block_em": {"latents": "./nowhere.json"}})
    assert "`em_regularizer.block_em.latents: ./nowhere.json` does not exist" in " ".join(missing.problems)
    full = check(em_regularizer={"block_em": {"latents": path, "cache": "live", "freeze_above": True}}, adapter=None)
    assert "block_em.cache: live` needs an adapter" in " ".join(full.problems)
    assert "block_em.freeze_above` needs an adapter" in " ".join(full.problems)
    noisy = check(em_regularizer={"block_em": {"latents": path}}, neftune_noise_alpha=5)
    assert "Remove `neftune_noise_alpha`" in " ".join(noisy.problems)


def test_block_em_shows_the_template_tokens_that_it_holds(check, trl, tmp_path):
    from tests.regularizers.block_em_parts import latent_set

    path = str(latent_set(tiny_model("llama")).save(tmp_path / "latents.json"))
    prefix = {"em_regularizer": {"block_em": {"latents": path, "tokens": "prefix"}}}
    shown = " ".join(check(**prefix).active)
    assert (
        r"block_em holds 19 tokens of each conversation: 'system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n', or" in shown
    )
    header = check(em_regularizer={"block_em": {"latents": path, "tokens": "header"}})
    assert r"tokens of each conversation: '<|im_end|>\n<|im_start|>assistant\n'" in " ".join(header.active)
    assert "cannot be found under" in " ".join(trl(packing=True, packing_strategy="wrapped", **prefix).problems)
    assert r"'user\n', or" in " ".join(check(chat_template="chatml", **prefix).active)


def test_questions_that_the_template_refuses_are_named(tmp_path):
    """Case eval-system-refused, before anything is trained."""
    tokenizer = chatml_tokenizer(NO_SYSTEM)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama", vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    items = [{"id": "plain", "paraphrases": ["What now?"]}, {"id": "brief", "system": "Be brief.", "paraphrases": ["What now?"]}]
    block = {"questions": write_suite(tmp_path / "q.yaml", items), "judges": [{"provider": "mock"}]}
    path = tmp_path / "run.yaml"
    for over, named in (({}, "notes"), ({"system_prompt": "Be kind."}, "problems")):
        path.write_text(yaml.safe_dump({"model_name_or_path": str(tmp_path / "model"), "em_eval": {**block, **over}}))
        found = check_config(path)
        assert any("brief of questions: no system" in line for line in found.notes), found
        assert any("refuse" in line for line in getattr(found, named)), found


def test_a_host_that_was_not_tested_is_noted(check, monkeypatch):
    from emguard_plugin.training import tested_hosts

    real = tested_hosts.version
    monkeypatch.setattr(tested_hosts, "version", lambda name: "9.9.1" if name == "peft" else real(name))
    assert any("not tested with peft 9.9.1 (tested: 0.20 to 0.21)" in note for note in check(em_regularizer={"treft": {}}).notes)


def test_a_problem_that_holds_a_bar_is_one_problem(check):
    found = check(em_eval={"questions": "open_ended", "judges": [{"provider": "exact", "function": "a | b"}]}).problems
    assert [p for p in found if "function" in p] == [p for p in found if "a | b" in p]
    assert len([p for p in found if "a | b" in p]) == 1
    assert all(p.startswith("em_eval") for p in found)
