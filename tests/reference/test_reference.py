import pytest
import torch
from safetensors.torch import load_file, save_file

from emguard_plugin.models.adapters import adapter_off, adapter_starts_at_zero
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.reference.stored import load_reference, save_reference, tensors_hash
from tests.tiny import lora, perturb, tiny_model

TENSORS = {"0.0.key": torch.randn(1, 3, 4), "0.0.value": torch.randn(1, 3, 4).bfloat16()}


def test_round_trip_is_bit_identical(tmp_path):
    save_reference(tmp_path / "r.safetensors", TENSORS, {"settings": "a"})
    assert tensors_hash(load_reference(tmp_path / "r.safetensors", {"settings": "a"})) == tensors_hash(TENSORS)


def test_hash_sees_values_names_shapes_and_dtypes():
    a = torch.zeros(2, 3)
    hashes = {tensors_hash(x) for x in ({"k": a}, {"j": a}, {"k": a.T}, {"k": a.half()}, {"k": a + 1})}
    assert len(hashes) == 5


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "r.safetensors"
    save_reference(path, TENSORS, {})
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = f.metadata()
    changed = load_file(path)
    changed["0.0.key"][0, 0, 0] += 1e-3
    save_file(changed, path, metadata=meta)
    with pytest.raises(ValueError, match="does not match its hash"):
        load_reference(path, {})


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "r.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        load_reference(tmp_path / "r.safetensors", {})


def test_a_reference_of_other_settings_is_refused(tmp_path):
    save_reference(tmp_path / "r.safetensors", TENSORS, {"settings": "a"})
    with pytest.raises(ValueError, match="recorded for another `settings`"):
        load_reference(tmp_path / "r.safetensors", {"settings": "b"})


@pytest.mark.parametrize(
    ("kwargs", "zero"),
    [
        ({}, True),
        ({"init_lora_weights": "gaussian"}, True),
        ({"use_dora": True}, True),
        ({"init_lora_weights": False}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "olora"}, False),
        ({"bias": "lora_only"}, False),
    ],
)
def test_adapters_that_start_at_zero(kwargs, zero):
    base = tiny_model("llama")
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        want = base(ids).logits.clone()
        model = lora(base, **kwargs).eval()
        assert adapter_starts_at_zero(model) is zero
        if zero:
            perturb(model)
            with adapter_off(model):
                assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [5, 6]}])
def test_adapter_off_is_what_peft_calls_so(kwargs):
    model = perturb(lora(tiny_model("llama"), **kwargs), 0.1).eval()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        on = model(ids).logits
        with adapter_off(model):
            off = model(ids).logits
            with adapter_off(model):
                assert torch.equal(model(ids).logits, off)
            assert torch.equal(model(ids).logits, off)
        assert torch.equal(model(ids).logits, on)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before, "PEFT's own would thaw what is frozen"
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, off)
    assert not torch.equal(on, off)


def test_a_frozen_adapter_below_a_fresh_one():
    """Switching adapters off switches both off, and the model before this run had the first."""
    from peft import LoraConfig

    model = perturb(lora(tiny_model("llama")), 0.1)
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for active, zero in ((["default", "second"], False), (["second"], True)):
        model.base_model.set_adapter(active)
        for name, p in model.named_parameters():
            p.requires_grad_("second" in name)
        assert adapter_starts_at_zero(model) is zero


def test_no_adapter():
    model = tiny_model("llama")
    assert not adapter_starts_at_zero(model)
    with pytest.raises(RuntimeError, match="no adapter"), adapter_off(model):
        pass


def test_eval_mode_restores_after_an_error():
    model = tiny_model("llama").train()

    def fail():
        with eval_mode(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(m.training for m in model.modules())


def test_a_4_bit_base_is_not_repacked_by_a_pass_in_eval_mode():
    """On CPUs with bf16 instructions bitsandbytes rounds 4-bit weights in eval mode; said here of any CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(2, 64)
    before, absmax = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    with eval_mode(layer), torch.no_grad():
        layer(x)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(layer.weight.quant_state.absmax, absmax)
    assert layer.training
    assert layer.support_avx512bf16_for_cpu
    with torch.no_grad():
        layer.eval()(x)  # the check can fail: this is what bitsandbytes does by itself
    assert layer.weight.quant_state.absmax.dtype == torch.bfloat16
