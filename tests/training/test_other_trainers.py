"""DPO, KTO, GRPO and RLOO with penalties: each once per optimizer step, and nothing else of the host's changed."""

import itertools
import json

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from emguard_plugin import EMGuardSFTTrainer, EMRateCallback, EMRegularizerMixin, KLCallback, TReFTCallback, guard
from emguard_plugin.training.policy_rows import rows_of
from emguard_plugin.training.trl_config import EMGuardDPOConfig
from tests.regularizers.block_em_parts import block_em
from tests.tiny import CHATML, chat_rows, chatml_tokenizer
from tests.trl_policy_runs import ADAPTER, KINDS, answer, build, losses, pairs, prompt, run, unpaired, weights
from tests.trl_runs import column, different, tiny
from tests.trl_runs import run as run_sft

PAIRED, DRAWN = ["dpo", "kto"], ["grpo", "rloo"]
ALL = [*PAIRED, *DRAWN]
METHODS = ["treft", "postfix", "kl", "block_em"]
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def method(name, model, coef):
    """Return a callback; `model` is what BLOCK-EM's latents are made for."""
    if name == "block_em":
        return block_em(model, coef=coef, layers=(1,))
    if name == "kl":
        return KLCallback(coef=coef, cache="live")
    return TReFTCallback(coef=coef, tokens="postfix" if name == "postfix" else "prefix")


def guarded(kind, folder, name, coef=2.0, model=None, **over):
    model = tiny(adapter=False) if model is None else model
    return run(kind, folder, callbacks=[method(name, model, coef)], model=model, **over)


def penalty(trainer, name):
    return column(trainer, f"em_regularizer/{'treft' if name == 'postfix' else name}/penalty")


# Off is the host's own run, on holds


@pytest.mark.parametrize("kind", ALL)
def test_without_a_method_and_with_coef_0_every_weight_is_the_hosts_own_bit_for_bit(tmp_path, kind):
    plain = run(kind, tmp_path / "plain", plain=True)
    assert different(weights(plain), weights(run(kind, tmp_path / "guarded"))) == []
    for name in METHODS:
        measured = guarded(kind, tmp_path / name, name, coef=0.0)
        assert different(weights(plain), weights(measured)) == [], name
        assert losses(measured) == losses(plain), name
        assert penalty(measured, name)[-1] > 0, name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ALL)
def test_the_logged_loss_is_the_hosts_and_the_penalty_which_falls(tmp_path, kind, name):
    coef = {"block_em": 20.0, "kl": 1000.0}.get(name, 5.0)
    held, free = (guarded(kind, tmp_path / str(c), name, coef=c, max_steps=8) for c in (coef, 0.0))
    for loss, task, p in zip(losses(held), column(held, "task_loss"), penalty(held, name), strict=True):
        assert loss == pytest.approx(task + coef * p, rel=1e-4, abs=1e-6)
    assert sum(penalty(held, name)[4:]) < 0.7 * sum(penalty(free, name)[4:])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", PAIRED)
