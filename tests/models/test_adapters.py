import pytest
import torch

from emguard_plugin.models.adapters import adapter_off, adapter_scaled
from tests.tiny import lora, perturb, tiny_model


@torch.no_grad()
def test_a_scaled_adapter_adds_that_many_times_as_much():
    model, ids = perturb(lora(tiny_model("llama")), 0.1).eval(), torch.arange(12)[None]
    tuned = model(input_ids=ids).logits
    with adapter_off(model):
        base = model(input_ids=ids).logits
    with adapter_scaled(model, 0.0):
        torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=0, atol=0)
    layer = next(m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict))
    x = torch.randn(2, layer.in_features)
    plain, added = layer.base_layer(x), layer(x) - layer.base_layer(x)
    with adapter_scaled(model, 3.0):
        torch.testing.assert_close(layer(x) - plain, 3 * added, rtol=1e-4, atol=1e-6)
    with pytest.raises(AttributeError), adapter_scaled(model, 3.0):
        model.get_submodule("nowhere")
    torch.testing.assert_close(model(input_ids=ids).logits, tuned, rtol=0, atol=0)


def test_without_an_adapter_there_is_nothing_to_scale():
    with pytest.raises(RuntimeError, match="no adapter to scale"), adapter_scaled(tiny_model("llama"), 2.0):
        pass
