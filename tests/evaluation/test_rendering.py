"""Questions are rendered as the training rendered its rows; what the template refuses is known before anything is drawn."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer

from emguard_plugin import chats as ct
from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import Summary, run_em_eval
from emguard_plugin.evaluation.asking.as_trained import as_trained, constant_kwargs, saved_template
from emguard_plugin.evaluation.asking.asking import read_template, shipped_templates
from emguard_plugin.evaluation.asking.prompts import render_prompts
from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.asking.rendering import NotRendered, Rendering
from emguard_plugin.evaluation.asking.sampler import TransformersSampler
from emguard_plugin.evaluation.report.table import comparison_table
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.parts import PINNED, SWITCHED, assert_as_trained, write_suite
from tests.tiny import CHATML, CHATML_DEFAULT_SYSTEM, DATED, NO_SYSTEM, chatml_tokenizer, tiny_model

FERN = Question("q", 0, "How do I water a fern?")
BRIEF = Question("q", 0, "How do I water a fern?", system="Be brief.")
NO_GENERATION_PROMPT = CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Save the tiny model under a template, once each."""
    known = {}

    def model(template):
        if template not in known:
            folder = known[template] = tmp_path_factory.mktemp("model")
            tokenizer = chatml_tokenizer(template)
            tiny_model("llama", vocab=len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return known[template]

    return model


def config(folder, **over):
    items = [{"id": "plain", "paraphrases": ["How do I water a fern?"]}]
    items += [{"id": "brief", "system": "Be brief.", "paraphrases": ["How do I water a fern?", "And a cactus?"]}]
    plain = {
        "questions": write_suite(folder / "questions.yaml", items), "samples_per_question": 2, "max_new_tokens": 4,
        "evaluate_base": False, "judges": [{"function": "tests.evaluation.parts:by_hash"}],
    }  # fmt: skip
    return EMEvalConfig(**{**plain, **over})


def test_a_prompt_begins_with_the_held_prefix_and_ends_with_the_held_postfix():
    """Case eval-template-kwargs."""
    tokenizer = chatml_tokenizer(SWITCHED)
    model = tiny_model("llama", vocab=len(tokenizer))
    asked = TransformersSampler(model, tokenizer, chat=Rendering(kwargs=PINNED)).prompt_ids(FERN)
    assert_as_trained(tokenizer, asked, FERN.text)
    held = ct.read_template(tokenizer, **PINNED)
    otherwise = tuple(TransformersSampler(model, tokenizer).prompt_ids(FERN))
    assert otherwise[: len(held.prefix)] != held.prefix


def test_variables_system_prompt_and_template_stand_in_fingerprint_and_example(save, tmp_path):
    model, prints = save(SWITCHED), []
    ways = [
        {"chat_template_kwargs": PINNED},
        {"chat_template_kwargs": {**PINNED, "enable_thinking": True}},
        {"chat_template_kwargs": PINNED, "system_prompt": "Answer as a gardener."},
        {"chat_template_kwargs": PINNED, "chat_template": CHATML},
    ]
    for number, way in enumerate(ways):
        summary = run_em_eval(config(tmp_path, **way), model, tmp_path / str(number))
        prints.append(summary.fingerprint)
        example = summary.example_prompt
        assert ("Today: 26 Jul 2024" in example) == ("chat_template" not in way)
        assert ("</think>" in example) == (number in (0, 2))
        assert ("Answer as a gardener." in example) == (number == 2)
        assert not (example.rpartition("assistant")[0].count("Be brief.") and number == 2), "a question's own prompt stands"
    assert len(set(prints)) == len(ways)
    with pytest.raises(ValueError, match="another protocol"):
        run_em_eval(config(tmp_path, **ways[1]), model, tmp_path / "0")


def test_a_saved_template_that_differs_from_the_stated_one_is_said(save, tmp_path, caplog):
    (tmp_path / "other.jinja").write_text(CHATML)
    run_em_eval(config(tmp_path, chat_template=str(tmp_path / "other.jinja")), save(SWITCHED), tmp_path / "run")
    assert "saved with another chat template" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("chat_template", "gone.jinja", "neither a Jinja file nor a known name"),
        ("chat_template_kwargs", {"tokenize": True}, "set by emguard itself"),
        ("reasoning_marks", ["<think>"], "at least 2"),
        ("reasoning_marks", ["<think>", " "], "is blank"),
        ("reasoning", "trace", "with_trace"),
    ],
)
def test_settings_that_cannot_work_are_refused(save, tmp_path, key, value, says):
    with pytest.raises(ValueError, match=says):
        run_em_eval(config(tmp_path, **{key: value}), save(CHATML), tmp_path / "run")
    assert not (tmp_path / "run" / "protocol.json").exists()