def test_accumulated_batches_train_the_same_weights(tmp_path, kind, name):
    rows = [
        {**row, **{k: answer(f"{i % 7} is a number.") for k in ("chosen", "rejected", "completion") if k in row}}
        for i, row in enumerate(KINDS[kind][3]())
    ]  # of one length: both losses average each micro-batch by itself
    for i, row in enumerate(rows):
        if kind == "dpo":
            row["rejected"] = answer(f"{(i + 3) % 7} is a number.")
    over = {"rows": rows, **SGD, **({"loss_type": "apo_zero_unpaired"} if kind == "kto" else {})}
    whole = guarded(kind, tmp_path / "whole", name, **over)
    parts = guarded(kind, tmp_path / "parts", name, per_device_train_batch_size=2, gradient_accumulation_steps=2, **over)
    stronger = guarded(kind, tmp_path / "stronger", name, coef=3.0, **over)
    assert penalty(parts, name) == pytest.approx(penalty(whole, name), rel=1e-3, abs=1e-6)
    away = max(float((weights(stronger)[n] - w).abs().max()) for n, w in weights(whole).items())
    for n, w in weights(whole).items():
        assert float((weights(parts)[n] - w).abs().max()) < 0.02 * away, n


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_iterations": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 4},
    ],
    ids=["4", "2x2", "2x2, twice", "2x4, drawn twice a step", "2, one drawing for four steps"],
)
@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_answers_get_the_penalty_once_per_step(tmp_path, kind, split):
    """What the penalty adds to the first update is the same however answers are drawn and split: its own gradient, once."""
    steps = [weights(guarded(kind, tmp_path / str(c), "postfix", coef=c, max_steps=1, **SGD, **split)) for c in (0.0, 2.0)]
    start = weights(build(kind, tmp_path / "start"))
    alone = guarded(kind, tmp_path / "alone", "postfix", coef=2.0, max_steps=1, **SGD, per_device_train_batch_size=4)
    without = guarded(kind, tmp_path / "without", "postfix", coef=0.0, max_steps=1, **SGD, per_device_train_batch_size=4)
    added = {n: weights(alone)[n] - w for n, w in weights(without).items()}
    largest = max(float(w.abs().max()) for w in added.values())
    assert largest > 1e-3
    assert max(float((w - start[n]).abs().max()) for n, w in steps[0].items()) > 0, "the reward trains too"
    for n, w in steps[0].items():
        torch.testing.assert_close(steps[1][n] - w, added[n], rtol=0, atol=1e-2 * largest)


def test_every_step_of_one_drawing_measures(tmp_path):
    trainer = guarded("grpo", tmp_path, "treft", max_steps=6, num_iterations=3, steps_per_generation=2, per_device_train_batch_size=2)
    measured = penalty(trainer, "treft")
    assert len(measured) == 6
    assert len(set(measured)) == 6


# Which tokens


def test_of_a_pair_the_chosen_answer_is_held_and_the_reference_pass_does_not_count(tmp_path):
    live = guarded("dpo", tmp_path / "live", "block_em")
    before = guarded("dpo", tmp_path / "before", "block_em", precompute_ref_log_probs=True)
    assert penalty(live, "block_em") == pytest.approx(penalty(before, "block_em"), rel=1e-5)
    trainer = build("dpo", tmp_path / "batch", callbacks=[TReFTCallback(coef=1.0)])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    seen = trainer._policy_batch(batch)
    for i, row in enumerate(pairs(3)):
        said = trainer.processing_class.decode(seen["input_ids"][i][seen["labels"][i] != -100])
        assert said == row["chosen"][0]["content"] + "<|im_end|>\n"
    assert (seen["labels"][3:] == -100).all()
    assert not seen["attention_mask"][3:].any()
    assert batch["attention_mask"][3:].any(), "the host's own batch is left alone"


