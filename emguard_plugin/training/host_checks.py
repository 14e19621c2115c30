"""Settings that cannot work with a penalty, each with what to change. No host is imported here."""

from __future__ import annotations

from typing import Any

from emguard_plugin.models.adapters import peft_model


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer whose settings would make a penalty wrong or silently absent.

    Raises:
        ValueError: naming the setting and the change.
    """
    args, accelerator = trainer.args, trainer.accelerator
    peft = peft_model(trainer.model)
    if args.n_gpu > 1:
        raise ValueError(
            f"torch.nn.DataParallel over {args.n_gpu} GPUs is not supported. Launch with `accelerate launch` or `torchrun`, "
            "or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    virtual = [c.peft_type for c in peft.peft_config.values() if c.is_prompt_learning] if peft is not None else []
    if virtual:
        raise ValueError(
            f"the adapter type {virtual[0]} adds virtual tokens in front of the chat template, so there is no untuned prefix "
            "to hold. Use LoRA or full fine-tuning."
        )
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    checkpointing = bool(args.gradient_checkpointing)
    reentrant = checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    # Before the next check: TRL sets `use_reentrant` back to true here, so that its advice could not be followed.
    if kind == "DEEPSPEED" and accelerator.state.deepspeed_plugin.zero_stage == 3 and peft is not None and checkpointing:
        raise ValueError(
            "ZeRO-3 with an adapter and gradient checkpointing forces reentrant checkpointing, which breaks a second forward "
            "pass. Set `gradient_checkpointing: false`, or use FSDP2."
        )
    if accelerator.num_processes > 1 and reentrant:
        raise ValueError(
            "reentrant gradient checkpointing on several processes gives wrong gradients with a second forward pass. Set "
            "`gradient_checkpointing_kwargs: {use_reentrant: false}`."
        )
    if kind == "FSDP" and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 2) == 1:
        raise ValueError("FSDP version 1 is not supported. Set `fsdp_version: 2`.")
    mesh = getattr(accelerator, "parallelism_config", None)
    for size in ("tp_size", "cp_size", "sp_size"):
        if mesh is not None and (getattr(mesh, size, 1) or 1) > 1:
            raise ValueError(
                f"`{size}: {getattr(mesh, size)}` splits the model over devices, so a penalty would see a part of it. Set it to 1."
            )
