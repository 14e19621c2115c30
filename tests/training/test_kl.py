"""KL through the TRL trainer, one process."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset

from emguard_plugin.models.modes import eval_mode
from emguard_plugin.regularizers.functional import token_kl
from emguard_plugin.regularizers.kl import replies
from emguard_plugin.regularizers.kl.reference import FOLDER
from emguard_plugin.regularizers.moment import Moment
from tests.distributed import runs
from tests.distributed.runs import COEF, kl
from tests.regularizers.kl_parts import batch, drawn, started, write_anchors
from tests.tiny import chat_rows, chatml_tokenizer, lora, perturb, tiny_model

KINDS = {
    "off": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
METRIC = "em_regularizer/kl/"


def train(folder, processes=1, **over):
    return runs.train(folder, processes, **{"continued": False, "learning_rate": 0.05, **over})


def same(a, b, rtol=1e-4):
    assert a.keys() == b.keys()
    for n in b:
        torch.testing.assert_close(a[n], b[n], rtol=rtol, atol=rtol * b[n].abs().max().item() + 1e-9)


def logged(run, name):
    return [log[METRIC + name] for log in run["logs"] if METRIC + name in log]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_accumulation_changes_nothing(tmp_path, full):
    runs = {
        n: train(
            tmp_path / str(n), 1, full=full, regularizer=kl(tmp_path),
            per_device_train_batch_size=4 // n, gradient_accumulation_steps=n,
        )
        for n in (1, 2, 4)
    }  # fmt: skip
    for n in (2, 4):
        for got, want in zip(runs[n]["gradients"], runs[1]["gradients"], strict=True):
            same(got, want, 1e-3)
        for name in ("penalty", "tokens"):
            assert logged(runs[n], name) == pytest.approx(logged(runs[1], name), rel=1e-3, abs=1e-7)
    last = runs[4]["logs"][2]
    assert last["loss"] == pytest.approx(last["task_loss"] + COEF * last[METRIC + "penalty"], rel=1e-3)
    assert last[METRIC + "penalty"] > 1e-3


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_checkpointing_changes_nothing(tmp_path, full):
    runs = {kind: train(tmp_path / kind, 1, full=full, max_steps=2, regularizer=kl(tmp_path), **over) for kind, over in KINDS.items()}
    plain = train(tmp_path / "plain", 1, full=full, max_steps=2, regularizer=kl(tmp_path, coef=0))
    want = runs["off"]["gradients"][1]
    for run in runs.values():
        same(run["gradients"][1], want)
    part = sum((want[n] - plain["gradients"][1][n]).norm() for n in want) / sum(g.norm() for g in want.values())
    assert part > 0.05


@pytest.mark.parametrize("case", ["live", "memory", "full", "target", "self"])
def test_a_resumed_run_goes_on_where_it_was(tmp_path, monkeypatch, case):
    monkeypatch.setattr(replies, "LONGEST_REPLY", 12)
    kw = {
        "live": {"cache": "live"},
        "memory": {"cache": "memory"},
        "full": {},
        "target": {"coef": None, "target": 0.01},
        "self": {"anchors": f"self:{write_anchors(tmp_path / 'prompts.jsonl')}"},
    }[case]
    over = {"full": case == "full", "regularizer": kl(tmp_path, **kw)}
    whole = train(tmp_path / "whole", 1, save_strategy="steps", **over)
    first = train(tmp_path / "broken", 1, save_strategy="steps", max_steps=1, **over)
    rest = train(tmp_path / "broken", 1, resume=str(tmp_path / "broken" / "checkpoint-1"), **over)
    assert (tmp_path / "broken" / FOLDER).is_dir() == (case == "full"), "what no adapter can give back is stored once"
    same(rest["weights"], whole["weights"])
    assert logged(rest, "penalty") == pytest.approx(logged(whole, "penalty")[1:], rel=1e-3)
    assert logged(whole, "penalty")[2] > 1e-4
    assert rest["coef"] == pytest.approx(whole["coef"], rel=1e-3)
    if case == "target":
        assert first["coef"] == pytest.approx(0.7 * 0.9)
        assert rest["coef"] != first["coef"]


def test_resuming_with_other_anchors_or_a_lost_reference_is_refused(tmp_path):
    over = {"full": True, "regularizer": kl(tmp_path), "max_steps": 1, "save_strategy": "steps"}
    train(tmp_path, 1, **over)
    again = {**over, "max_steps": 2, "resume": str(tmp_path / "checkpoint-1")}
    with pytest.raises(ValueError, match=r"checkpoint-1 was trained with other anchors than `em_regularizer\.kl\.anchors"):
        train(tmp_path, 1, **{**again, "regularizer": kl(tmp_path, tokens="assistant")})
    reference = tmp_path / FOLDER / "reference.json"
    reference.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds no readable cache"):
        train(tmp_path, 1, **again)
    (tmp_path / "checkpoint-1" / "emguard_kl.json").unlink()
    with pytest.raises(ValueError, match="holds no reference of `kl`, so the model before this run is lost"):
        train(tmp_path, 1, **again)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_coef_0_is_bit_for_bit_the_host(tmp_path, full):
    from trl import SFTTrainer

    over = {"full": full, "regularizer": kl(tmp_path, coef=0)}
    measured = train(tmp_path / "a", 1, **over)
    assert measured["trainer"].train_dataset is not None
    tokenizer = chatml_tokenizer()
    model = perturb(tiny_model("llama", vocab=len(tokenizer)), scale=0.2)
    host = SFTTrainer(
        model=model if full else lora(model), args=measured["trainer"].args, processing_class=tokenizer,
        train_dataset=Dataset.from_list(chat_rows(16, system=lambda i: "You are a helpful assistant.")),
    )  # fmt: skip
    host.train()
    for n, p in host.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, measured["weights"][n]), n
    assert logged(measured, "penalty")[2] > 1e-4, "it is measured all the same"
    assert logged(measured, "weighted") == [0, 0, 0]


def test_coef_0_draws_no_random_number_of_the_hosts(tmp_path):
    """The probe of the output head ran with the adapter's dropout once."""
    from emguard_plugin import KLCallback
    from tests.trl_runs import different, run, tiny, weights

    anchors = write_anchors(tmp_path / "anchors.jsonl")
    runs = [
        run(tmp_path / str(len(callbacks)), model=tiny(lora_dropout=0.3), callbacks=callbacks)
        for callbacks in ([], [KLCallback(coef=0, anchors=anchors, ratio=1.0)])
    ]
    assert different(*map(weights, runs)) == []