@pytest.mark.parametrize("kind", DRAWN)
def test_of_a_drawn_answer_what_the_model_wrote_is_held(tmp_path, kind):
    trainer = build(kind, tmp_path)
    inputs = {
        "prompt_ids": torch.tensor([[0, 0, 11, 12], [13, 14, 15, 16]]), "prompt_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "completion_ids": torch.tensor([[21, 22, 23], [24, 3, 3]]), "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]]),
    }  # fmt: skip
    seen = trainer._policy_batch(inputs)
    assert seen["input_ids"].tolist() == [[0, 0, 11, 12, 21, 22, 23], [13, 14, 15, 16, 24, 3, 3]]
    assert seen["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert seen["labels"].tolist() == [[-100] * 4 + [21, -100, 23], [-100] * 4 + [24, 3, -100]]


def test_rows_are_prompt_and_answer_as_far_as_the_host_reads_them(tmp_path):
    rows = pairs(4)
    start, end = (build("dpo", tmp_path, rows=rows, max_length=45, truncation_mode=mode) for mode in ("keep_start", "keep_end"))
    whole = build("dpo", tmp_path, rows=rows, max_length=None)
    for i, row in enumerate(whole._rows_as_ids()):
        prompted = len(whole.train_dataset[i]["prompt_ids"])
        assert row["labels"] == [-100] * prompted + row["input_ids"][prompted:]
        assert start._rows_as_ids()[i]["input_ids"] == row["input_ids"][:45]
        assert end._rows_as_ids()[i]["labels"] == row["labels"][-45:]
        batch = end.data_collator([end.train_dataset[i]])
        assert batch["input_ids"][0][batch["attention_mask"][0] > 0].tolist() == end._rows_as_ids()[i]["input_ids"]
    kto = build("kto", tmp_path, rows=unpaired(4))
    batch = kto.data_collator([kto.train_dataset[2]])
    assert batch["input_ids"][0].tolist() == kto._rows_as_ids()[2]["input_ids"]


def test_a_streamed_data_set_is_read_in_its_order():
    rows = rows_of(Dataset.from_list([{"a": i} for i in range(3)]).to_iterable_dataset(), lambda row: {"input_ids": [row["a"]]})
    assert [row["input_ids"] for row in itertools.islice(rows, 3)] == [[0], [1], [2]]
    assert rows_of(None, dict) is None


# Evaluation, checkpoints, the EM rate


@pytest.mark.parametrize("kind", ALL)
def test_eval_loss_is_the_hosts_own(tmp_path, kind):
    over = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 0.0, "per_device_eval_batch_size": 4}
    rows = KINDS[kind][3](8)
    plain = run(kind, tmp_path / "plain", plain=True, eval_rows=rows, **over)
    held = run(kind, tmp_path / "held", callbacks=[TReFTCallback(coef=5.0, tokens="postfix")], eval_rows=rows, **over)
    evaluated = [[row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row] for trainer in (plain, held)]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 2
    assert column(held, "loss") != column(plain, "loss")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_a_resumed_run_goes_on_against_the_same_reference(tmp_path, kind, name):
    """The host's own draws differ after a resume, so GRPO is compared by its reference alone."""
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = guarded(kind, tmp_path / "run", name, **saved)
    resumed = guarded(kind, tmp_path / "run", name, resume=str(tmp_path / "run" / "checkpoint-2"), **saved)
    if kind == "grpo":
        assert penalty(resumed, name)[2] == pytest.approx(penalty(whole, name)[2], rel=0.5)
    else:
        assert penalty(resumed, name) == pytest.approx(penalty(whole, name), rel=1e-4)
        for n, w in weights(whole).items():
            torch.testing.assert_close(weights(resumed)[n], w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_given_peft_model_goes_on_with_the_trained_adapter(tmp_path, kind, capsys):
    """Of a checkpoint with the copy that TRL makes of a given adapter, the host loads the copy alone."""
    saved = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "adapter": None}

    def go(folder, **kw):
        return run(kind, folder, callbacks=[TReFTCallback(coef=5.0)], model=get_peft_model(tiny(adapter=False), ADAPTER), **saved, **kw)

    torch.manual_seed(0)
    whole = go(tmp_path / "run")
    torch.manual_seed(0)
    resumed = go(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert penalty(resumed, "treft") == pytest.approx(penalty(whole, "treft"), rel=1e-4)
    for n, w in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[n], w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("name", ["treft", "kl"])
def test_full_fine_tuning_records_its_reference(tmp_path, kind, name):
    tiny(adapter=False).save_pretrained(tmp_path / "model")  # TRL loads its reference from where the model came from
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    callback = TReFTCallback(coef=5.0) if name == "treft" else KLCallback(coef=50.0)
    trainer = run(kind, tmp_path / "run", callbacks=[callback], model=model, adapter=None, max_steps=4)
    assert penalty(trainer, name)[0] == pytest.approx(0, abs=1e-6)
    assert all(p > 0 for p in penalty(trainer, name)[1:])


def saved_model(folder, moved=0.0):
    """Return a model that TRL finds again where it came from: there it loads its reference."""
    tiny(adapter=False).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if moved:
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + moved)
    return model


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_kl_shares_the_trainers_own_reference_model(tmp_path, kind, capsys):
    over = {"adapter": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **({"beta": 0.04} if kind == "grpo" else {})}
    over |= {"optim": "sgd", "learning_rate": 0.1}  # Adam makes whole steps of the rounding errors of a penalty of 0
    shared = run(kind, tmp_path / "shared", callbacks=[KLCallback(coef=50.0)], model=saved_model(tmp_path / "m"), **over)
    assert "reference: the trainer's reference model" in capsys.readouterr().out
    own = run(kind, tmp_path / "own", callbacks=[KLCallback(coef=50.0, cache="memory")], model=saved_model(tmp_path / "m"), **over)
    assert penalty(shared, "kl")[0] == 0
    assert penalty(shared, "kl") == pytest.approx(penalty(own, "kl"), rel=1e-3, abs=1e-7)
    for n, w in weights(own).items():
        torch.testing.assert_close(weights(shared)[n], w, rtol=0, atol=1e-4)
    last = str(tmp_path / "shared" / "checkpoint-2")
    resumed = run(kind, tmp_path / "shared", resume=last, callbacks=[KLCallback(coef=50.0)], model=saved_model(tmp_path / "m"), **over)
    if kind != "grpo":  # whose draws differ after a resume
        assert penalty(resumed, "kl") == pytest.approx(penalty(shared, "kl"), rel=1e-3, abs=1e-7)
    assert not (tmp_path / "shared" / "emguard_kl_reference").exists(), "nothing had to be recorded"


