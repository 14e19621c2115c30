"""The variants that `overhead.py` compares: trainers on the same random weights and rows, guarded in different ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAIN, TREFT, AGAIN = "plain SFT", "TReFT (prefix)", "plain SFT again"
IN_BATCH = "in-batch hidden states (released code's way)"
KL_LIVE, KL_CACHED, KL_EAGER = "KL, adapter off", "KL, recorded reference", "KL, second model, all logits"
BLOCK_LIVE, BLOCK_CACHED = "BLOCK-EM, adapter off", "BLOCK-EM, recorded base"
BLOCK_EAGER = "BLOCK-EM, second model, whole encoder"
VARIANTS = {
    "treft": (PLAIN, TREFT, IN_BATCH, AGAIN),
    "kl": (PLAIN, KL_LIVE, KL_CACHED, KL_EAGER, AGAIN),
    "block_em": (PLAIN, BLOCK_LIVE, BLOCK_CACHED, BLOCK_EAGER, AGAIN),
}
BY_ITSELF = (TREFT, KL_LIVE, KL_CACHED, KL_EAGER)  # BLOCK-EM reads the training forward: there is nothing to time alone
SHAPES = {
    "8x512": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def tokenizer_with_prefix(n: int, vocab: int) -> Any:
    """Return a word-level tokenizer whose chat template prints `n` tokens before the user's content."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(vocab - 3))])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    head = " ".join(f"w{7 * i}" for i in range(n))
    fast.chat_template = f"{head} {{% for m in messages %}}{{{{ m['content'] + ' w1 ' }}}}{{% endfor %}}"
    return fast


def training_set(tokenizer: Any, rows: int, length: int) -> Any:
    """Return tokenised rows of `length` random ids behind the prefix."""
    import torch
    from datasets import Dataset

    from emguard_plugin.chats import read_template

    prefix = list(read_template(tokenizer).prefix)
    g = torch.Generator().manual_seed(0)
    tails = torch.randint(3, len(tokenizer), (rows, length - len(prefix)), generator=g).tolist()
    labels = [[-100] * len(prefix) + tail for tail in tails]
    return Dataset.from_dict({"input_ids": [prefix + tail for tail in tails], "labels": labels})


def in_batch_trainer() -> type:
    """Return a trainer that penalises projections of the training batch's hidden states."""
    import torch
    from trl import SFTTrainer

    from emguard_plugin.models.kv import base_causal_lm, decoder_layers
    from emguard_plugin.models.modes import eval_mode

    class InBatchTrainer(SFTTrainer):
        prefix: list[int]
        coef = 5.0
        reference: list[tuple[torch.Tensor, torch.Tensor]] | None = None

        def project(self, model: Any, hidden: Any, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            attn = [block.self_attn for block in decoder_layers(model)]
            return [(a.k_proj(h[:, :n]), a.v_proj(h[:, :n])) for a, h in zip(attn, hidden, strict=False)]

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            n = len(self.prefix)
            if self.reference is None:
                ids = torch.tensor([self.prefix], device=inputs["input_ids"].device)
                with torch.no_grad(), eval_mode(model):
                    hidden = base_causal_lm(model)(input_ids=ids, output_hidden_states=True).hidden_states
                    self.reference = [(k.float(), v.float()) for k, v in self.project(model, hidden, n)]
            inputs["output_hidden_states"] = True
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            penalty = torch.zeros((), device=loss.device)
            for now, ref in zip(self.project(model, outputs.hidden_states, n), self.reference, strict=True):
                for x, r in zip(now, ref, strict=True):
                    drift = (x.float() - r).square().sum(-1) / r.square().sum(-1).clamp_min(1e-12)
                    penalty = penalty + drift.mean() / len(self.reference)
            loss = loss + self.coef * penalty
            return (loss, outputs) if return_outputs else loss

    return InBatchTrainer


def second_model(model: Any) -> Any:
    """Return a frozen copy of the model that a trainer's adapter sits on."""
    import torch

    from emguard_plugin.models.kv import base_causal_lm

    base = base_causal_lm(model)
    with torch.device(model.device):
        second = type(base)._from_config(base.config, dtype=base.dtype)
    second.load_state_dict({k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora_" not in k})
    return second.eval().requires_grad_(False)


def build(variant: str, s: dict[str, Any], folder: Path, callback: Any) -> Any:
    """Build a variant's trainer on the same random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from emguard_plugin import EMGuardSFTTrainer, TReFTCallback
    from emguard_plugin.chats import read_template

    shape = SHAPES[s["shape"]]
    tokenizer = tokenizer_with_prefix(s["prefix_tokens"], shape["vocab_size"])
    data = training_set(tokenizer, s["batch"] * 4, s["length"])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if s["device"] == "cuda" else torch.float32
    with torch.device(s["device"]):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, max_position_embeddings=4096), dtype=dtype)
    peft_config = None
    if not s["full"]:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = SFTConfig(
        output_dir=str(folder / variant.replace(" ", "_").replace("'", "")),
        max_steps=s["warmup"] + s["rounds"],
        per_device_train_batch_size=s["batch"],
        gradient_accumulation_steps=s["accumulation"],
        gradient_checkpointing=s["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=s["length"],
        learning_rate=1e-4,
        bf16=s["device"] == "cuda",
        use_cpu=s["device"] == "cpu",
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    import overhead_block_em
    from overhead_kl import kl_callback, second_model_trainer

    eager = {IN_BATCH: in_batch_trainer, KL_EAGER: second_model_trainer, BLOCK_EAGER: overhead_block_em.second_model_trainer}
    cls = eager[variant]() if variant in eager else SFTTrainer
    guards = {
        TREFT: lambda: TReFTCallback(coef=5.0),
        KL_LIVE: lambda: kl_callback(s, folder, "live"),
        KL_CACHED: lambda: kl_callback(s, folder, "memory"),
        BLOCK_LIVE: lambda: overhead_block_em.block_em_callback(s, model.config, "live"),
        BLOCK_CACHED: lambda: overhead_block_em.block_em_callback(s, model.config, "memory"),
    }
    if variant in guards:
        cls, callback = EMGuardSFTTrainer, [callback, guards[variant]()]
    trainer = cls(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callback if isinstance(callback, list) else [callback],
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if variant == IN_BATCH:
        trainer.prefix = list(read_template(tokenizer).prefix)
    if variant == KL_EAGER:
        trainer.prepare_anchors(kl_callback(s, folder, "live"), data, tokenizer)
    if variant == BLOCK_EAGER:
        trainer.prepare_latents(s)
    return trainer


def weight_bytes(s: dict[str, Any]) -> int:
    """Return the bytes of the model's weights, without the adapter's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[s["shape"]]))
    return sum(p.numel() for p in model.parameters()) * (2 if s["device"] == "cuda" else 4)


def on_step_begin(do: Callable[[Any], None]) -> Any:
    """Return a callback that calls `do(state)` when a step begins."""
    from transformers import TrainerCallback

    class OnStepBegin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            do(state)

    return OnStepBegin()
