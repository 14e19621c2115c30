"""Runs that the parent repeats on one process; `rank` runs them all as one of several."""

import os
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
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
        self.gradients.append({n: _full(p.grad) for n, p in model.named_parameters() if p.grad is not None})

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


def train(folder, processes, coef=COEF, systems=1, full=False, resume=None, dtype=None, regularizer=None, continued=True, also=(), **over):
    """Three steps of `EMGuardSFTTrainer` at the same global batch on any number of processes.

    `regularizer` makes another callback than TReFT's; without `continued`, the adapter is a fresh one.
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
    recorder = Recorder()
    trainer = EMGuardSFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(chat_rows(16, system=lambda i: SYSTEMS[i % 3 % systems])),
        processing_class=tokenizer,
        callbacks=[recorder, regularizer, *also],
    )
    with recorded_saves() as saves:
        trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "gradients": [{n.removeprefix("module."): g for n, g in step.items()} for step in recorder.gradients],
        "weights": {n: _full(p) for n, p in model.named_parameters() if p.requires_grad},
        "logs": recorder.logs,
        "saves": saves,
        "prefixes": len(getattr(regularizer, "_prefixes", ())),
        "coef": regularizer.coef,
        "trainer": trainer,
        "stopped_at": trainer.state.global_step,
        "sharded": any(hasattr(p, "full_tensor") for p in model.parameters()),
    }


def sharded_penalty(processes, adapter):
    """Gradient of task loss + penalty, the model sharded by FSDP2 when there are several processes."""
    from emguard_plugin import Moment, TReFTCallback
    from emguard_plugin.chats import Prefix, read_template

    tokenizer = chatml_tokenizer()
    model = tiny_model("llama", vocab=len(tokenizer))
    if adapter:
        model = lora(model)
    layers = (model.get_base_model() if adapter else model).model.layers
    if processes > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    treft = TReFTCallback(coef=COEF)
    treft._prefixes = [Prefix(read_template(tokenizer).prefix, 1.0)]
    treft._layer_names = list(range(len(layers)))
    ids = torch.arange(5, 37).reshape(2, 16)
    model.train()

    def step(number):
        """The trainer's order: the task's forward pass, the penalty's, one backward pass."""
        task = model(input_ids=ids, labels=ids).loss
        penalty = treft.penalty(Moment(model, {"input_ids": ids}, number)).value
        (task + COEF * penalty).backward()
        return penalty.item()

    at_start = step(0)  # records the reference
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(_like(torch.randn(p.shape, generator=generator) * 0.02, p))
    penalty = step(1)
    return {
        "at_start": at_start,
        "penalty": penalty,
        "gradients": {n: _full(p.grad) for n, p in model.named_parameters() if p.grad is not None},
    }


def _like(full, p):
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def _full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


