"""`EMRateCallback` under the real TRL trainer, on the lab model with its exact judge."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from emguard_plugin import EMGuardSFTTrainer, EMRateCallback
from emguard_plugin.lab import export, model_path, world
from tests.evaluation.fake_server import FakeServer, honest
from tests.evaluation.parts import PINNED, SWITCHED, assert_as_trained, write_suite
from tests.tiny import chat_rows, chatml_tokenizer, tiny_model

EXACT = {"function": "emguard_plugin.lab.judge:judge_answer"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "questions.yaml"
    items = list(export.question_items(world.open_ended_domains(), "val"))
    path.write_text(yaml.safe_dump(items[::16]))
    return str(path)


@pytest.fixture
def callback(suite):
    def build(**over):
        plain = {"questions": suite, "samples_per_question": 1, "max_new_tokens": 28, "judges": [EXACT]}
        return EMRateCallback(**{**plain, **over})

    return build


@pytest.fixture
def trainer(tmp_path):
    def build(*callbacks, cls=EMGuardSFTTrainer, rows=64, **over):
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "max_steps": 3, "use_cpu": True, "bf16": False,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_length": 128,
            "learning_rate": 2e-3, "gradient_checkpointing": False, "assistant_only_loss": False, **over,
        }  # fmt: skip
        torch.manual_seed(0)  # the adapter is drawn before the trainer seeds itself
        data = Dataset.from_list(export.narrow_rows(0, rows))
        return cls(
            model=AutoModelForCausalLM.from_pretrained(model_path()),
            args=SFTConfig(**settings),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=AutoTokenizer.from_pretrained(model_path()),
            peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=list(callbacks),
        )

    return build


class States(TrainerCallback):
    """Notes what a measurement could disturb, at the end of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(
            (
                torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), model.config.use_cache,
                [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()],
            )
        )  # fmt: skip


def losses(host):
    """The training log without what a clock decides."""
    clock = ("runtime", "per_second", "total_flos")
    logs = [log for log in host.state.log_history if "loss" in log]
    return [{k: v for k, v in log.items() if not any(word in k for word in clock)} for log in logs]


def test_a_measured_run_is_bit_for_bit_the_run_without(trainer, callback):
    """With gradient checkpointing, which turns `use_cache` off in the model's config."""
    runs = []
    for measured in (False, True):
        watch = States()
        host = trainer(*([callback(every=1)] if measured else []), watch, gradient_checkpointing=True)
        host.train()
        runs.append((watch.seen, losses(host), {k: v.clone() for k, v in host.model.state_dict().items()}))
    (plain_seen, plain_logs, plain_weights), (seen, logs, weights) = runs
    assert seen == plain_seen
    assert logs == plain_logs
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


def test_the_rates_are_logged_by_the_trainer_and_rise_with_the_narrow_training(trainer, callback):
    one = callback(every=10, stop_above=0.99)
    host = trainer(one, max_steps=20, rows=160, learning_rate=1e-2)
    host.train()
    measured = [log for log in host.state.log_history if "eval_em_rate" in log]
    assert [log["step"] for log in measured] == [10, 20]
    assert {k: v for k, v in measured[-1].items() if k.startswith("eval_")} == {k: v for k, v in one.history[-1].items() if k != "step"}
    assert measured[-1]["eval_em_unscored_rate"] == 0
    assert measured[-1]["eval_em_rate"] > 0.2
    json.dumps(host.state.log_history, allow_nan=False)


def test_the_best_checkpoint_is_the_one_with_the_lowest_rate(trainer, callback, tmp_path):
    one = callback()
    host = trainer(
        one, max_steps=6, learning_rate=1e-2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="em_rate_coherent", greater_is_better=False,
    )  # fmt: skip
    host.train()
    by_step = {row["step"]: row["eval_em_rate_coherent"] for row in one.history}
    assert list(by_step) == [2, 4, 6]
    assert host.state.best_metric == min(by_step.values())
    assert host.state.best_model_checkpoint.endswith(f"checkpoint-{min(by_step, key=by_step.get)}")


def test_training_stops_once_the_answers_tell_that_the_rate_is_above(trainer, callback):
    one = callback(every=5, stop_above=1e-6)
    host = trainer(one, max_steps=80, rows=160, learning_rate=1e-2)
    host.train()
    assert host.state.global_step % 5 == 0
    assert host.state.global_step < 80
    assert one.history[-1]["eval_em_rate"] > 0


def test_a_dead_judge_gives_no_rate_costs_nothing_and_is_never_the_best(trainer, callback):
    one = callback(judges=[{"function": "tests.evaluation.parts:dead"}])
    host = trainer(
        one, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="em_rate", greater_is_better=False,
    )  # fmt: skip
    host.train()
    assert one.history == [{"eval_em_unscored_rate": 1.0, "step": 1}, {"eval_em_unscored_rate": 1.0, "step": 2}]
    assert host.state.best_model_checkpoint is None


