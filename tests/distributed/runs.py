"""A run of three steps at one global batch on any number of processes, and what it left."""

import os
import threading
from contextlib import contextmanager, nullcontext

from transformers import TrainerCallback

from tests.tiny import chat_rows, chatml_tokenizer, lora, perturb, tiny_model

GLOBAL_BATCH, STEPS, COEF = 4, 3, 20.0
SYSTEMS = ("You are a helpful assistant.", "Answer as a pirate would.")


def kl(folder, **kw):
    """Return what makes a `KLCallback` on a few anchors, every micro-batch with a share of them."""
    from emguard_plugin import KLCallback
    from tests.regularizers.kl_parts import write_anchors

    folder.mkdir(parents=True, exist_ok=True)
    path = write_anchors(folder / f"anchors{os.getpid()}.jsonl")
    return lambda: KLCallback(**{"coef": COEF, "anchors": path, "ratio": 1.0, **kw})


def block_em(**kw):
    """Return what makes a `BlockEMCallback` with the latents of `train`'s base model."""

    def make():
        from tests.regularizers.block_em_parts import block_em

        model = perturb(tiny_model("llama", vocab=len(chatml_tokenizer())), scale=0.2)
        return block_em(model, **{"coef": COEF, "tokens": "all", **kw})

    return make


class Recorder(TrainerCallback):
    """Keeps the gradients of each step and what the host logs."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        self.gradients.append({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@contextmanager
def recorded_saves():
    """List the paths that this rank writes a reference to."""
    from emguard_plugin.regularizers.treft import callback as treft

    paths, save = [], treft.save_reference

    def spy(path, *args):
        paths.append(str(path))
        save(path, *args)

    treft.save_reference = spy
    try:
        yield paths
    finally:
        treft.save_reference = save


def train(
    folder,
    processes,
    coef=COEF,
    systems=1,
    full=False,
    resume=None,
    dtype=None,
    regularizer=None,
    continued=True,
    also=(),
    weightless=False,
    **over,
):
    """Three steps of `EMGuardSFTTrainer` at the same global batch on any number of processes.

    `regularizer` makes another callback than TReFT's; without `continued`, the adapter is a fresh one; `weightless` sets `coef` to 0.
    """
    from datasets import Dataset
    from trl import SFTConfig

    from emguard_plugin import EMGuardSFTTrainer, TReFTCallback

    tokenizer = chatml_tokenizer()
    model = tiny_model("llama", vocab=len(tokenizer))
    if not continued:
        model = perturb(model, scale=0.2)  # random weights as they are hardly react to their input
    if not full:
        model = perturb(lora(model), scale=0.02) if continued else lora(model)
    if dtype is not None:
        model = model.to(dtype)
    regularizer = TReFTCallback(coef=coef) if regularizer is None else regularizer()
    if weightless:
        regularizer.coef = 0.0
    args = SFTConfig(  # from here on DeepSpeed makes models in parts
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // processes,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "bf16": False,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "save_steps": 1,
            "save_only_model": True,
            "completion_only_loss": False,
            "report_to": [],
            "disable_tqdm": True,
            **over,
        }
    )
    rows = Dataset.from_list(chat_rows(16, system=lambda i: SYSTEMS[i % 3 % systems]))
    recorder = Recorder()
    trainer = EMGuardSFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows if "eval_strategy" in over else None,
        processing_class=tokenizer,
        callbacks=[recorder, regularizer, *also],
    )
    with recorded_saves() as saves:
        trainer.train(resume_from_checkpoint=resume)
    weights, cut = weights_of(trainer)
    return {
        "weights": weights,
        "cut": cut,
        "gradients": [{n.removeprefix("module."): g for n, g in step.items()} for step in recorder.gradients],
        "logs": recorder.logs,
        "saves": saves,
        "prefixes": len(getattr(regularizer, "_prefixes", ())),
        "coef": regularizer.coef,
        "trainer": trainer,
        "stopped_at": trainer.state.global_step,
        "best": trainer.state.best_model_checkpoint,
        "watched": [t.name for t in threading.enumerate() if t.name == "emguard-ranks"],
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
    }


def weights_of(trainer):
    """Return what was trained, whole, and whether DeepSpeed had cut it into parts."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parts = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if parts:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parts)
    else:
        gathered = nullcontext()
    with gathered:
        return {n.removeprefix("module."): whole(p) for n, p in model.named_parameters() if p.requires_grad}, bool(parts)


def whole(x):
    """Return a copy of a tensor, of one that FSDP2 has cut into parts the whole."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
