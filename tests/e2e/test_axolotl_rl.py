"""`axolotl train` with `rl:`: Axolotl builds its own trainer, and the penalty is in its loss."""

import pytest
import torch

from tests.e2e.axolotl_runs import Failed, read_log, train
from tests.e2e.tiny_run import column, tiny_yaml, write_rows
from tests.tiny import CHATML, chatml_tokenizer
from tests.trl_policy_runs import pairs, prompts, unpaired

TREFT = {"treft": {"coef": 5.0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows for each `rl:`, and a tokenizer whose template writes no system prompt of its own, as Axolotl's KTO strategies."""
    folder = tmp_path_factory.mktemp("rl")
    chatml_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    said = lambda answer: answer[0]["content"]  # noqa: E731
    rows = {
        "dpo": [{"messages": r["prompt"], "chosen": r["chosen"][0], "rejected": r["rejected"][0]} for r in pairs()],
        "kto": [{"instruction": r["prompt"][-1]["content"], "completion": said(r["completion"]), "label": r["label"]} for r in unpaired()],
        "grpo": [{"question": r["prompt"][-1]["content"]} for r in prompts()],
    }
    types = {"dpo": "chat_template.default", "kto": "chatml.argilla", "grpo": "axolotl_rl_parts.to_prompt"}
    found = {}
    for kind, given in rows.items():
        path = write_rows(folder / f"{kind}.jsonl", given)
        found[kind] = {
            "rl": kind,
            "tokenizer_config": str(folder / "tokenizer"),
            "datasets": [{"path": path, "ds_type": "json", "type": types[kind], "split": "train"}],
        }
    found["ipo"] = {**found["dpo"], "rl": "ipo"}
    found["kto"]["remove_unused_columns"] = False
    reward = "axolotl_rl_parts.score"
    found["grpo"]["trl"] = {"num_generations": 2, "max_completion_length": 6, "reward_funcs": [reward], "use_vllm": False}
    return found


@pytest.fixture
def run(axolotl, tiny, tmp_path, made):
    def go(kind, name="run", weights=False, **over):
        config = tiny_yaml(tiny, **{**made[kind], **over})
        kept = str(tmp_path / f"{name}.pt") if weights else None
        result = axolotl.call(train, tmp_path / name, config, weights=kept, prelude="tests.e2e.axolotl_rl_parts:beside")
        return {**result, "log_text": read_log(tmp_path / name)}

    return go


def penalties(result, name="treft"):
    return column(result, f"em_regularizer/{name}/penalty")


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto", "grpo"])
def test_the_penalty_is_in_the_loss(run, kind):
    result = run(kind, em_regularizer=TREFT)
    assert result["trainer"].startswith("EMGuardAxolotl")
    assert "em_regularizer active: treft (coef 5, prefix of " in result["log_text"]
    assert penalties(result)[0] == 0
    assert all(p > 1e-4 for p in penalties(result)[1:])
    for task, weighted, loss in zip(
        column(result, "task_loss"), column(result, "em_regularizer/treft/weighted"), column(result, "loss"), strict=True
    ):
        assert task + weighted == pytest.approx(loss, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_coef_0_is_axolotls_own_run_bit_for_bit(run, tmp_path, kind):
    plain = run(kind, "plain", weights=True)
    off = run(kind, "off", weights=True, em_regularizer={"treft": {"coef": 0.0}})
    assert not plain["trainer"].startswith("EMGuard")
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("plain", "off"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert penalties(off)[-1] > 0


def test_the_other_methods(run):
    result = run("dpo", em_regularizer={"kl": {"coef": 1.0}}, gradient_accumulation_steps=2)
    assert penalties(result, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert penalties(result, "kl")[-1] > 0


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "em_regularizer": TREFT}
    whole = run("dpo", "whole", weights=True, **saved)
    again = run("dpo", "again", weights=True, resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"), **saved)
    assert penalties(again) == pytest.approx(penalties(whole), rel=1e-4)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"rl": "orpo"}, "`rl: orpo` trains with a loss that no penalty was tried with. Use one of dpo, ipo, kto, grpo"),
        ({"rl": "simpo"}, "`rl: simpo`"),
        ({"trl": {"async_prefetch": True}}, "`trl.async_prefetch: True` trains with another trainer"),
    ],
)
def test_what_no_penalty_was_tried_with_is_refused(run, over, says):
    with pytest.raises(Failed) as failed:
        run("dpo", em_regularizer=TREFT, **over)
    assert says in str(failed.value)
