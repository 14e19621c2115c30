"""What only reads files answers at once, and loads nothing that takes seconds; Ctrl-C is one line."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import yaml

from emguard_plugin.lab.export import export

HEAVY = ("torch", "transformers", "axolotl", "datasets", "peft", "trl", "sae_lens", "statsmodels", "pandas", "scipy")
RUN = "import sys\nfrom emguard_plugin.cli import main\ntry:\n    main()\nfinally:\n    print('LOADED', *[m for m in {!r} if m in sys.modules])"
EVAL = {
    "questions": "lab/questions.yaml",
    "samples_per_question": 1,
    "max_new_tokens": 8,
    "evaluate_base": False,
    "judges": [{"provider": "exact", "function": "emguard_plugin.lab.judge:judge_answer"}],
}


def cpu_of(folder, *arguments):
    """Run a command; return its result, what it loaded, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(HEAVY), *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},  # a user's machine compiles a library once, not at each command
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = done.stdout.rsplit("LOADED", 1)[1].split() if "LOADED" in done.stdout else None
    return done, loaded, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    export(folder / "lab")
    (folder / "eval.yaml").write_text(yaml.safe_dump({"em_eval": EVAL}))
    done, loaded, _ = cpu_of(folder, "eval", "lab/model", "--config", "eval.yaml")
    assert done.returncode == 0, done.stderr
    assert "torch" in loaded
    return folder


@pytest.mark.parametrize("command", [["--help"], ["eval", "--help"], ["demo", "--help"], ["check", "--help"], ["discover", "--help"]])
def test_help(tmp_path, command):
    done, loaded, cpu = cpu_of(tmp_path, *command)
    assert done.returncode == 0
    assert loaded == []
    assert cpu <= 0.5 * 2  # the limit on an idle machine, and as much again for a busy one


def test_a_finished_evaluation_is_shown_from_its_files(measured):
    done, loaded, cpu = cpu_of(measured, "eval", "lab/model", "--config", "eval.yaml")
    assert done.returncode == 0, done.stderr
    assert "EM rate" in (measured / "lab/model/em_eval/report.html").read_text()
    assert loaded == []
    assert cpu <= 2 * 2


@pytest.mark.parametrize("change", ["answers", "template", "weights"])
def test_what_is_not_finished_is_measured_with_the_model_at_hand(measured, tmp_path, change):
    """Another template or other weights are refused, as ever; a lost answer is drawn again."""
    import shutil

    shutil.copytree(measured / "lab", tmp_path / "lab")
    (tmp_path / "eval.yaml").write_text((measured / "eval.yaml").read_text())
    model = tmp_path / "lab" / "model"
    if change == "answers":
        lines = (model / "em_eval" / "responses.jsonl").read_text().splitlines(keepends=True)
        (model / "em_eval" / "responses.jsonl").write_text("".join(lines[:-1]))
    elif change == "template":
        place = model / "chat_template.jinja"
        place.write_text(place.read_text() + "{# another #}")
    else:
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    done, loaded, _ = cpu_of(tmp_path, "eval", "lab/model", "--config", "eval.yaml")
    assert "transformers" in loaded
    assert done.returncode == (0 if change == "answers" else 4), done.stderr
    if change == "answers":
        assert len((model / "em_eval" / "responses.jsonl").read_text().splitlines()) == len(lines)


def test_a_report_is_made_from_files(measured, tmp_path):
    done, loaded, cpu = cpu_of(tmp_path, "report", str(measured / "lab/model/em_eval"))
    assert done.returncode == 0, done.stderr
    assert loaded == []
    assert cpu <= 2 * 2
    again, *_ = cpu_of(tmp_path, "report", str(measured / "lab/model/em_eval"))
    assert again.returncode == 0, "its own page is replaced"
    (tmp_path / "report.html").write_text("my thesis")
    refused, *_ = cpu_of(tmp_path, "report", str(measured / "lab/model/em_eval"))
    assert refused.returncode == 4
    assert (tmp_path / "report.html").read_text() == "my thesis"


