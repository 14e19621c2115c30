"""BLOCK-EM's part of `overhead.py`: random latents at 60 % depth, and the published way written plainly.

That way (arXiv 2602.00767) holds a second, frozen model, runs all of it on the training batch, and puts the SAE's whole encoder,
16 latents per dimension as in its main experiments, on the hidden states of both. Written from its description.
"""

from __future__ import annotations

from typing import Any

from overhead_variants import second_model

LATENTS, EXPANSION, DEPTH = 20, 16, 0.6
COEF = 0.01


def blocked_layer(layers: int) -> int:
    """Return the 0-based layer after which 60 % of the layers have run."""
    return round(DEPTH * layers) - 1


def encoder_columns(s: dict[str, Any], width: int, layer: int) -> Any:
    """Return 20 random latents after a layer."""
    import torch

    from emguard_plugin.latents import SubsetEncoder

    g = torch.Generator().manual_seed(2)
    weight = torch.randn(LATENTS, width, generator=g) / width**0.5
    signs = torch.tensor([1.0, -1.0] * (LATENTS // 2))
    return SubsetEncoder(layer, list(range(LATENTS)), signs, "standard", "relu_pre", weight, torch.zeros(LATENTS), weight).to(s["device"])


def block_em_callback(s: dict[str, Any], config: Any, cache: str) -> Any:
    """Return a `BlockEMCallback` on random latents of a model of this config."""
    from emguard_plugin import BlockEMCallback
    from emguard_plugin.latents import LatentSet

    encoder = encoder_columns(s, config.hidden_size, blocked_layer(config.num_hidden_layers))
    latents = LatentSet(model="random", width=config.hidden_size, encoders=[encoder])
    return BlockEMCallback(coef=COEF, latents=latents, cache=cache)


def second_model_trainer() -> type:
    """Return a trainer with a second model and a whole SAE encoder."""
    import torch
    from trl import SFTTrainer

    from emguard_plugin.models.kv import base_causal_lm

    class SecondModelTrainer(SFTTrainer):
        second: Any

        def prepare_latents(self, s: dict[str, Any]) -> None:
            """Load the second model and make an encoder whose first latents are the others'."""
            self.second = second_model(self.model)
            base = base_causal_lm(self.model)
            width, self.layer = base.config.hidden_size, blocked_layer(base.config.num_hidden_layers)
            columns = encoder_columns(s, width, self.layer)
            encoder = torch.randn(width, EXPANSION * width, device=self.args.device) / width**0.5
            encoder[:, :LATENTS] = columns.weight.T
            self.encoder, self.signs = encoder, columns.signs

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            kept: list[Any] = []
            layer = base_causal_lm(model).model.layers[self.layer]
            hook = layer.register_forward_hook(lambda module, args, out: kept.append(out))
            held = inputs["labels"] != -100
            tokens = {k: inputs[k] for k in ("input_ids", "attention_mask", "position_ids") if k in inputs}
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            hook.remove()
            hook = self.second.model.layers[self.layer].register_forward_hook(lambda module, args, out: kept.append(out))
            with torch.no_grad():
                self.second(**tokens)
            hook.remove()
            z, base = ((h.float() @ self.encoder).relu()[..., :LATENTS] for h in kept)
            bad = (self.signs * (z - base)).relu().square().sum(-1)
            # Normalised as TRL's loss is: by the tokens of the whole step.
            return loss + COEF * (bad * held).sum() / num_items_in_batch

    return SecondModelTrainer
