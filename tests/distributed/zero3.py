"""What one of two ranks sees of a model that DeepSpeed's ZeRO-3 has cut into parts."""

import torch

from tests.distributed.engines import begin
from tests.tiny import chatml_tokenizer, tiny_model


def _model():
    return tiny_model("llama", vocab=len(chatml_tokenizer()))


def rank(out):
    begin("ZeRO-3")
    import deepspeed

    number, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    from emguard_plugin.latents.latent_set import _fingerprint
    from emguard_plugin.models.identity import identify
    from emguard_plugin.models.output_head import output_head

    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": processes, "zero_optimization": {"stage": 3}}):
        model = _model()
    found = {
        "cut": model.lm_head.weight.numel() < model.lm_head.weight.ds_numel,
        "identity": identify(model, processes, number),
        "head": type(output_head(model)).__name__,
        "fingerprint": list(_fingerprint(model)),
    }
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = _model()
    plain.load_state_dict(weights, strict=False)
    found |= {"identity of the whole": identify(plain), "fingerprint of the whole": list(_fingerprint(plain))}
    torch.save(found, out / f"{number}.pt")
