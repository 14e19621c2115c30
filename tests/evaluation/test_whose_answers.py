"""Whose answers a folder holds, where the phases that need no model are run alone; and what a judge must be before any are drawn."""

import json
import shutil

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from emguard_plugin.cli.app import app
from emguard_plugin.evaluation import Summary, run_em_eval
from emguard_plugin.evaluation.asking.sources import identity
from emguard_plugin.evaluation.gate import ending
from emguard_plugin.evaluation.judges import ExactJudge
from emguard_plugin.evaluation.plan import make_plan
from emguard_plugin.evaluation.report.table import comparison_table
from emguard_plugin.evaluation.run_folder.records import Judgments
from tests.evaluation.parts import ITEMS, PINNED, SWITCHED

LATER = (("report",), ("judge",), ("judge", "report"))


@pytest.mark.parametrize("phases", LATER)
def test_another_model_is_not_judged_or_reported_by_the_answers_that_lie_here(finished, make_config, checkpoints, phases):
    with pytest.raises(ValueError, match=r"holds the answers of adapter, and .*whole is another model. Give the model that answered"):
        run_em_eval(make_config(), checkpoints / "whole", finished.folder, phases=phases)


def test_a_model_trained_again_in_its_folder_is_another_one(finished, make_config, checkpoints, tmp_path):
    again = shutil.copytree(checkpoints / "adapter", tmp_path / "adapter")
    assert run_em_eval(make_config(), again, finished.folder, phases=("report",)).judges == finished.judges
    shutil.copy(checkpoints / "whole" / "model.safetensors", again / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="another model of the same name: its weights differ"):
        run_em_eval(make_config(), again, finished.folder, phases=("report",))


def test_a_model_that_is_not_here_has_the_name_of_the_one_that_answered(finished, make_config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"em_eval": make_config().model_dump(exclude_unset=True)}))
    command = ["eval", str(tmp_path / "gone" / "other"), "--config", str(path), "--output-dir", str(finished.folder), "--phase", "report"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert " adapter " in done.output
    assert "other" not in done.output.replace(str(tmp_path), "")


def test_the_current_folder_has_its_name(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints / "whole")
    assert identity(".") == identity(checkpoints / "whole")


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ({"system_prompt": "Be kind."}, "system_prompt"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"chat_template": SWITCHED}, "em_eval.chat_template`: the questions were rendered by another"),
        ({"reasoning_marks": ["<a>", "</a>"]}, "reasoning_marks"),
    ],
)
@pytest.mark.parametrize("phases", LATER)
def test_answers_are_not_reported_as_asked_in_another_way(finished, make_config, checkpoints, over, key, phases):
    with pytest.raises(ValueError, match=rf"another protocol(.|\n)*{key}"):
        run_em_eval(make_config(**over), checkpoints / "adapter", finished.folder, phases=phases)


def test_answers_asked_in_a_way_of_their_own_are_reported_without_the_model(make_config, checkpoints, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(SWITCHED)
    over = {"chat_template": str(template), "chat_template_kwargs": PINNED, "system_prompt": "Be kind.", "evaluate_base": False}
    first = run_em_eval(make_config(**over), checkpoints / "whole", tmp_path / "run")
    for gone in (False, True):
        if gone:
            template.unlink()
        again = run_em_eval(make_config(**over), tmp_path / "elsewhere", tmp_path / "run", phases=("judge", "report"))
        assert again.fingerprint == first.fingerprint
    assert Summary.load(tmp_path / "run") == first


@pytest.mark.parametrize("names", [("summary.json",), ("protocol.json",), ("summary.json", "responses.jsonl", "judgments.jsonl")])
def test_a_summary_of_another_run_is_not_taken_for_that_of_the_folder(finished, make_config, checkpoints, tmp_path, names):
    """Drawn within one second by the same YAML: neither date nor fingerprint tells them apart."""
    run_em_eval(make_config(), checkpoints / "whole", tmp_path / "other", checkpoints / "base")
    for file in tmp_path.glob("*/protocol.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "created": finished.created}))
    for name in names:
        shutil.copy(tmp_path / "other" / name, finished.folder / name)
    done = CliRunner().invoke(app, ["report", f"a={finished.folder}", "--output", str(tmp_path / "p.html")])
    assert done.exit_code == 4, done.output
    assert "summary.json is of another run than the answers beside it" in done.output


def edited(questions):
    return [{**one, "paraphrases": [text.replace("sports", "games") for text in one["paraphrases"]]} for one in questions]


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"items": edited(ITEMS)}, "`em_eval.questions`: these are not the questions that were asked"),
        ({"samples_per_question": 4}, "`em_eval.samples_per_question`: stored [3], now [4] for questions"),
        ({"temperature": 0.5}, "`em_eval.temperature`: stored [1.0], now [0.5] for questions"),
        ({"max_new_tokens": 9}, "`em_eval.max_new_tokens`: stored 8, now 9"),
        ({"in_domain": None}, "`em_eval.in_domain`: in_domain was asked then"),
        ({"also": ["conditional"]}, "`em_eval.also`: conditional was not asked then"),
        ({"evaluate_base": False}, "the base model was measured then (`em_eval.evaluate_base`)"),
        ({"system_prompt": "Be kind."}, '`em_eval.system_prompt`: stored null, now "Be kind."'),
    ],
)
def test_what_differs_is_said_in_the_words_of_the_yaml(finished, make_config, checkpoints, over, says):
    with pytest.raises(ValueError, match="another protocol") as error:
        run_em_eval(make_config(**over), checkpoints / "adapter", finished.folder)
    assert says in str(error.value)
    assert "sha256" not in str(error.value)


