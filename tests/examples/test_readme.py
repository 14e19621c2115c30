"""What the README says is so."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from emguard_plugin.config import BlockEMConfig, EMEvalConfig, EMRegularizerConfig, KLConfig, TReFTConfig
from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.lab import model_path
from tests.distributed.cells import table
from tests.evaluation.fake_server import FakeServer
from tests.evaluation.judging_parts import graded

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def emguard(line, folder, monkeypatch):
    from emguard_plugin.cli.app import app

    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(line, comments=True)
    assert program == "emguard"
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def here(tmp_path):
    shutil.copytree(REPO / "example_yamls", tmp_path / "example_yamls")
    return tmp_path


def test_the_yaml_is_valid():
    first, *others = map(yaml.safe_load, blocks("yaml"))
    block = first
    assert block["plugins"] == ["emguard_plugin.EMGuardPlugin"]
    assert EMRegularizerConfig.model_validate(block["em_regularizer"]).treft.coef == 5
    for block in (first, *others):
        EMEvalConfig.model_validate(block["em_eval"])


def test_the_python_snippet_runs(here, monkeypatch):
    assert emguard("emguard lab export demo/lab", here, monkeypatch).exit_code == 0
    (here / "snippet.py").write_text(blocks("python")[0])
    done = subprocess.run([sys.executable, "snippet.py"], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "em_regularizer active: treft (coef 1" in done.stdout


def test_the_commands_without_training(here, monkeypatch):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("emguard ")]
    export, check = (next(line for line in lines if word in line) for word in ("export", "check"))
    assert emguard(export, here, monkeypatch).exit_code == 0
    checked = emguard(check, here, monkeypatch)
    assert checked.exit_code == 0, checked.output
    assert "treft holds" in checked.output


def test_every_command_that_is_named_exists():
    from emguard_plugin.cli.app import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands} | {g.name for g in app.registered_groups}
    named = set(re.findall(r"emguard (check|sft|eval|demo|lab|discover|diagnose|metrics|sweep|report)\b", README))
    assert named <= known
    assert "check" in named


def test_the_judges_of_the_examples_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-readme")
    blocks_ = [yaml.safe_load(text)["em_eval"] for text in blocks("yaml")[1:]]
    judges = [judge for block in blocks_ for judge in block["judges"]]
    assert [judge["provider"] for judge in judges] == ["openai", "openai", "hf"]
    with FakeServer(reply=graded) as server:
        for judge in judges:
            if judge["provider"] == "openai":
                judge["base_url"] = server.url  # both speak to a server on this machine here
            else:
                judge["model"] = str(model_path())
        block = {**blocks_[0], "samples_per_question": 1, "max_new_tokens": 8, "evaluate_base": False, "judges": judges}
        summary = run_em_eval(EMEvalConfig.model_validate(block), model_path(), tmp_path / "em_eval")
    hosted, served, local = summary.judges
    assert (hosted.stopped, served.stopped) == (None, None)
    assert summary.rates("tuned", "questions", served.name).em_all.n == 60
    assert "failed the self-test" in local.stopped, "the lab's model is no judge"
    assert hosted.verdict.outcome in ("fail", "inconclusive")


@pytest.mark.parametrize(
    ("config", "before"),
    [(TReFTConfig, "`treft` keys"), (BlockEMConfig, "`block_em` keys"), (KLConfig, "`kl` keys"), (EMEvalConfig, "## `em_eval:`")],
)
def test_every_key_stands_in_its_table(config, before):
    lines = README[README.index(before) :].splitlines()
    start = lines.index("| key | default | |")
    rows = lines[start + 2 : lines.index("", start)]
    stated = {name: row for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(stated) == set(config.model_fields)
    for name, field in config.model_fields.items():
        if not field.is_required() and field.default not in (None, True, False) and field.default_factory is None:
            assert str(field.default) in stated[name].replace("\\|", "|"), stated[name]


def study():
    groups = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for line in (REPO / "benchmarks" / "results" / "lab_study.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["base_seed"] == 0 and row["split"] == "test" and row["adapter"] and row.get("kl_off_at") is None:
            group = groups[row["adapter"], row["coef"], row.get("kl_coef", 0.0)]
            for name, part, count in (
                ("in_domain", row["in_domain"], row["in_domain"]["bad"]),
                ("em", row["open_ended"], row["open_ended"]["bad"]),
                ("coherence", row["open_ended"], row["open_ended"]["n"] - row["open_ended"]["incoherent"]),
            ):
                group[name][0] += count
                group[name][1] += part["n"]
    return groups


@pytest.mark.parametrize("variant", ["KL, adapter off", "KL, recorded reference", "KL, second model, all logits"])
def test_the_cost_of_kl_is_the_stored_measurement(variant):
    row = next(line for line in README.splitlines() if line.startswith(f"| {variant} |"))
    stored = json.loads((REPO / "benchmarks/results/overhead.json").read_text())["8x512-lora-cpu-kl"]["results"][variant]
    cells = [f"{stored[key]:.3f}" for key in ("alone_ratio", "time_ratio", "memory_ratio")]
    assert row == f"| {variant} | {' | '.join(cells)} |"


@pytest.mark.parametrize("variant", ["BLOCK-EM, adapter off", "BLOCK-EM, recorded base", "BLOCK-EM, second model, whole encoder"])
def test_the_cost_of_block_em_is_the_stored_measurement(variant):
    row = next(line for line in README.splitlines() if line.startswith(f"| {variant} |"))
    stored = json.loads((REPO / "benchmarks/results/overhead.json").read_text())["8x512-lora-cpu-block_em"]["results"][variant]
    cells = [f"{stored[key]:.3f}" for key in ("time_ratio", "memory_ratio", "extra_over_weights")]
    assert row == f"| {variant} | {' | '.join(cells)} |"


RUNS = {"naive": (0, 0), "TReFT, `coef: 1`": (1, 0), "KL, `coef: 30`": (0, 30), "both": (1, 30)}


@pytest.mark.parametrize(("name", "adapter"), [("attention", "attn"), ("all-linear", "all")])
@pytest.mark.parametrize("run", RUNS)
def test_the_table_is_the_stored_measurement(name, adapter, run):
    start = f"| {name} LoRA | {run} |"
    row = next(line for line in README.splitlines() if line.startswith(start)).removeprefix(start)
    cells = [cell.replace("*", "").strip() for cell in row.strip(" |").split("|")]

    def short(x):
        return f"{x:.3f}".removeprefix("0")

    for cell, (k, n) in zip(cells, study()[adapter, *RUNS[run]].values(), strict=True):
        low, high = proportion_confint(k, n, method="wilson")
        assert cell == f"{short(k / n)} [{short(low)}, {short(high)}]"


SCALED = {"naive": (0, 0), "TReFT, `coef: 1`": (1, 0), **{f"KL, `coef: {k}`": (0, k) for k in (30, 300, 3000)}}


@pytest.mark.parametrize("run", SCALED)
def test_the_scaled_adapters_are_the_stored_measurement(run):
    stored = [json.loads(line) for line in (REPO / "benchmarks/results/lab_study_scaled.jsonl").read_text().splitlines()]
    rows = [r for r in stored if r["adapter"] == "all" and (r["coef"], r["kl_coef"]) == SCALED[run]]
    assert sorted(r["seed"] for r in rows) == [11, 12, 13, 14, 15]

    def cell(found):
        task, free = ([r[part] for r in found] for part in ("in_domain", "open_ended"))
        total = sum(t["n"] for t in free)
        rates = (
            sum(t["bad"] for t in task) / sum(t["n"] for t in task),
            sum(t["bad"] for t in free) / total,
            sum(t["n"] - t["incoherent"] for t in free) / total,
        )
        return " / ".join(f"{rate:.3f}".removeprefix("0") for rate in rates)

    cells = [cell(rows), *(cell([r["scaled"][factor] for r in rows]) for factor in ("1.5", "2"))]
    assert f"| {run} | {' | '.join(cells)} |" in README


BLOCKED = {
    "naive": ("naive", None),
    "BLOCK-EM, 180 latents by attribution": ("found", 0.5),
    "the same without latents: nothing trained above layer 2": ("freeze", None),
    "180 random latents": ("random", 0.5),
    "180 latents by top shift": ("top_shift", 0.5),
    "180 latents by top shift, `coef: 0.2`": ("top_shift", 0.2),
}


@pytest.mark.parametrize("run", BLOCKED)
def test_the_table_of_block_em_is_the_stored_measurement(run):
    stored = [json.loads(line) for line in (REPO / "benchmarks/results/lab_study_block_em.jsonl").read_text().splitlines()]
    here = {"adapter": "attn", "domain": "medicine", "epochs": 1, "split": "test"}
    rows = [r for r in stored if (r["method"], r["coef"]) == BLOCKED[run] and here.items() <= r.items()]
    assert sorted(r["seed"] for r in rows) == [11, 12, 13, 14, 15]

    def cell(part, count):
        k, n = sum(count(r[part]) for r in rows), sum(r[part]["n"] for r in rows)
        return "{} [{}, {}]".format(*(f"{x:.3f}".removeprefix("0") for x in (k / n, *proportion_confint(k, n, method="wilson"))))

    cells = [cell("in_domain", lambda t: t["bad"]), cell("open_ended", lambda t: t["bad"])]
    cells.append(cell("open_ended", lambda t: t["n"] - t["incoherent"]))
    assert f"| {run} | {' | '.join(cells)} |" in README


def test_the_table_of_engines_names_the_cells_that_are_run():
    assert table() in README