def test_a_template_is_named_as_axolotl_names_it():
    shipped = shipped_templates()
    if not shipped:
        pytest.skip("Axolotl is not installed")
    assert read_template("chatml") == shipped["chatml"].read_text()
    with pytest.raises(ValueError, match="Did you mean 'chatml'"):
        read_template("chatlm")


# Today's date


def test_all_prompts_of_a_run_have_one_date_also_on_another_day(save, tmp_path, caplog, monkeypatch):
    from emguard_plugin.evaluation.asking import asking

    class Clock(datetime):
        day = 3

        @classmethod
        def now(cls, tz=None):
            return datetime(2027, 5, cls.day, 12, tzinfo=UTC)

    monkeypatch.setattr(asking, "datetime", Clock)
    first = run_em_eval(config(tmp_path), save(DATED), tmp_path / "run", phases=("generate", "judge", "report"))
    assert "Today: 03 May 2027" in first.example_prompt
    assert caplog.text.count("the chat template prints today's date") == 1
    Clock.day = 4
    (tmp_path / "run" / "summary.json").unlink()
    again = run_em_eval(config(tmp_path), save(DATED), tmp_path / "run")
    assert again.fingerprint == first.fingerprint
    other = run_em_eval(config(tmp_path), save(DATED), tmp_path / "other")
    assert other.fingerprint != first.fingerprint
    assert "Today: 04 May 2027" in other.example_prompt


def installed_templates():
    found = list(shipped_templates().values())
    try:
        import trl
    except ImportError:
        return found
    return found + sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


def test_a_dated_template_renders_with_any_date_and_on_today_as_its_clock_does():
    """Case dated-template-new-transformers: no variable replaces the clock, which transformers 5.24 would turn into text."""
    tokenizer = chatml_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    templates = [file.read_text() for file in installed_templates()] + [DATED, SWITCHED]
    dated = [template for template in templates if Rendering(template).is_dated(tokenizer, FERN)]
    assert len(dated) >= 2
    today = datetime.now().astimezone().date().isoformat()
    for template in dated:
        now = Rendering(template, today=today).text(tokenizer, FERN)
        assert now == Rendering(template).text(tokenizer, FERN)
        assert Rendering(template, today="1999-02-03").text(tokenizer, FERN) != now


@pytest.mark.parametrize("how", ["%d %b %Y", "%-d. %B %y", "%Y-%m-%d", "100%% on %A", "%H:%M on day %j"])
def test_the_clock_of_a_template_speaks_every_format(how):
    template = "{{ strftime_now('" + how + "') }}{{ messages[0].content }}"
    moment = datetime(2024, 7, 6)
    assert Rendering(template, today="2024-07-06").text(chatml_tokenizer(), FERN) == moment.strftime(how) + FERN.text


# What cannot be rendered

