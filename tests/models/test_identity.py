"""Which model a reference belongs to: every element counts, however PEFT wraps it and however it is spread."""

import copy
import json
import time

import numpy as np
import pytest
import torch

from emguard_plugin.models.adapters import adapter_starts_at_zero
from emguard_plugin.models.identity import CHUNK, _multipliers, _of_part, checksum, identify
from tests.tiny import lora, perturb, tiny_model

PINNED = (11036085917375157624, 883216386536589868)
WRAPPERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "saved_head": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "tokens_of_both": {"trainable_token_indices": {"lm_head": [5], "embed_tokens": [6]}},
    "lora_embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "ensured": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def by_hand(t):
    """The formula of the module, in Python's whole numbers."""
    raw = t.contiguous().view(torch.uint8).numpy().tobytes() if t.ndim else t.reshape(1).view(torch.uint8).numpy().tobytes()
    row = t.element_size() * (t.shape[1:].numel() if t.ndim > 1 else 1)
    unit = next(u for u in (4, 2, 1) if row % u == 0)
    words = np.frombuffer(raw, {4: "<i4", 2: "<i2", 1: "u1"}[unit]).tolist()
    within, between = _multipliers(np.arange(CHUNK, dtype=np.uint64), 0), _multipliers(np.arange(4, dtype=np.uint64), 2)
    return tuple(sum(w * int(within[k][i % CHUNK]) * int(between[k][i // CHUNK]) for i, w in enumerate(words)) % 2**64 for k in (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (3, 40000), (2, 4, 8)], ids=str)
def test_the_sum_is_that_of_the_formula(shape, dtype):
    t = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    assert checksum(t) == by_hand(t)


def test_one_edited_element_always_shows_and_so_do_sets_that_cancel_in_a_plain_sum():
    t = torch.randn(300, 300).bfloat16()
    there, g = checksum(t), torch.Generator().manual_seed(0)
    for _ in range(200):
        edited = t.clone().view(-1)
        i, j = torch.randint(len(edited), (2,), generator=g).tolist()
        edited[i] = torch.nextafter(edited[i], torch.tensor(9.0).bfloat16())
        assert checksum(edited.view(t.shape)) != there, "the last bit of one element"
        flipped = t.clone().view(-1)
        flipped[[i, j]] *= -1
        assert i == j or checksum(flipped.view(t.shape)) != there, "two signs"
        swapped = t.clone().view(-1)
        swapped[[i, j]] = swapped[[j, i]]
        assert torch.equal(swapped, t.view(-1)) or checksum(swapped.view(t.shape)) != there


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_sums_over_shards_add_up(shards):
    t = torch.randn(131, 1003).half()
    parts = torch.chunk(t, shards)
    starts = np.cumsum([0, *(p.numel() for p in parts)])
    sums = [_of_part(p, int(at)) for p, at in zip(parts, starts, strict=False)]
    assert tuple(sum(s) % 2**64 for s in zip(*sums, strict=True)) == checksum(t)


def test_an_identity_means_the_same_in_every_version():
    assert checksum(torch.arange(100000, dtype=torch.int32)) == PINNED


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_identity_is_the_bases_under_every_wrapper(wrapper, tied):
    plain = identify(tiny_model("llama", tie_word_embeddings=tied))
    model = lora(tiny_model("llama", tie_word_embeddings=tied), **copy.deepcopy(WRAPPERS[wrapper]))
    assert adapter_starts_at_zero(model)
    assert identify(model) == plain
    moved = identify(perturb(model))
    assert moved.base == plain.base, "the base is below what trains"
    assert moved.reference != plain.reference, "a continued adapter is part of the reference"


def test_four_embedding_rows_of_a_base_that_was_initialised_anew():
    """sparse-edit: the rows stood between the 64 elements that counted before."""
    base, edited = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        edited.get_input_embeddings().weight[[100, 101, 102, 103]] = torch.randn(4, 32) * 0.02
    assert identify(base).base != identify(edited).base


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.2.mlp.down_proj.weight"])
def test_any_tensor_counts(name):
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.get_parameter(name).view(-1)[-1] += 1e-3
    assert identify(model).base != identify(other).base


def test_settings_that_compute_and_stored_buffers_count():
    model, other, third = (tiny_model("llama") for _ in range(3))
    other.config.rope_parameters["rope_theta"] = 50.0
    third.register_buffer("correction", torch.zeros(3))
    fourth = copy.deepcopy(third)
    fourth.correction[1] = 1
    assert len({identify(m).base for m in (model, other, third, fourth)}) == 4


def test_quantised_weights_count_by_their_bytes():
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(seed):
        torch.manual_seed(0)
        linear = torch.nn.Linear(64, 64, bias=False)
        made = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        made.weight = bnb.nn.Params4bit(linear.weight.data + 1e-1 * seed, requires_grad=False).to("cpu")
        return torch.nn.Sequential(made.to("cpu"))

    same, again, other = quantised(0), quantised(0), quantised(1)
    assert same[0].weight.dtype == torch.uint8
    assert identify(same) == identify(again) != identify(other)
    again[0].weight.quant_state.absmax[3] += 1
    assert identify(same) != identify(again), "the scales are weights too"


def test_it_is_quick_and_holds_no_copy():
    t = torch.zeros(2**20, 24, dtype=torch.bfloat16)  # 48 MiB
    started = time.perf_counter()
    checksum(t)
    assert t.nbytes / (time.perf_counter() - started) > 0.1e9, "a GB/s and more on an idle core"


def test_in_words():
    identity = identify(tiny_model("llama"))
    assert identity.in_words() == f"`LlamaForCausalLM` ({identity.base[:8]})"
    assert json.dumps(identity._asdict())


@pytest.mark.parametrize(
    "setting", [{"num_attention_heads": 8, "num_key_value_heads": 4}, {"hidden_act": "gelu"}, {"rms_norm_eps": 1e-3}], ids=str
)
def test_the_same_weights_read_by_other_settings_are_another_model(setting):
    """Eight heads of 4 fit the weights of four heads of 8, and compute something else."""
    model, other = tiny_model("llama"), tiny_model("llama", **setting)
    other.load_state_dict(model.state_dict())
    assert identify(model).base != identify(other).base


def test_how_a_model_is_run_is_no_part_of_what_it_is():
    model, other = tiny_model("qwen2"), tiny_model("qwen2", attn_implementation="eager", attention_dropout=0.2)
    other.config.use_cache, other.config._name_or_path, other.config.pad_token_id = False, "elsewhere", 3
    assert identify(model).base == identify(other).base


def test_experts_per_token_count():
    model, other = tiny_model("mixtral"), tiny_model("mixtral", num_experts_per_tok=1)
    assert identify(model).base != identify(other).base