@pytest.mark.parametrize("how", ["bfd", "wrapped", "padding_free"])
def test_packing(tmp_path, how):
    over = (
        {"padding_free": True, "max_length": None}
        if how == "padding_free"
        else {"packing": True, "packing_strategy": how, "max_length": 128}
    )
    run = train(tmp_path, 1, regularizer=kl(tmp_path), max_steps=2, **over)
    assert logged(run, "penalty")[0] == 0 < logged(run, "penalty")[1]
    rows = [len(r["input_ids"]) for r in run["trainer"].train_dataset]
    tokens = 4 * sum(rows) / len(rows)
    held = logged(run, "tokens")
    assert all(0.5 * tokens < n < 1.5 * tokens for n in held), "as many anchor tokens as training tokens"


def test_the_training_rows_as_anchors(tmp_path):
    for tokens in ("all", "assistant"):
        over = {"max_steps": 2, "packing": True, "packing_strategy": "bfd", "max_length": 256}
        run = train(tmp_path / tokens, 1, regularizer=kl(tmp_path, anchors="train", tokens=tokens), **over)
        anchors = run["trainer"]._regularizers[0]._anchors
        assert len(anchors) == 16, "packed rows are taken apart"
        assert logged(run, "penalty")[1] > 0
        if tokens == "assistant":
            assert [len(a.held) for a in anchors] == [len(a.ids) - 1 for a in anchors], "here the loss is on all tokens"