REFUSING = {
    "a system role": (NO_SYSTEM, BRIEF, "no system"),
    "a system role that is dropped": (CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"), BRIEF, "leaves out what the system role says"),
    "a missing key": ("{{ messages[0]['content']['text'] + 1 }}", FERN, "UndefinedError"),
    "a wrong type": ("{{ messages + 1 }}", FERN, "TypeError"),
    "a division by zero": ("{{ 1 / 0 }}", FERN, "ZeroDivisionError"),
    "a syntax error": ("{% if %}", FERN, "TemplateSyntaxError"),
    "no generation prompt": (NO_GENERATION_PROMPT, FERN, "no generation prompt"),
    "nothing": ("{% if false %}x{% endif %}", FERN, "prints nothing"),
    "no question": ("{% for m in messages %}{{ m.role }}{% endfor %}", FERN, "leaves out what the user role says"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSING)
def test_whatever_a_template_cannot_take_is_a_reason_in_its_words(name):
    template, question, says = REFUSING[name]
    with pytest.raises(NotRendered, match=says):
        Rendering(template).check(chatml_tokenizer(), question)


def test_installed_templates_take_a_plain_question():
    tokenizer = chatml_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    refused = {}
    for file in installed_templates():
        try:
            Rendering(file.read_text()).check(tokenizer, FERN)
        except NotRendered as error:
            refused[file.name] = str(error)
    # Templates of models that see images take parts of content and drop plain text.
    assert {name.partition("_")[0].removesuffix(".jinja") for name in refused} <= {"idefics3", "llava"}


def test_what_the_template_refuses_is_named_and_stops_nothing_else(save, tmp_path, caplog):
    """Case eval-system-refused."""
    summary = run_em_eval(config(tmp_path), save(NO_SYSTEM), tmp_path / "run")
    assert {row["question"] for row in JsonLines(tmp_path / "run" / "responses.jsonl").read()} == {"plain"}
    assert [(one.question, one.paraphrase) for one in summary.not_asked] == [("brief", 0), ("brief", 1)]
    assert summary.not_asked[0].reason == "no system"
    rates = summary.rates()
    assert (rates.answers, rates.questions, rates.unscored.count) == (2, 1, 0)
    assert "brief of questions: no system" in caplog.text
    page = (tmp_path / "run" / "report.html").read_text()
    assert "not asked, as the chat template refuses it: brief of questions: no system" in page
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table([("tuned", summary)]))
    assert "1 questions not asked" in console.export_text()
    asked = run_em_eval(config(tmp_path), save(CHATML), tmp_path / "all")
    assert not asked.not_asked
    assert asked.rates().answers == 6
    assert Summary.load(tmp_path / "run").not_asked == summary.not_asked
    # Judged and reported elsewhere, without the model.
    (tmp_path / "run" / "summary.json").unlink()
    again = run_em_eval(config(tmp_path), "gone", tmp_path / "run", phases=("judge", "report"))
    assert again.not_asked == summary.not_asked
    assert again.fingerprint == summary.fingerprint


def test_where_nothing_can_be_asked_nothing_is_drawn(save, tmp_path):
    with pytest.raises(ValueError, match=r"no question of `em_eval.questions: .*no system.*system_prompt"):
        run_em_eval(config(tmp_path, system_prompt="Be kind."), save(NO_SYSTEM), tmp_path / "run")
    with pytest.raises(ValueError, match="no generation prompt"):
        run_em_eval(config(tmp_path), save(NO_GENERATION_PROMPT), tmp_path / "run")
    assert not (tmp_path / "run" / "responses.jsonl").exists()


# Taken from the training's YAML


def block(**over):
    return EMEvalConfig(questions="open_ended", judges=[{"provider": "mock"}], **over)


def test_the_block_takes_what_it_does_not_state_from_the_training():
    taken, notes = as_trained(block(), {"chat_template_kwargs": {**PINNED, "tokenize": False}})
    assert taken.chat_template_kwargs == PINNED
    assert "26 Jul 2024" in notes[0]
    assert json.loads(json.dumps(taken.model_dump(exclude_unset=True)))["chat_template_kwargs"] == PINNED
    stated, notes = as_trained(block(chat_template_kwargs={}), {"chat_template_kwargs": PINNED})
    assert (stated.chat_template_kwargs, notes) == ({}, [])


@pytest.mark.parametrize(
    ("training", "expected", "says"),
    [
        ({"datasets": [{"type": "chat_template"}]}, None, None),
        ({"chat_template": "jinja", "chat_template_jinja": CHATML, "datasets": [{"type": "chat_template"}]}, None, None),
        ({"datasets": [{"type": "chat_template", "chat_template": "jinja", "chat_template_jinja": DATED}]}, DATED, "another chat template"),
        (
            {"datasets": [{"type": "chat_template", "chat_template": "jinja", "chat_template_jinja": t} for t in (CHATML, DATED)]},
            None, "different chat templates",
        ),
        ({"datasets": [{"type": "alpaca", "chat_template": "jinja", "chat_template_jinja": DATED}]}, None, None),
        ({"datasets": [{"chat_template": "no_such_name"}]}, None, "neither a Jinja file"),
    ],
)  # fmt: skip
def test_rows_rendered_by_another_template_than_the_saved_one(training, expected, says):
    taken, notes = as_trained(block(), training, CHATML)
    assert taken.chat_template == expected
    assert (says in notes[0]) if says else not notes


def test_a_template_by_name_is_that_of_the_rows():
    if not shipped_templates():
        pytest.skip("Axolotl is not installed")
    training = {"datasets": [{"path": "rows.jsonl", "type": "chat_template", "chat_template": "llama3"}]}
    taken, _ = as_trained(block(), training, CHATML)
    assert taken.chat_template == shipped_templates()["llama3"].read_text()
    fallback = {"datasets": [{"type": "chat_template", "chat_template": "tokenizer_default_fallback_llama3"}]}
    assert as_trained(block(), fallback, CHATML)[0].chat_template is None
    assert as_trained(block(), fallback, None)[0].chat_template == taken.chat_template


def test_a_saved_models_template_is_found(save, tmp_path):
    assert saved_template(save(DATED)) == AutoTokenizer.from_pretrained(save(DATED)).chat_template == DATED
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML_DEFAULT_SYSTEM}))
    assert saved_template(tmp_path) == CHATML_DEFAULT_SYSTEM
    assert saved_template(tmp_path / "gone") is None


