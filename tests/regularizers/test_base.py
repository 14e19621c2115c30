from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from emguard_plugin.models.kv import read_kv
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.penalty import Penalty
from tests.tiny import lora, tiny_model

IDS = torch.tensor([[4, 9, 17, 33, 8, 21, 60]])
NO_ARGS = SimpleNamespace()


class HeldKeys(EMRegularizerCallback):
    """The squared keys of chosen layers."""

    name = "keys"

    def __init__(self, coef=1.0, layers=(0,)):
        super().__init__(coef)
        self.layers = self._layer_names = layers

    def prepare(self, run):
        self.prepared = True
        return self.name

    def penalty(self, moment):
        per_layer = torch.stack([k.square().mean() for k in read_kv(moment.model, IDS, self.layers).keys])
        return Penalty(per_layer.mean(), per_layer=per_layer)


def adapter_in_last_layer(require_grads=True):
    model = lora(tiny_model("llama"), target_modules=["down_proj"], layers_to_transform=[2])
    if require_grads:
        model.enable_input_require_grads()
    return model.train()


def test_frozen_layers_are_found_out_although_embeddings_require_grad():
    model = adapter_in_last_layer()
    assert HeldKeys(coef=0).measure(Moment(model, {}, 0)).value.item() > 0
    assert read_kv(model, IDS, [0]).keys[0].requires_grad, "what `requires_grad` alone would believe"
    with pytest.raises(RuntimeError, match=r"em_regularizer\.keys: the penalty has no gradient.*set `coef: 0`"):
        HeldKeys().measure(Moment(model, {}, 0))


def test_a_penalty_without_any_gradient_is_found_out_at_every_step():
    callback = HeldKeys()
    callback.measure(Moment(lora(tiny_model("llama")), {}, 0))
    with pytest.raises(RuntimeError, match="no gradient"):
        callback.measure(Moment(adapter_in_last_layer(require_grads=False), {}, 1))


def test_the_graph_is_looked_at_again_in_the_next_run():
    callback = HeldKeys()
    callback.prepare(None)
    good, bad = lora(tiny_model("llama")), adapter_in_last_layer()
    callback.measure(Moment(good, {}, 0))
    callback.measure(Moment(bad, {}, 1))  # the same run: not walked again
    callback.on_train_begin(NO_ARGS, TrainerState(), TrainerControl())
    with pytest.raises(RuntimeError, match="no gradient"):
        callback.measure(Moment(bad, {}, 0))


@pytest.mark.parametrize("grads", [True, False], ids=["input_grads", "plain"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full", "embeddings", "one_bias"])
def test_whatever_trains_is_no_false_alarm(kind, grads):
    model = tiny_model("qwen2")
    if kind in ("lora", "dora"):
        model = lora(model, use_dora=kind == "dora", target_modules=["v_proj"])
    elif kind != "full":
        only = "embed_tokens.weight" if kind == "embeddings" else "layers.1.self_attn.k_proj.bias"
        for n, p in model.named_parameters():
            p.requires_grad_(n.endswith(only))
    if grads:
        model.enable_input_require_grads()
    callback = HeldKeys(layers=(1,))
    if kind in ("lora", "dora"):  # v_proj of layer 0 reaches the keys of layer 1
        with pytest.raises(RuntimeError, match="no gradient"):
            HeldKeys(layers=(0,)).measure(Moment(model, {}, 0))
    assert callback.measure(Moment(model.train(), {}, 0)).value.requires_grad


def test_coef_0_has_no_graph():
    assert not HeldKeys(coef=0).measure(Moment(lora(tiny_model("llama")), {}, 0)).value.requires_grad


@pytest.mark.parametrize("coef", [-1, float("nan"), float("inf"), "much", None])
def test_a_coef_that_means_nothing(coef):
    with pytest.raises(ValueError, match=r"`keys\.coef` must be a finite number"):
        HeldKeys(coef=coef)


def test_a_penalty_that_is_not_finite_names_step_and_layer():
    callback, model = HeldKeys(layers=(0, 2)), tiny_model("llama")
    callback.measure(Moment(model, {}, 6))
    callback.on_pre_optimizer_step(NO_ARGS, TrainerState(global_step=6), TrainerControl())
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight.fill_(float("nan"))
    callback.measure(Moment(model, {}, 7))
    with pytest.raises(FloatingPointError, match=r"the penalty is nan at step 8, first at layer 2\. The weights"):
        callback.on_pre_optimizer_step(NO_ARGS, TrainerState(global_step=7), TrainerControl())


def test_a_trainer_that_never_asks_for_the_penalty_is_refused():
    with pytest.raises(RuntimeError, match="HeldKeys does nothing under this trainer"):
        HeldKeys().on_train_begin(NO_ARGS, TrainerState(), TrainerControl())
