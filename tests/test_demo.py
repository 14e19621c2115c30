"""What `emguard demo` reads from the log of `axolotl train`. The demo itself runs in tests/e2e."""

import pytest

from emguard_plugin.demo import RUNS, _progress, _seconds_per_step, examples

HEAD = (
    "\n     #@@ #@@      @@# @@#\nTokenizing Prompts:   0%|          | 0/1920 [00:00<?, ? examples/s]\n"
    "Tokenizing Prompts: 100%|██████████| 1920/1920 [00:01<00:00, 1290.11 examples/s]\n"
    "[2026-11-21 06:11:58,101] [INFO] [axolotl.utils.data.sft] Loading raw datasets...\n"
    "Loading weights: 100%|██████████| 38/38 [00:00<00:00, 9056.91it/s]\n"
)
START = "[2026-11-21 06:12:01,971] [INFO] [axolotl.train] Starting trainer...\n\n  0%|          | 0/120 [00:00<?, ?it/s]\n"
METRICS = "{'loss': '0.5336', 'em_regularizer/treft/penalty': '0.0021', 'tokens/trainable': 2763, 'epoch': '0.08333'}\n\n"
END = (
    "{'train_runtime': '15.4', 'train_steps_per_second': '7.795', 'train_loss': '0.2656', 'epoch': '1'}\n\n"
    "100%|██████████| 120/120 [00:15<00:00,  7.80it/s]\n"
    "[2026-11-21 06:12:18,252] [INFO] [axolotl.train] Training completed! Saving trained model to ./demo/naive.\n"
)


def bar(step, rate="8.00it/s", total=120, spent="00:01"):
    return f"{100 * step // total:3d}%|▊         | {step}/{total} [{spent}<00:14,  {rate}]\n"


def trained(steps):
    return HEAD + START + "".join(bar(s) + (METRICS if s % 10 == 0 else "") for s in range(1, steps + 1))


def answers(role, done):
    return f"em_eval: {role} answers:  27%|██▋       | {done}/960 [00:01<00:04, 160.24answer/s]\n"


def progress(text):
    return _progress(text.encode())


def test_before_training():
    for text in ("", HEAD[:40], HEAD, HEAD + "warning\n" * 30):
        percent, stage = progress(text)
        assert 0 <= percent <= 20
        assert stage == "loading model and data"
    assert progress(HEAD + "warning\n" * 30)[0] > progress(HEAD)[0]


@pytest.mark.parametrize("step", [1, 30, 120])
def test_while_training(step):
    assert progress(trained(step)) == (20 + 40 * step / 120, f"training, step {step} of 120")


def test_the_bars_of_loading_are_not_training():
    start = START.splitlines(keepends=True)[0]
    assert progress(HEAD + start)[1] == "loading model and data"


def test_while_measuring():
    done = trained(120) + END
    assert progress(done) == (60, "measuring the EM rate")
    noise = "[transformers] a long warning of one library or another\n" * 80
    stages = [progress(done + noise + answers("base", n)) for n in (0, 480, 896)]
    assert {s for _, s in stages} == {"measuring the EM rate"}
    assert 60 <= stages[0][0] < stages[1][0] < stages[2][0] <= 100


def test_the_bar_never_goes_back():
    """Through a whole log, cut anywhere."""
    log = trained(120) + END + "\n" * 5000
    log += "".join(answers(role, n) for role in ("base", "tuned") for n in range(0, 961, 64))
    seen = [_progress(log.encode()[:i])[0] for i in range(0, len(log.encode()), 61)]
    assert seen == sorted(seen)
    assert seen[-1] > 95


def write(tmp_path, text):
    path = tmp_path / "run.log"
    path.write_text(text, encoding="utf-8")
    return path


def test_seconds_per_step_are_those_of_training_alone(tmp_path):
    assert _seconds_per_step(write(tmp_path, trained(120) + END + answers("base", 960))) == pytest.approx(1 / 8)


def test_seconds_per_step_are_a_median(tmp_path):
    rates = ["2.00s/it", *["4.00it/s"] * 3, "50.00it/s"]
    log = HEAD + START + "".join(bar(i + 1, r) for i, r in enumerate(rates)) + END
    assert _seconds_per_step(write(tmp_path, log)) == pytest.approx(1 / 4)
    slow = HEAD + START + bar(1, "2.50s/it") + bar(2, "2.00s/it", spent="1:02:03") + bar(3, "3.00s/it") + END
    assert _seconds_per_step(write(tmp_path, slow)) == pytest.approx(2.5)


def test_the_examples_are_found():
    assert all((examples() / name).is_file() for name in RUNS.values())