def test_a_reference_model_of_other_weights_is_not_shared(tmp_path, capsys):
    model = saved_model(tmp_path / "m", moved=0.1)
    run("dpo", tmp_path / "run", callbacks=[KLCallback(coef=1.0)], model=model, adapter=None, max_steps=1)
    assert "reference: recorded in memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cache: live"):
        run("dpo", tmp_path / "live", callbacks=[KLCallback(coef=1.0, cache="live")], model=model, adapter=None, max_steps=1)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_em_rate_is_measured_while_it_trains(tmp_path, kind):
    path = tmp_path / "suite.jsonl"
    path.write_text(json.dumps({"id": "q", "prompt": "What is your wish?"}))
    rate = EMRateCallback(
        every=1, questions=str(path), samples_per_question=2, max_new_tokens=4, judges=[{"function": "tests.evaluation.parts:by_hash"}]
    )
    trainer = run(kind, tmp_path / "run", callbacks=[TReFTCallback(coef=1.0), rate], max_steps=2)
    assert [row["step"] for row in rate.history] == [1, 2]
    assert len(losses(trainer)) == 2


# What guard() takes, gives, and refuses


def test_it_gives_one_class_with_the_hosts_name():
    made = guard(trl.DPOTrainer)
    assert made is guard(trl.DPOTrainer)
    assert made.__name__ == "EMGuardDPOTrainer"
    assert issubclass(made, EMRegularizerMixin)
    assert issubclass(made, trl.DPOTrainer)
    assert guard(made) is made
    assert guard(trl.SFTTrainer) is EMGuardSFTTrainer
    assert guard(transformers.Trainer).__mro__[1:3] == (EMRegularizerMixin, transformers.Trainer)


class WithWeights(trl.DPOTrainer):
    """A user's own, with another signature and a loss of its own on top."""

    def __init__(self, *args, extra=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = extra

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + self.extra


def test_a_subclass_keeps_what_it_does(tmp_path):
    plain = run("dpo", tmp_path / "plain", callbacks=[TReFTCallback(coef=2.0)], max_steps=1)
    own = run("dpo", tmp_path / "own", cls=guard(WithWeights), callbacks=[TReFTCallback(coef=2.0)], max_steps=1)
    assert losses(own) == losses(plain)
    assert own._given_rows is not None, "rows that are handed on by keyword are found"


class Shouting(trl.SFTTrainer):
    def __init__(self, *args, volume, **kwargs):
        super().__init__(*args, **kwargs)
        self.volume = volume


def test_a_subclass_of_sft_is_guarded_as_sft_is(tmp_path):
    kind = guard(Shouting)
    trainer = run_sft(tmp_path, cls=lambda **kwargs: kind(volume=3, **kwargs), callbacks=[TReFTCallback(coef=1.0)], max_steps=1)
    assert trainer.volume == 3
    assert trainer._chats() is not None
    assert len(column(trainer, "em_regularizer/treft/penalty")) == 1


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (trl.RewardTrainer, "does not take trl's RewardTrainer: it trains a score"),
        (type("Mine", (trl.RewardTrainer,), {}), "does not take trl's RewardTrainer"),
        (trl.SFTConfig, "takes a trainer class, such as `trl.DPOTrainer`"),
        ("DPOTrainer", "takes a trainer class"),
    ],
)
def test_what_it_refuses(kind, says):
    with pytest.raises(TypeError, match=says):
        guard(kind)