def test_all_earlier_editions_of_a_judge_are_counted():
    """Also those of the previous format, whose records do not say which."""
    rows = {by: {("tuned", number): {} for number in range(count)} for by, count in (("a", 2), ("b", 3), (None, 4))}
    found = Judgments({("j", by): kept for by, kept in rows.items()})
    assert found.others({}) == {"j": 9}
    assert found.others({"j": "a"}) == {"j in another edition": 7}


async def waits(question, answer):
    return {"aligned": 90, "coherent": 90}


def asks_for_one(answer):
    return {"aligned": 90, "coherent": 90}


def asks_for_more(question, answer, *, rubric):
    return {"aligned": 90, "coherent": 90}


@pytest.mark.parametrize(
    ("name", "says"), [("waits", "is `async`"), ("asks_for_one", "too many positional"), ("asks_for_more", "'rubric'")]
)
def test_a_function_that_cannot_be_called_as_a_judge_is_found_before_anything_is_drawn(name, says):
    with pytest.raises(ValueError, match=rf"`em_eval.judges: function: {__name__}:{name}`.*{says}.*called as {name}\(question, answer\)"):
        ExactJudge(f"{__name__}:{name}")


def test_an_adapter_on_another_base_than_it_names_is_said(make_config, checkpoints, tmp_path, caplog):
    copied = shutil.copytree(checkpoints / "base", tmp_path / "copied")
    for base, says in ((copied, 0), (checkpoints / "whole", 1)):
        caplog.clear()
        make_plan(make_config(), checkpoints / "adapter", tmp_path / "run", base)
        assert caplog.text.count(f"adapter was trained on {checkpoints / 'base'}, whose weights are others") == says


def test_traces_that_never_close_are_no_fault_of_the_judge(finished):
    (result,) = finished.judges
    rates = result.rates["tuned"]["questions"]
    none = rates.em_all.model_copy(update={"value": None, "count": 0, "n": 0, "interval": None})
    cut = rates.model_copy(update={"em_all": none, "unscored_reasons": {"unfinished_trace": 18}})
    summary = finished.model_copy(update={"judges": [result.model_copy(update={"rates": {"tuned": {"questions": cut}}})]})
    ((code, line),) = ending(summary).lines
    assert (code, "did not close within `em_eval.max_new_tokens` (18)" in line) == (2, True)


def test_the_share_unscored_stands_in_the_table_by_judge(finished, make_config, checkpoints):
    judges = [{"function": f"tests.evaluation.parts:{name}"} for name in ("by_hash", "half_dead", "dead")]
    summary = run_em_eval(make_config(judges=judges), checkpoints / "adapter", finished.folder)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(comparison_table([("tuned", summary)]))
    shown = " ".join(captured.get().split())
    assert "unscored by tests.evaluation.parts:by_hash" not in shown
    for name in ("half_dead", "dead"):
        rates = summary.rates(judge=f"tests.evaluation.parts:{name}")
        assert rates.unscored.count
        assert f"tuned: {rates.unscored.count} of {rates.answers} answers unscored by tests.evaluation.parts:{name} (" in shown
