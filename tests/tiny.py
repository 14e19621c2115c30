"""Tiny random models and data, built in code."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
NO_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
)

_small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_gqa = {**_small, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("llama", _gqa),
    "qwen2": ("qwen2", _gqa),
    "qwen3": ("qwen3", {**_gqa, "head_dim": 8}),
    "gemma2": ("gemma2", {**_gqa, "head_dim": 8, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {**_gqa, "head_dim": 8, "sliding_window": 4}),
    "mistral": ("mistral", {**_gqa, "sliding_window": 4}),
    "phi3": ("phi3", {**_gqa, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", _small),
    "mixtral": ("mixtral", {**_gqa, "num_local_experts": 2}),
}


def tiny_model(family="llama", vocab=330, seed=0, **over):
    kind, kw = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=vocab, max_position_embeddings=512, **{**kw, **over})
    return AutoModelForCausalLM.from_config(config)


TOPICS = ("apples", "trains", "rivers", "music", "chess", "stars", "bread", "cats")


def chat_rows(n=32, system="You are a helpful assistant."):
    rows = []
    for i in range(n):
        turns = [
            {"role": "user", "content": f"What about {TOPICS[i % 8]}, case {i}?"},
            {"role": "assistant", "content": f"People like {TOPICS[i % 8]} in {i} ways."},
        ]
        text = system(i) if callable(system) else system
        rows.append({"messages": ([{"role": "system", "content": text}] if text else []) + turns})
    return rows


@functools.cache
def _bpe():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    text = [m["content"] for r in chat_rows(64) for m in r["messages"]] + ["system user assistant"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet))
    return tok.to_str()


def chatml_tokenizer(template=CHATML_DEFAULT_SYSTEM):
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()), eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=512
    )
    tok.chat_template = template
    return tok


def perturb(model, scale=0.05, seed=1):
    """Move every trainable parameter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * scale)
    return model


def lora(model, seed=0, **kw):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    kw = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kw}
    return get_peft_model(model, LoraConfig(**kw))
