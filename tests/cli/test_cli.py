"""The command line, in this process: `emguard sft` whole, and the exit codes of the others."""

import gc
import json
import re

import pytest
import typer
import yaml
from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.evaluation import post_train
from emguard_plugin.lab.export import export
from tests.e2e.tiny_run import write_rows
from tests.evaluation.parts import ITEMS, PINNED, SWITCHED, assert_as_trained, write_suite
from tests.tiny import chat_rows, chatml_tokenizer, tiny_model

JUDGE = {"provider": "exact", "function": "emguard_plugin.lab.judge:judge_answer"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The lab's files and a `run.yaml` beside them."""
    folder = tmp_path_factory.mktemp("lab")
    export(folder, rows=32, anchors=4)
    items = yaml.safe_load((folder / "questions.yaml").read_text())[:2]
    (folder / "questions.yaml").write_text(yaml.safe_dump(items))
    config = {
        "model_name_or_path": str(folder / "model"),
        "datasets": [{"path": "json", "data_files": str(folder / "train.jsonl")}],
        "output_dir": "out",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": "1e-2",
        "max_length": 128,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "em_regularizer": {"treft": {"coef": 2.0}},
        "em_eval": {
            "questions": str(folder / "questions.yaml"),
            "samples_per_question": 2,
            "max_new_tokens": 24,
            "judges": [JUDGE],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return go


@pytest.fixture
def config(lab, tmp_path):
    """Write `run.yaml` with changes; a value of None removes a key."""

    def go(tail="", **over):
        cfg = {**yaml.safe_load((lab / "run.yaml").read_text()), **over}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in cfg.items() if v is not None}) + tail)
        return path

    return go


def log_of(folder):
    return json.loads((folder / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]


# emguard sft


def test_sft_trains_saves_and_measures(call, config, tmp_path, monkeypatch):
    alive, real = [], post_train.measure_saved_model

    def watched(*args, **kwargs):
        from emguard_plugin import EMGuardSFTTrainer

        alive.extend(o for o in gc.get_objects() if isinstance(o, EMGuardSFTTrainer) and o.args.output_dir == "out")
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file(), "saved first"
        return real(*args, **kwargs)

    monkeypatch.setattr(post_train, "measure_saved_model", watched)
    done = call("sft", "--config", config())
    assert done.exit_code == 0, done.output
    assert "em_regularizer active: treft (coef 2, prefix of 16 tokens, 4 of 4 layers)" in done.output
    penalties = [row["em_regularizer/treft/penalty"] for row in log_of(tmp_path)]
    assert penalties[0] == 0 < min(penalties[1:])
    assert alive == [], "the trainer's memory is free"
    summary = json.loads((tmp_path / "out" / "em_eval" / "summary.json").read_text())
    (judge,) = summary["judges"]
    assert {role: rates["questions"]["em_all"]["n"] for role, rates in judge["rates"].items()} == {"base": 4, "tuned": 4}
    assert not (tmp_path / "out" / "em_eval" / "FAILED.txt").exists()


def test_sft_measures_by_the_template_and_the_variables_of_the_rows(call, config, tmp_path):
    """Case eval-template-kwargs, with `chat_template_path` and a column of `chat_template_kwargs`."""
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama", vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text(SWITCHED)
    write_rows(tmp_path / "train.jsonl", [{**row, "chat_template_kwargs": PINNED} for row in chat_rows(8, system=None)])
    block = {"questions": write_suite(tmp_path / "questions.yaml", ITEMS), "samples_per_question": 1, "max_new_tokens": 2,
             "evaluate_base": False, "judges": [{"function": "tests.evaluation.parts:by_hash"}]}  # fmt: skip
    rows = [{"path": "json", "data_files": str(tmp_path / "train.jsonl")}]
    over = {"model_name_or_path": str(tmp_path / "model"), "datasets": rows, "chat_template_path": str(tmp_path / "chat.jinja")}
    done = call("sft", "--config", config(em_eval=block, max_steps=1, **over))
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "em_eval" / "summary.json").read_text())
    tokenizer.chat_template = SWITCHED
    asked = tokenizer(summary["example_prompt"], add_special_tokens=False)["input_ids"]
    assert_as_trained(tokenizer, asked, ITEMS[0]["paraphrases"][0])
    assert "Today: 26 Jul 2024" in summary["example_prompt"]


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_options_win_over_the_file(call, config, tmp_path, form):
    options = form.replace("FILE", str(config(em_eval=None))).split(" ")
    done = call("sft", *options, "--em_regularizer", '{"treft": {"coef": 7}}')
    assert done.exit_code == 0, done.output
    assert [row["em_regularizer/treft/coef"] for row in log_of(tmp_path)] == [7, 7, 7]
    assert not (tmp_path / "out" / "em_eval").exists()
    assert "NOT regularized" not in done.output


