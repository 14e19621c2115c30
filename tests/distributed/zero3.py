"""What one of two ranks sees of a model that DeepSpeed's ZeRO-3 has cut into parts."""

import os
import sys

import torch

from tests.tiny import chatml_tokenizer, tiny_model


def _model():
    return tiny_model("llama", vocab=len(chatml_tokenizer()))


def rank(number, processes, port, out):
    os.environ.update(
        DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(processes),
    )  # fmt: skip
    import deepspeed
    import deepspeed.comm.torch  # noqa: F401  (in sys.modules below)

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for CPUs; gloo does without it
    deepspeed.init_distributed("gloo")

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