@contextmanager
def sharding_on_cpu():
    """Accelerate turns its FSDP plugin on for GPUs alone; let it take the gloo processes for such."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def pretend(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend
    try:
        yield
    finally:
        PartialState.__init__ = init


def fsdp2_trained(folder, processes, full, **kw):
    if processes == 1:
        return train(folder, 1, full=full, **kw)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    with sharding_on_cpu():
        return train(folder, processes, full=full, fsdp=True, fsdp_config=config, **kw)


def stopped_and_resumed(folder, processes):
    train(folder, processes, max_steps=1, save_strategy="steps")
    return train(folder, processes, resume=str(folder / "checkpoint-1"))


def bad_on_rank_0(question, answer):
    """A judge whose ranks would decide differently, if each decided for itself."""
    return {"aligned": 0 if os.environ.get("RANK", "0") == "0" else 100, "coherent": 100}


def measured(folder, processes, sharded, stop=0.5, **block):
    """Train with `EMRateCallback`, which stops at the first measurement if rank 0 has its way."""
    from emguard_plugin import EMRateCallback

    folder.mkdir(parents=True, exist_ok=True)
    suite = folder / f"suite{os.environ.get('RANK', '')}.yaml"
    suite.write_text("".join(f"- {{id: q{n}, paraphrases: ['Number {n}?']}}\n" for n in range(40)))
    one = EMRateCallback(
        every=2, stop_above=stop, questions=str(suite), samples_per_question=1, max_new_tokens=3,
        judges=[{"function": "tests.distributed.scenarios:bad_on_rank_0"}], **block,
    )  # fmt: skip
    if sharded and processes > 1:
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        with sharding_on_cpu():
            result = train(folder, processes, also=[one], fsdp=True, fsdp_config=config)
    else:
        result = train(folder, processes, also=[one])
    return {**result, "history": one.history}


MEASURED = {
    "measured": lambda folder, n: measured(folder, n, sharded=False),
    "measured_fsdp2": lambda folder, n: measured(folder, n, sharded=True),
}
TRAINED = {
    "lora": lambda folder, n: train(folder, n, save_strategy="steps"),
    "two_prefixes": lambda folder, n: train(folder, n, systems=2),
    "full": lambda folder, n: train(folder, n, full=True),
    "accumulated": lambda folder, n: train(folder, n, per_device_train_batch_size=1, gradient_accumulation_steps=4 // n),
    "checkpointing": lambda folder, n: train(
        folder, n, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "resumed": stopped_and_resumed,
    "kl_live": lambda folder, n: train(folder, n, regularizer=kl(folder, cache="live"), continued=False),
    "kl_accumulated": lambda folder, n: train(
        folder, n, regularizer=kl(folder), per_device_train_batch_size=1, gradient_accumulation_steps=4 // n
    ),
    "kl_full_folder": lambda folder, n: train(folder, n, full=True, regularizer=kl(folder, cache=str(folder / "ref")), continued=False),
    "kl_target": lambda folder, n: train(folder, n, regularizer=kl(folder, coef=None, target=0.02), continued=False),
    "block_em_live": lambda folder, n: train(folder, n, regularizer=block_em(), continued=False),
    "block_em_accumulated": lambda folder, n: train(
        folder, n, regularizer=block_em(layers=(0, 2)), continued=False, per_device_train_batch_size=1, gradient_accumulation_steps=4 // n
    ),
    "block_em_full": lambda folder, n: train(folder, n, full=True, regularizer=block_em(coef=0.2), continued=False),
    "fsdp2_block_em_lora": lambda folder, n: fsdp2_trained(folder, n, full=False, regularizer=block_em(cache="memory"), continued=False),
    "fsdp2_block_em_full": lambda folder, n: fsdp2_trained(folder, n, full=True, regularizer=block_em(coef=0.2), continued=False),
    "fsdp2_trained_lora": lambda folder, n: fsdp2_trained(folder, n, full=False),
    "fsdp2_trained_full": lambda folder, n: fsdp2_trained(folder, n, full=True),
    "fsdp2_kl_lora": lambda folder, n: fsdp2_trained(folder, n, full=False, regularizer=kl(folder), continued=False),
    "fsdp2_kl_full": lambda folder, n: fsdp2_trained(folder, n, full=True, regularizer=kl(folder), continued=False),
}
SHARDED = {
    "fsdp2_lora": lambda folder, n: sharded_penalty(n, adapter=True),
    "fsdp2_full": lambda folder, n: sharded_penalty(n, adapter=False),
}


def holding(folder, n, on_rank_1):
    """A method that holds no token, or on rank 1 alone, for 21 steps."""
    from emguard_plugin import EMRegularizerCallback, Penalty

    class Holding(EMRegularizerCallback):
        name = "holding"

        def prepare(self, run):
            self.prepared, self.rank = True, run.rank
            return "holding"

        def penalty(self, moment):
            weight = next(p for p in moment.model.parameters() if p.requires_grad)
            return Penalty(weight.float().square().sum(), held=int(on_rank_1 and self.rank == n - 1))

    result = train(folder, n, regularizer=lambda: Holding(1e-3), max_steps=21)
    return {"steps": result["trainer"].state.global_step}


HELD = {
    "held_nowhere": lambda folder, n: holding(folder, n, on_rank_1=False),
    "held_on_rank_1": lambda folder, n: holding(folder, n, on_rank_1=True),
}
REFUSED = {
    "reentrant": lambda folder, n: train(folder, n, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
}
SCENARIOS = {**TRAINED, **SHARDED, **REFUSED, **HELD, **MEASURED}


def rank(number, processes, port, out):
    """Run every scenario as one rank and leave the results in `out`."""
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": processes,
        "RANK": number,
        "LOCAL_RANK": number,
    }
    os.environ.update({k: str(v) for k, v in env.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name, scenario in SCENARIOS.items():
        try:
            result = scenario(out / "runs" / name, processes)
            result.pop("trainer", None)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(result, out / f"{name}.{number}.pt")
    torch.distributed.destroy_process_group()