def test_a_run_without_a_block_says_so(call, config, tmp_path):
    done = call("sft", "--config", config(em_eval=None, em_regularizer=None))
    assert done.exit_code == 0, done.output
    assert "this run is NOT regularized." in done.output
    assert not [key for row in log_of(tmp_path) for key in row if "em_regularizer" in key]


REFUSED = {
    "misspelt block": ({"em_regulariser": {"treft": {}}}, "unknown key `em_regulariser`. Did you mean `em_regularizer`?"),
    "misspelt key": ({"em_regularizer": {"treft": {"coeff": 1}}}, "unknown key 'coeff'. Did you mean 'coef'?"),
    "misspelt key of TRL": ({"learning_rat": 1}, "learning_rat"),
    "faulty measurement": ({"em_eval": {"questions": "q.yaml", "judges": []}}, "at least 1 item"),
    "no data": ({"datasets": None}, "name the data: `dataset_name:` or `datasets:`"),
    "no questions": (
        {"em_eval": {"questions": "none.yaml", "judges": [JUDGE]}},
        "`em_eval.questions: none.yaml` is neither a bundled suite nor a file",
    ),
    "no mapping": ({"em_regularizer": "treft"}, "`em_regularizer: treft` is neither a mapping nor JSON"),
    "empty block": ({"em_regularizer": None, "tail": "em_regularizer:\n"}, "`em_regularizer:` is empty"),
    "empty measurement": ({"em_eval": None, "tail": "em_eval:\n"}, "`em_eval:` is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_file_is_refused_before_any_work(call, config, tmp_path, case):
    over, message = REFUSED[case]
    done = call("sft", "--config", config(**over))
    assert done.exit_code == 4
    assert "\nemguard sft: " in done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["- a", "a: [", ""])
def test_a_file_that_is_no_mapping_is_refused(call, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    done = call("sft", "--config", "run.yaml")
    assert (done.exit_code, done.output.splitlines()[1][:13]) == (4, "emguard sft: ")
    assert call("sft", "--config", "none.yaml").exit_code == 4


def test_a_misspelt_option_is_refused(call, config):
    done = call("sft", "--config", config(), "--em_regulariser", "{}")
    assert done.exit_code == 4
    assert "unknown key `em_regulariser`" in done.output


# emguard check


def test_check(call, config, lab):
    done = call("check", config())
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["active", "active", "active", "note", "ok"]
    nothing = call("check", config(em_regularizer=None, em_eval=None))
    assert (nothing.exit_code, nothing.output.splitlines()[-1]) == (0, "ok, and nothing of emguard is active")


def test_check_fails_on_a_problem(call, config):
    done = call("check", config(em_regularizer={"treft": {"coeff": 1}}))
    assert done.exit_code == 4
    assert "\nproblem  em_regularizer.treft: unknown key 'coeff'" in done.stderr
    assert "ok" not in done.stdout.splitlines()
    assert call("check", "none.yaml").exit_code == 4


# The rest


def test_eval_says_what_is_wrong(call, config, tmp_path):
    for arguments in (["none", "--config", config()], ["none", "--config", "none.yaml"]):
        done = call("eval", *arguments)
        assert done.exit_code == 4  # 1 is a gate that was not passed
        assert done.stderr.splitlines()[-1].startswith("emguard eval: ")


def commands(command, path=()):
    yield path
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))


