"""DPO, KTO, GRPO and RLOO on the tiny llama: what the tests of other trainers share."""

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

from emguard_plugin import guard
from emguard_plugin.training.trl_config import EMGuardDPOConfig, EMGuardGRPOConfig, EMGuardKTOConfig
from tests.tiny import TOPICS, chatml_tokenizer
from tests.trl_runs import settings, tiny

ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def prompt(i):
    return [SYSTEM, {"role": "user", "content": f"What about {TOPICS[i % 8]}, case {i}?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def pairs(n=24):
    """Pairs whose answers differ in length."""
    return [
        {
            "prompt": prompt(i),
            "chosen": answer(f"People like {TOPICS[i % 8]}." + " Really." * (i * 7 % 5)),
            "rejected": answer("No." + " Never." * (i % 4)),
        }
        for i in range(n)
    ]


def unpaired(n=24):
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs(n))
    ]


def prompts(n=24):
    return [{"prompt": prompt(i)} for i in range(n)]


def longer(completions, **kwargs):
    """A reward that differs within a group."""
    return [float(sum(map(ord, c if isinstance(c, str) else c[0]["content"])) % 7) for c in completions]


KINDS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, EMGuardDPOConfig, pairs, {}, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, EMGuardKTOConfig, unpaired, {}, {}),
    "grpo": (
        trl.GRPOTrainer, trl.GRPOConfig, EMGuardGRPOConfig, prompts, {"reward_funcs": longer},
        {"max_length": None, "num_generations": 2, "max_completion_length": 6, "temperature": 1.0},
    ),
    "rloo": (
        trl.RLOOTrainer, trl.RLOOConfig, None, prompts, {"reward_funcs": longer},
        {"max_length": None, "num_generations": 2, "max_completion_length": 6, "temperature": 1.0},
    ),
}  # fmt: skip


def build(kind, folder, callbacks=(), plain=False, model=None, adapter=ADAPTER, rows=None, block=None, cls=None, eval_rows=None, **over):
    """Build a trainer of a kind; `plain` gives TRL's own. The adapter is TRL's to make: of a given one it keeps a copy as reference."""
    host, config, guarded_config, make, given, args = KINDS[kind]
    asked = {k: v for k, v in {**settings(folder), **args, **over}.items() if v is not None}
    if block is not None:
        config, asked["em_regularizer"] = guarded_config, block
    return (cls or (host if plain else guard(host)))(
        model=tiny(adapter=False) if model is None else model,
        args=config(**asked),
        train_dataset=Dataset.from_list(make() if rows is None else rows),
        processing_class=chatml_tokenizer(),
        callbacks=list(callbacks),
        **({} if adapter is None else {"peft_config": adapter}),
        **({"eval_dataset": Dataset.from_list(eval_rows)} if eval_rows else {}),
        **given,
    )


def run(kind, folder, resume=None, **over):
    """Train and return the trainer."""
    over["model"] = over.get("model") or tiny(adapter=False)
    torch.manual_seed(0)  # the adapter is drawn next
    trainer = build(kind, folder, **over)
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    """Return what was trained, by name."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
