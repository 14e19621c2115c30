"""Runs beside the table of engines that the parent repeats on one process; `rank` runs them all as one of several."""

import os
import traceback

import torch

from tests.distributed import ranks
from tests.distributed.cells import FRESH, resumed
from tests.distributed.engines import FSDP2, trained
from tests.distributed.runs import COEF, whole
from tests.tiny import chatml_tokenizer, lora, tiny_model


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
        "gradients": {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None},
    }


def _like(full, p):
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


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
    result = trained("FSDP2" if sharded else "DDP", folder, processes, also=[one])
    return {**result, "history": one.history}


MEASURED = {
    "measured": lambda folder, n: measured(folder, n, sharded=False),
    "measured_fsdp2": lambda folder, n: measured(folder, n, sharded=True),
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

    return {"steps": trained("DDP", folder, n, regularizer=lambda: Holding(1e-3), max_steps=21)["stopped_at"]}


HELD = {
    "held_nowhere": lambda folder, n: holding(folder, n, on_rank_1=False),
    "held_on_rank_1": lambda folder, n: holding(folder, n, on_rank_1=True),
}
REFUSED = {
    "reentrant": lambda folder, n: trained(
        "DDP", folder, n, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
}
FULL = {"fsdp_config": {**FSDP2, "state_dict_type": "FULL_STATE_DICT"}}
BEST = {
    "load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "save_only_model": False,
    "metric_for_best_model": "loss", "greater_is_better": True, **FULL, **FRESH,
}  # fmt: skip
"""Of a loss that falls the first checkpoint is taken for the best."""
LOADED = {
    "fsdp2_resumed_lora": lambda folder, n: resumed("FSDP2", folder, n, **FULL, **FRESH),
    "fsdp2_resumed_full": lambda folder, n: resumed("FSDP2", folder, n, full=True, **FULL),
    "fsdp2_best_lora": lambda folder, n: trained("FSDP2", folder, n, **BEST),
}
"""With a state dict in one file, of which the host gives a LoRA to rank 0 alone."""
SCENARIOS = {**SHARDED, **REFUSED, **HELD, **MEASURED, **LOADED}


def rank(out):
    """Run every scenario as one rank and leave the results in `out`."""
    ranks.gloo()
    for name, scenario in SCENARIOS.items():
        try:
            result = scenario(out / "runs" / name, int(os.environ["WORLD_SIZE"]))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(result, out / f"{name}.{os.environ['RANK']}.pt")