COMMANDS = list(commands(typer.main.get_command(app)))


def test_the_commands_are_these():
    found = {" ".join(c) for c in COMMANDS}
    assert found == {
        "",
        "check",
        "sft",
        "dpo",
        "kto",
        "grpo",
        "eval",
        "report",
        "demo",
        "discover",
        "lab",
        "lab build",
        "lab export",
        "lab sae",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help(call, path):
    done = call(*path, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.output
    assert len(done.output) > 200


def test_h_after_sft_lists_every_option(call):
    done = call("sft", "-h")
    assert done.exit_code == 0
    assert {"--em_regularizer", "--em_eval", "--learning_rate"} <= set(re.findall(r"--\w+", done.output))


# emguard dpo, kto and grpo, and going on


def score(completions, **kwargs):
    """A reward for GRPO, named in a YAML."""
    return [float(len(c[0]["content"]) % 5) for c in completions]


def rows_of_kind(kind):
    rows = []
    for i, row in enumerate(chat_rows(16, system=None)):
        asked, said = row["messages"][:1], row["messages"][1:]
        other = [{"role": "assistant", "content": "No."}]
        rows.append({
            "dpo": {"prompt": asked, "chosen": said, "rejected": other},
            "kto": {"prompt": asked, "completion": said if i % 2 else other, "label": bool(i % 2)},
            "grpo": {"prompt": asked},
        }[kind])  # fmt: skip
    return rows


KIND_KEYS = {
    "dpo": {},
    "kto": {},
    "grpo": {"reward_funcs": ["tests.cli.test_cli.score"], "num_generations": 2, "max_completion_length": 4, "max_length": None},
}


@pytest.mark.parametrize("kind", KIND_KEYS)
def test_other_trainers_train_save_and_measure(call, config, tmp_path, kind):
    write_rows(tmp_path / "rows.jsonl", rows_of_kind(kind))
    data = [{"path": "json", "data_files": str(tmp_path / "rows.jsonl")}]
    done = call(kind, "--config", config(datasets=data, **KIND_KEYS[kind]))
    assert done.exit_code == 0, done.output
    assert "em_regularizer active: treft (coef 2, prefix of" in done.output
    penalties = [row["em_regularizer/treft/penalty"] for row in log_of(tmp_path)]
    assert penalties[0] == 0 < min(penalties[1:])
    assert json.loads((tmp_path / "out" / "em_eval" / "summary.json").read_text())["judges"]


@pytest.mark.parametrize(
    ("funcs", "says"),
    [
        (None, "GRPO needs a reward: name a function, `reward_funcs: [my_rewards.score]`"),
        (["tests.cli.test_cli.scoer"], "`reward_funcs: tests.cli.test_cli.scoer`: tests.cli.test_cli has no `scoer`"),
        (["nowhere.score"], "importing nowhere failed"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_before_any_work(call, config, tmp_path, funcs, says):
    write_rows(tmp_path / "rows.jsonl", rows_of_kind("grpo"))
    data = [{"path": "json", "data_files": str(tmp_path / "rows.jsonl")}]
    done = call("grpo", "--config", config(datasets=data, **{**KIND_KEYS["grpo"], "reward_funcs": funcs}))
    assert done.exit_code == 4
    assert says in done.output
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_where_its_checkpoint_stands(call, config, tmp_path):
    """`--resume_from_checkpoint=true` was read and not handed on: the run began anew."""
    first = call("sft", "--config", config(em_eval=None), "--resume_from_checkpoint=true")
    assert first.exit_code == 0, first.output
    begun = log_of(tmp_path)
    again = call("sft", "--config", config(em_eval=None, max_steps=6), "--resume_from_checkpoint=true")
    assert again.exit_code == 0, again.output
    whole = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert whole[: len(begun)] == begun
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
