"""What we need from the installed TRL and transformers."""

import inspect
from importlib.metadata import version

import pytest
import torch

from tests.tiny import chat_rows, chatml_tokenizer, lora, tiny_model


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_names_that_we_import(trl):
    names = "SFTTrainer SFTConfig TrlParser ScriptArguments ModelConfig DatasetMixtureConfig"
    names += " get_dataset get_peft_config get_quantization_config"
    missing = [n for n in names.split() if not hasattr(trl, n)]
    assert not missing


def test_signatures(trl):
    cls = trl.SFTTrainer
    assert parameters(cls.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(cls.log) == ["self", "logs", "start_time"]
    assert parameters(cls.train)[:2] == ["self", "resume_from_checkpoint"]
    expected = "model args train_dataset eval_dataset processing_class callbacks peft_config quantization_config"
    assert set(expected.split()) <= set(parameters(cls.__init__))
    assert parameters(cls.__init__)[:3] == ["self", "model", "args"]


def test_the_drop_in_takes_the_same_arguments(trl):
    from emguard_plugin import EMGuardSFTConfig, EMGuardSFTTrainer, EMRegularizerMixin
    from emguard_plugin.training.trl_guard import GUARDS
    from emguard_plugin.training.trl_trainer import TRLGuard

    assert EMGuardSFTTrainer.__mro__[1:4] == (TRLGuard, EMRegularizerMixin, trl.SFTTrainer)
    assert issubclass(EMGuardSFTConfig, trl.SFTConfig)
    for host, fronts in GUARDS.items():
        classes = {c for front in fronts for c in front.__mro__ if c.__module__.startswith("emguard_plugin")}
        ours = {n for c in classes for n in vars(c) if n.startswith("_") and not n.startswith("__")}
        assert "_rows_as_ids" in ours
        assert not [n for n in ours if hasattr(host, n)], "the mixin's private names are its own"


@pytest.fixture
def trainer(trl, tmp_path):
    from datasets import Dataset

    def build(cls=trl.SFTTrainer, callbacks=(), **over):
        tokenizer = chatml_tokenizer()
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 4,
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "max_length": 128, **over,
        }  # fmt: skip
        return cls(
            model=lora(tiny_model(vocab=len(tokenizer))),
            args=trl.SFTConfig(**settings),
            train_dataset=Dataset.from_list(chat_rows(24)),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )

    return build


def test_the_default_loss_shows_no_logits(trainer):
    """The fact that our penalties bring their own forward for; from 1.15 on TRL has the logits in hand, whole."""
    host = trainer()
    batch = next(iter(host.get_train_dataloader()))
    host.model.train()
    _, outputs = host.compute_loss(host.model, dict(batch), return_outputs=True)
    shows = tuple(map(int, version("trl").split(".")[:2])) >= (1, 15)
    assert (getattr(outputs, "logits", None) is not None) == shows


def test_compute_loss_changes_its_inputs(trainer):
    """Why the mixin copies the batch before it calls the host."""
    host = trainer()
    batch = dict(next(iter(host.get_train_dataloader())))
    before = set(batch)
    host.compute_loss(host.model, batch)
    assert set(batch) != before


def test_what_the_trainer_is_like_inside_compute_loss(trl, trainer):
    """24 rows in micro-batches of 5 by 2: the last optimizer step of an epoch accumulates one micro-batch only."""
    rows = []

    class Watched(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            scaled = getattr(self, "loss_is_scaled_for_ga", None)
            if scaled is None:
                scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            rows.append((self.current_gradient_accumulation_steps, self.accelerator.sync_gradients, bool(scaled)))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer(Watched).train()
    assert [r[0] for r in rows] == [2, 2, 2, 2, 1, 2, 2]
    assert [r[1] for r in rows] == [False, True, False, True, True, False, True]
    assert all(r[2] for r in rows), "TRL's loss is a mean over the tokens of the whole step"


def test_the_host_divides_what_is_not_scaled_and_nothing_else(trl, trainer):
    """The gradient of a constant-free loss of 1 * sum(p): 1 when the host divides by the number of micro-batches."""

    def gradient(scaled):
        host = trainer(_Sum)
        host.model_accepts_loss_kwargs = scaled
        host.current_gradient_accumulation_steps = 4
        host.model.zero_grad()
        host.training_step(host.model, next(iter(host.get_train_dataloader())), torch.tensor(10) if scaled else None)
        return next(p.grad for p in host.model.parameters() if p.requires_grad).flatten()[0].item()

    class _Sum(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return next(p for p in model.parameters() if p.requires_grad).sum()

    assert gradient(scaled=True) == 1
    assert gradient(scaled=False) == 0.25


def test_callbacks_are_told_before_the_step_and_where_checkpoints_go(trl, trainer, tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(("step", state.global_step))

        def on_save(self, args, state, control, **kwargs):
            seen.append(("save", (tmp_path / f"checkpoint-{state.global_step}" / "trainer_state.json").is_file()))

    trainer(callbacks=[Spy()], save_strategy="steps", save_steps=2, max_steps=2).train()
    assert seen == [("step", 0), ("step", 1), ("save", True)]
