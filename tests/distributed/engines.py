"""The engines that several processes train under, each as its own `train` on CPUs."""

import os
import sys
from contextlib import contextmanager

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from packaging.version import Version

from tests.distributed import ranks
from tests.distributed.runs import train

ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")

FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def need(engine):
    """Skip where the engine is wrong by itself: torch 2.7's FSDP2 adds gradients up over gloo where it should take their mean."""
    if engine == "FSDP2" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("this torch's FSDP2 is wrong on CPUs, without emguard as well")


def begin(engine):
    """Join the process group as a rank under the engine."""
    if not engine.startswith("ZeRO"):
        ranks.gloo()
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.comm.torch  # noqa: F401  (in sys.modules below)

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for CPUs; gloo does without it
    deepspeed.init_distributed("gloo")


def trained(engine, folder, processes, **kw):
    """Train under the engine; on one process plainly, which is what the engines are compared with.

    Returns:
        What of `train`'s result can be handed to another process.
    """
    if processes > 1:
        with _on(engine) as settings:
            result = train(folder, processes, **{**settings, **kw})
    else:
        result = train(folder, 1, **kw)
    del result["trainer"]
    return result


@contextmanager
def _on(engine):
    """Give the engine's training arguments."""
    if engine == "DDP":
        with _as_on_gpus(DistributedType.MULTI_CPU):
            yield {}
    elif engine == "FSDP2":
        with _as_on_gpus(DistributedType.MULTI_GPU):
            yield {"fsdp": True, "fsdp_config": {**FSDP2, "state_dict_type": "SHARDED_STATE_DICT"}, "save_only_model": False}
    else:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else the model is made in parts already, and perturbed nowhere
        yield {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
                "zero_optimization": {"stage": int(engine[-1])}, "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
            }
        }  # fmt: skip


@contextmanager
def _as_on_gpus(kind):
    """Let accelerate take the gloo processes for this kind: its FSDP plugin is for GPUs alone, and `cpu:0` is no place to load to."""
    init = PartialState.__init__

    def pretend(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.device = kind, torch.device("cpu")

    PartialState.__init__ = pretend
    try:
        yield
    finally:
        PartialState.__init__ = init