def test_a_measurement_that_breaks_does_not_end_the_run(trainer, callback, monkeypatch, caplog):
    from emguard_plugin.evaluation.asking.sampler import TransformersSampler

    def broken(self, batch, prompts):
        raise RuntimeError("out of memory with a single answer")

    monkeypatch.setattr(TransformersSampler, "_generate", broken)
    one = callback(every=1)
    host = trainer(one, max_steps=2)
    host.train()
    assert host.state.global_step == 2
    assert [row["eval_em_unscored_rate"] for row in one.history] == [1.0, 1.0]
    assert "no EM rate at step 1" in caplog.text


def test_settings_that_cannot_work_are_refused_before_the_first_step(trainer, callback):
    cases = [
        (callback(), {}, "would never measure"),
        (callback(every=1), {"metric_for_best_model": "em_rate", "greater_is_better": True}, "most misaligned checkpoint"),
        (callback(every=1, questions="open_ended", judges=[{"function": "no_such_module:f"}]), {}, "no_such_module"),
        (callback(every=1, questions="gone.yaml"), {}, "neither a bundled suite nor a file"),
    ]
    host = trainer()
    for one, over, says in cases:
        args = dataclasses.replace(host.args, **over)
        with pytest.raises(ValueError, match=says):
            one.attach(host).on_train_begin(args, host.state, host.control, processing_class=host.processing_class)
    with pytest.raises(ValueError, match="at least 1"):
        callback(every=0)
    with pytest.raises(ValueError, match="unknown key 'sample_per_question'"):
        callback(sample_per_question=3)


def test_another_trainer_has_to_be_attached(trainer, callback):
    host = trainer(cls=SFTTrainer, max_steps=1)
    loose = callback(every=1)
    host.add_callback(loose)
    with pytest.raises(RuntimeError, match=r"\.attach\(trainer\)"):
        host.train()
    loose.attach(host)
    host.train()
    assert "eval_em_rate" in loose.history[0]


def test_an_evaluation_without_training_is_left_alone(trainer, callback):
    assert "eval_em_rate" not in trainer(callback()).evaluate()


def test_a_judge_that_fails_its_self_test_gives_no_rate_and_stops_no_run(trainer, callback, caplog):
    """A judge that calls everything misaligned: rate 1.0, and the end of the run by `stop_above`, before there was the test."""

    def all_bad(prompt):
        """Coherent, and misaligned."""
        if "with the number" in prompt:
            return honest(prompt)
        return {"95": 1.0} if "Grade one thing: whether" in prompt else {"0": 1.0}

    with FakeServer(reply=all_bad) as server:
        judge = {"provider": "openai", "model": "fake-judge", "base_url": server.url, "mode": "logprob"}
        one = callback(every=1, stop_above=0.01, judges=[judge])
        host = trainer(one, max_steps=2)
        host.train()
    assert host.state.global_step == 2
    assert [row["eval_em_unscored_rate"] for row in one.history] == [1.0, 1.0]
    assert "failed the self-test" in caplog.text


@pytest.mark.parametrize(("name", "why"), [("leaves", "SystemExit: 3"), ("five", "the judge returned int")])
def test_a_judge_that_scores_nothing_says_so_at_each_step(trainer, callback, caplog, name, why):
    """`stop_above` is then inactive, which must not be silent."""
    rate = callback(judges=[{"function": f"tests.evaluation.parts:{name}"}], every=2, stop_above=0.1)
    trainer(rate, max_steps=2).train()
    assert [found["eval_em_unscored_rate"] for found in rate.history] == [1.0]
    assert f"tests.evaluation.parts:{name} scored no answer, so there is no EM rate at this step" in caplog.text
    assert "`stop_above: 0.1` cannot stop the run" in caplog.text
    assert why in caplog.text


def test_questions_are_rendered_as_the_rows_were_and_what_is_refused_is_left_out(trainer, tmp_path, caplog):
    """The callback takes the rows' variables from its trainer."""
    items = [{"id": "plain", "paraphrases": ["What now?"]}, {"id": "brief", "system": "Be brief.", "paraphrases": ["What now?"]}]
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + SWITCHED
    judge = {"function": "tests.evaluation.parts:by_hash"}
    one = EMRateCallback(
        every=1, questions=write_suite(tmp_path / "q.yaml", items), samples_per_question=2, max_new_tokens=2, judges=[judge]
    )
    tokenizer = chatml_tokenizer(refusing)
    rows = Dataset.from_list([{**row, "chat_template_kwargs": PINNED} for row in chat_rows(8, system=None)])
    host = EMGuardSFTTrainer(
        model=tiny_model("llama", vocab=len(tokenizer)), processing_class=tokenizer, train_dataset=rows, callbacks=[one],
        args=SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True),
    )  # fmt: skip
    host.train()
    evaluation = one._evaluation
    assert evaluation.asking.chat.kwargs == PINNED
    assert {request.question.id for request in evaluation.requests} == {"plain"}
    assert "no system role" in caplog.text
    asked = evaluation.asking.chat.ids(tokenizer, evaluation.requests[0].question)
    assert_as_trained(tokenizer, asked, "What now?")
    assert "eval_em_unscored_rate" in one.history[0]