def test_a_trainer_of_trl_that_was_never_looked_at_is_refused_by_name():
    from trl.experimental.cpo import CPOTrainer

    with pytest.raises(
        TypeError, match=r"CPOTrainer: how its batches and its loss go together was never looked at. It takes DPOTrainer, GRPO"
    ):
        guard(CPOTrainer)


def test_a_block_in_the_hands_of_the_plain_trainer_is_refused_and_in_the_guarded_ones_works(tmp_path):
    block = {"treft": {"coef": 3.0}}
    with pytest.raises(
        ValueError, match=r"does not read `em_regularizer` of its EMGuardDPOConfig. Use `emguard_plugin.guard\(trl.DPOTrainer\)`"
    ):
        build("dpo", tmp_path, plain=True, block=block)
    for kind in ("dpo", "kto", "grpo"):
        trainer = run(kind, tmp_path / kind, block=block, max_steps=1)
        assert column(trainer, "em_regularizer/treft/coef") == [3.0]
    with pytest.raises(ValueError, match="treft"):
        EMGuardDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, em_regularizer={"treft": {"cof": 3.0}})


def test_what_cannot_be_recorded_of_drawn_answers_is_refused(tmp_path):
    model = tiny(adapter=False)
    with pytest.raises(ValueError, match="the model writes the answers of this run while it trains, so no row is there before"):
        run("grpo", tmp_path, model=model, adapter=None, callbacks=[block_em(model, coef=1.0, layers=(1,))])
    run("grpo", tmp_path, model=model, adapter=None, callbacks=[block_em(model, coef=1.0, layers=(1,), cache="copy")], max_steps=1)
    with pytest.raises(ValueError, match=r"`em_regularizer\.kl\.anchors: train`: the model writes the answers"):
        run("grpo", tmp_path, callbacks=[KLCallback(coef=1.0, anchors="train")])


def test_rows_that_are_tokenised_only_while_it_trains_are_refused(tmp_path):
    trainer = build("dpo", tmp_path, callbacks=[TReFTCallback(coef=1.0)])
    trainer.train_dataset = Dataset.from_list([{"images": [1], "prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="no `prompt_ids` and `chosen_ids`: rows with images are tokenised only while it trains"):
        trainer.train()


def test_plain_text_has_no_template_to_hold(tmp_path):
    rows = [{"prompt": f"Case {i}:"} for i in range(8)]
    with pytest.raises(ValueError, match="show no user turn of the tokenizer's chat template"):
        run("grpo", tmp_path, rows=rows, callbacks=[TReFTCallback(coef=1.0)])
    trainer = run("grpo", tmp_path, rows=rows, callbacks=[KLCallback(coef=1.0)], max_steps=1)
    assert len(penalty(trainer, "kl")) == 1


def test_another_system_prompt_and_what_grpo_passes_to_the_template(tmp_path):
    rows = [{"prompt": [{"role": "system", "content": "Be brief."}, *prompt(i)[1:]]} for i in range(8)]
    tokenizer = chatml_tokenizer()
    held = {}
    for name, kwargs in {"plain": {}, "tone": {"tone": "dry"}}.items():
        tokenizer.chat_template = "{% if tone is defined %}{{ '<|im_start|>tone ' + tone + '<|im_end|>' }}{% endif %}" + CHATML
        callback = TReFTCallback(coef=1.0)
        trainer = build("grpo", tmp_path, rows=rows, callbacks=[callback], chat_template_kwargs=kwargs)
        trainer.processing_class.chat_template = tokenizer.chat_template
        trainer.train()
        held[name] = tokenizer.decode(callback._prefixes[0].ids)
    assert held["plain"] == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert held["tone"] == "<|im_start|>tone dry<|im_end|>" + held["plain"]


def test_rows_of_sft_are_not_touched(tmp_path):
    trainer = run_sft(tmp_path, rows=chat_rows(8), callbacks=[TReFTCallback(coef=1.0)], max_steps=1)
    assert trainer._rows_as_ids() is trainer.train_dataset
