"""Each refusal of `check_trainer`, beside its nearest setting that is fine. What a CPU cannot be, is pretended."""

from types import SimpleNamespace

import pytest
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from emguard_plugin.training.host_checks import check_trainer
from tests.trl_runs import build, run, tiny

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
UNSET = {"gradient_checkpointing": True}  # non-reentrant in transformers 5


def elsewhere(kind="NO", processes=1, fsdp_version=2, zero_stage=3, parallel=None):
    """Return an accelerator as on other machines."""
    state = SimpleNamespace(
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=fsdp_version) if kind == "FSDP" else None,
        deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage),
    )
    kind = DistributedType[kind]
    return SimpleNamespace(distributed_type=kind, num_processes=processes, state=state, parallelism_config=parallel)


def check(folder, model=None, n_gpu=1, where=None, **over):
    trainer = build(folder, model=model, **over)
    trainer.args._n_gpu = n_gpu
    if where:
        trainer.accelerator = elsewhere(**where)
    check_trainer(trainer)


def tp(**sizes):
    return {"kind": "MULTI_GPU", "processes": 2, "parallel": ParallelismConfig(**sizes)}


def ddp(**over):
    return {"where": {"kind": "MULTI_GPU", "processes": 2}, **over}


def zero(stage, **over):
    return {"where": {"kind": "DEEPSPEED", "processes": 2, "zero_stage": stage}, **over}


REFUSED = {
    "DataParallel": ({"n_gpu": 2}, r"torch.nn.DataParallel over 2 GPUs is not supported. Launch with"),
    "reentrant on two": (ddp(**REENTRANT), r"reentrant gradient checkpointing on several processes.*use_reentrant: false"),
    "FSDP 1": ({"where": {"kind": "FSDP", "processes": 2, "fsdp_version": 1}}, r"FSDP version 1.*Set `fsdp_version: 2`"),
    "ZeRO-3, adapter, checkpointing": (zero(3, **NON_REENTRANT), r"ZeRO-3 with an adapter and gradient checkpointing"),
    "zero3-checkpointing, as TRL leaves it": (zero(3, **REENTRANT), r"ZeRO-3 with an adapter.*Set `gradient_checkpointing: false`"),
    "tensor parallel": ({"where": tp(tp_size=2)}, r"`tp_size: 2` splits the model over devices"),
    "context parallel": ({"where": tp(cp_size=2)}, r"`cp_size: 2` splits the model over devices"),
    "sequence parallel": ({"where": tp(sp_size=2)}, r"`sp_size: 2` splits the model over devices"),
}
FINE = {
    "one GPU": {},
    "reentrant on one": REENTRANT,
    "non-reentrant on two": ddp(**NON_REENTRANT),
    "checkpointing on two, kind unset": ddp(**UNSET),
    "reentrant is named, checkpointing off": ddp(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "FSDP 2": {"where": {"kind": "FSDP", "processes": 2}},
    "ZeRO-3 without checkpointing": zero(3),
    "ZeRO-3, all weights": zero(3, model=lambda: tiny(adapter=False), **NON_REENTRANT),
    "ZeRO-2": zero(2, **NON_REENTRANT),
    "data parallel mesh": {"where": tp(dp_replicate_size=2)},
}


def made(settings):
    return {**settings, "model": settings["model"]() if "model" in settings else None}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check(tmp_path, **made(settings))


@pytest.mark.parametrize("case", FINE)
def test_fine(tmp_path, case):
    check(tmp_path, **made(FINE[case]))


VIRTUAL = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused_before_training(tmp_path, kind):
    model = get_peft_model(tiny(adapter=False), VIRTUAL[kind])
    with pytest.raises(ValueError, match=f"the adapter type PeftType.{kind} adds virtual tokens in front of"):
        run(tmp_path, model=model)


def test_without_a_regularizer_nothing_is_refused(tmp_path):
    model = get_peft_model(tiny(adapter=False), VIRTUAL["PROMPT_TUNING"])
    assert run(tmp_path, model=model, callbacks=[]).state.global_step == 3