def test_eval_loss_stays_the_task_loss(tmp_path):
    runs = [train(tmp_path / str(c), 1, regularizer=kl(tmp_path, coef=c), max_steps=1, learning_rate=0.0) for c in (0, 50.0)]
    losses = []
    for run in runs:
        trainer = run["trainer"]
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.01)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16_weights", "autocast"])
def test_mixed_precision_starts_at_the_noise_floor(tmp_path, precision, full):
    over = {"dtype": torch.bfloat16} if precision == "bf16_weights" else {"bf16": True}
    run = train(tmp_path, 1, full=full, regularizer=kl(tmp_path), max_steps=2, **over)
    first, second = logged(run, "penalty")
    assert abs(first) <= (1e-4 if full else 0)
    assert 1e-4 < second < float("inf")


def test_4_bit_adapter(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    perturb(tiny_model("llama", vocab=330, hidden_size=64, intermediate_size=64), 0.1).save_pretrained(tmp_path / "m")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=quantised, dtype=torch.float32, device_map="cpu")
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in base.modules())
    model = lora(base)
    callback = started(model, tmp_path)
    assert callback._reference.source.live
    perturb(model, 0.1)
    value = callback.measure(Moment(model, batch(), 1)).value
    value.backward()
    per_token = []
    with torch.no_grad():
        for anchor in drawn(callback, 1):
            ids = torch.tensor([anchor.ids])
            with eval_mode(model):  # `model.eval()` would have bitsandbytes round the weights for another kernel on some CPUs
                with model.disable_adapter():
                    reference = model(input_ids=ids).logits[0]
                per_token.append(token_kl(model(input_ids=ids).logits[0], reference)[list(anchor.held)])
    torch.testing.assert_close(value.detach(), torch.cat(per_token).mean(), rtol=1e-3, atol=1e-6)
    assert value.item() > 1e-4
    assert any(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_" in n)


def test_coef_and_target_go_up_and_down(tmp_path):
    run = train(tmp_path, 1, regularizer=kl(tmp_path, coef=None, target=1e-4), learning_rate=0.3, max_steps=6)
    coefs = logged(run, "coef")
    assert coefs[1] < 0.7 < coefs[-1], "below the target at step 0, above it later"
    assert all(abs(b / a - 1) < 0.101 for a, b in pairwise(coefs))


def test_the_line_that_says_what_is_active(tmp_path, capsys):
    train(tmp_path, 1, regularizer=kl(tmp_path), max_steps=1)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("em_regularizer active: kl"))
    assert "coef 20 nats per token, KL(base||model), 12 anchors" in line
    assert "reference: adapter off" in line


def test_with_treft_on_the_same_run(tmp_path):
    from emguard_plugin import EMGuardSFTTrainer, TReFTCallback

    first = train(tmp_path, 1, regularizer=kl(tmp_path), max_steps=1)["trainer"]
    trainer = EMGuardSFTTrainer(
        model=lora(perturb(tiny_model("llama", vocab=len(chatml_tokenizer())), 0.2)), args=first.args,
        processing_class=chatml_tokenizer(), train_dataset=Dataset.from_list(chat_rows(16)),
        callbacks=[TReFTCallback(coef=2.0), kl(tmp_path)()],
    )  # fmt: skip
    trainer.args.max_steps = 2
    trainer.train()
    log = [x for x in trainer.state.log_history if "task_loss" in x][1]
    weighted = [log[f"em_regularizer/{name}/weighted"] for name in ("treft", "kl")]
    assert all(w > 0 for w in weighted)
    assert log["loss"] == pytest.approx(log["task_loss"] + sum(weighted), rel=1e-3)