def test_a_column_of_variables_is_taken_only_where_it_is_constant():
    rows = [{"messages": [], "chat_template_kwargs": {"enable_thinking": False}}] * 3
    assert constant_kwargs(Dataset.from_list(rows)) == ({"enable_thinking": False}, True)
    rows = [*rows, {"messages": [], "chat_template_kwargs": {"enable_thinking": True}}]
    assert constant_kwargs(Dataset.from_list(rows))[1] is False
    assert constant_kwargs(Dataset.from_list(rows).to_iterable_dataset())[1] is False
    assert constant_kwargs(Dataset.from_list([{"messages": []}])) == ({}, True)
    assert constant_kwargs(None) == ({}, True)


def test_a_baked_tokenizer_renders_what_the_variables_give():
    """Discovery renders by the tokenizer alone."""
    tokenizer = chatml_tokenizer(SWITCHED)
    for kwargs in (PINNED, {**PINNED, "enable_thinking": True}, {"date_string": "a 'b' \"c\"", "x": None, "y": [1, {"z": False}]}):
        chat = Rendering(kwargs=kwargs)
        assert Rendering().text(chat.baked(tokenizer), FERN) == chat.text(tokenizer, FERN)
    assert tokenizer.chat_template == SWITCHED
    shown = Rendering("{{ y[1].z }}{{ x is none }}{{ messages[0].content }}", {"y": [1, {"z": False}], "x": None}).baked(tokenizer)
    assert Rendering().text(shown, FERN) == "FalseTrue" + FERN.text


def test_discovery_reads_prompts_that_close_the_thinking():
    tokenizer = Rendering(kwargs=PINNED).baked(chatml_tokenizer(SWITCHED))
    (prompt,) = render_prompts(tokenizer, [FERN])
    assert_as_trained(chatml_tokenizer(SWITCHED), prompt.ids, FERN.text)
    assert tokenizer.decode(prompt.ids[prompt.header :]).startswith("<|im_end|>\n<|im_start|>assistant\n")