def started(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "emguard_plugin.cli", *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip


def test_it_says_at_once_that_it_is_at_work(measured):
    begun = time.monotonic()
    process = started(measured, "eval", "lab/model", "--config", "eval.yaml", "--output-dir", "new")
    line = process.stderr.readline()
    took = time.monotonic() - begun
    process.kill()
    process.communicate()
    assert line == "emguard: measuring; what is found lies in new ...\n"
    assert took < 1 * 3  # and slack for a busy machine


@pytest.mark.parametrize("moment", ["loading", "answering"])
def test_ctrl_c_says_what_is_kept_and_what_goes_on(measured, tmp_path, moment):
    arguments = ("eval", str(measured / "lab/model"), "--config", "eval.yaml", "--output-dir", str(tmp_path / "out"))
    (measured / "eval.yaml").write_text(yaml.safe_dump({"em_eval": {**EVAL, "samples_per_question": 200}}))
    process = started(measured, *arguments)
    process.stderr.readline()
    answers = tmp_path / "out" / "responses.jsonl"
    deadline = time.monotonic() + 120
    while moment == "answering" and not (answers.is_file() and answers.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    (measured / "eval.yaml").write_text(yaml.safe_dump({"em_eval": EVAL}))
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert err.rstrip().splitlines()[-1] == (
        f"emguard eval: interrupted. What was answered and judged is kept. To go on: emguard {' '.join(arguments)}"
    )
    assert moment == "loading" or (os.path.getsize(answers) > 0)


SLOW = """
import time

def judge(question, answer):
    time.sleep(0.05)
    return {"aligned": 90, "coherent": 90}
"""


def test_ctrl_c_while_judging_keeps_what_was_judged(measured, tmp_path):
    """The answers are not drawn again, and no answer is judged twice."""
    (tmp_path / "slow.py").write_text(SLOW)
    judge = {"provider": "exact", "function": "slow:judge"}
    (tmp_path / "eval.yaml").write_text(
        yaml.safe_dump(
            {"em_eval": {**EVAL, "questions": str(measured / "lab/questions.yaml"), "samples_per_question": 1, "judges": [judge]}}
        )
    )
    arguments = ("eval", str(measured / "lab/model"), "--config", "eval.yaml", "--output-dir", "out")
    process = started(tmp_path, *arguments)
    judgments = tmp_path / "out" / "judgments.jsonl"
    deadline = time.monotonic() + 120
    while not (judgments.is_file() and judgments.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.rstrip().splitlines()[-1].endswith(f"To go on: emguard {' '.join(arguments)}")
    kept, answers = judgments.read_text().splitlines(), (tmp_path / "out" / "responses.jsonl").read_text()
    number = len(answers.splitlines())
    assert 0 < len(kept) < number
    done, *_ = cpu_of(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "responses.jsonl").read_text() == answers
    assert judgments.read_text().splitlines()[: len(kept)] == kept
    assert len(judgments.read_text().splitlines()) == number


AXOLOTL = {
    "base_model": "lab/model",
    "adapter": "lora",
    "plugins": ["emguard_plugin.EMGuardPlugin"],
    "datasets": [{"path": "x", "type": "chat_template"}],
}


@pytest.mark.parametrize("case", ["nothing asked", "kl", "a fault"])
def test_check_is_quick_where_no_tokenizer_is_needed(measured, case):
    block = {"nothing asked": {}, "kl": {"em_regularizer": {"kl": {"coef": 1.0}}}, "a fault": {"em_regularizer": {"treft": {"coeff": 1}}}}[
        case
    ]
    (measured / "check.yaml").write_text(yaml.safe_dump({**AXOLOTL, **block}))
    done, loaded, cpu = cpu_of(measured, "check", "check.yaml")
    assert done.returncode == (4 if case == "a fault" else 0), done.stderr
    assert done.stderr.startswith("emguard: reading check.yaml ...")
    assert loaded == []
    assert cpu <= 3


def test_check_does_not_import_axolotl_for_a_tokenizer_either(measured):
    (measured / "check.yaml").write_text(yaml.safe_dump({**AXOLOTL, "em_regularizer": {"treft": {}}}))
    done, loaded, _ = cpu_of(measured, "check", "check.yaml")
    assert done.returncode == 0, done.stderr
    assert "treft holds 16 tokens" in done.stdout
    assert "axolotl" not in loaded


def test_check_says_that_a_latent_set_is_missing_without_loading_torch(measured):
    (measured / "check.yaml").write_text(yaml.safe_dump({**AXOLOTL, "em_regularizer": {"block_em": {"latents": "./none.json"}}}))
    done, loaded, cpu = cpu_of(measured, "check", "check.yaml")
    assert done.returncode == 4
    assert "`em_regularizer.block_em.latents: ./none.json` does not exist" in done.stderr
    assert loaded == []
    assert cpu <= 3


def test_check_reads_a_latent_set_without_loading_torch(measured):
    (measured / "check.yaml").write_text(yaml.safe_dump({**AXOLOTL, "em_regularizer": {"block_em": {"latents": "lab/latents.json"}}}))
    done, loaded, cpu = cpu_of(measured, "check", "check.yaml")
    assert done.returncode == 0, done.stderr
    assert "latents of K+ and" in done.stdout
    assert loaded == []
    assert cpu <= 3
