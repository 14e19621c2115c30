"""`emguard sft`: `trl sft` with a guard, since `trl sft` has no plugin hook."""

from __future__ import annotations

import gc
from typing import Any

import torch


def parse(arguments: list[str]) -> tuple[Any, ...]:
    """Read command-line arguments and `--config run.yaml`.

    Args:
        arguments: What TRL's parser takes, plus `em_regularizer` and `em_eval`.

    Returns:
        The four dataclasses that `train` takes.

    Raises:
        ValueError: for a misspelt, empty or faulty block, for any key that TRL does not know, and when no data or a
            question file that is not there is named.
        OSError: when the file cannot be read.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from emguard_plugin.trainer import EMGuardSFTConfig

    # TRL knows `--config FILE` alone; its `--config=FILE` would be dropped.
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    _check_blocks(arguments)
    parser = TrlParser((ScriptArguments, EMGuardSFTConfig, ModelConfig, DatasetMixtureConfig), prog="emguard sft")
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(arguments)
    if not (dataset_args.datasets or script_args.dataset_name):
        raise ValueError("name the data: `dataset_name:` or `datasets:`.")
    if (config := training_args.eval_config()) is not None:
        config.check_files()
    return script_args, training_args, model_args, dataset_args


def _check_blocks(arguments: list[str]) -> None:
    import yaml

    from emguard_plugin.config import BLOCKS, misspelt_blocks

    keys = [a[2:].split("=")[0] for a in arguments if a.startswith("--")]
    if "--config" in arguments[:-1]:
        path = arguments[arguments.index("--config") + 1]
        with open(path, encoding="utf-8") as f:
            cfg = yaml.safe_load(f)
        if not isinstance(cfg, dict):
            raise ValueError(f"{path} is not a YAML mapping of settings.")
        keys += list(cfg)
        for key in (k for k in BLOCKS if k in cfg and cfg[k] is None):
            raise ValueError(f"`{key}:` is empty, so it asks for nothing. Fill it in, or remove it.")
    for key, meant in misspelt_blocks(keys).items():
        raise ValueError(f"unknown key `{key}`. Did you mean `{meant}`?")


def train(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train, save and measure; the arguments are those of TRL's own script.

    Raises:
        SystemExit: With `em_eval.fail_above` set, after everything is saved, if the gate is not passed: 1 above it, 3
            where the answers cannot tell, 2 where nothing could be measured. In a distributed run rank 0 ends so.
    """
    from emguard_plugin.evaluation.as_trained import as_trained
    from emguard_plugin.evaluation.post_train import measure_saved_model

    is_rank_0, rendering = _train_and_save(script_args, training_args, model_args, dataset_args)
    gc.collect()  # the trainer is gone: its memory is the measurement's
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    eval_config = training_args.eval_config()
    if eval_config is not None and is_rank_0:
        eval_config, notes = as_trained(eval_config, rendering)
        for note in notes:
            print(f"em_eval: {note}")
        measured = measure_saved_model(eval_config, training_args.output_dir, base=model_args.model_name_or_path)
        # Only a gate ends a run that was saved with an exit code: without one, a measurement that failed is a line.
        if eval_config.fail_above is not None and measured.exit_code:
            raise SystemExit(measured.exit_code)


def _train_and_save(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> tuple[bool, dict[str, Any]]:
    """Return whether this is rank 0, and by which settings the rows were rendered."""
    from datasets import load_dataset
    from trl import get_dataset, get_peft_config, get_quantization_config

    from emguard_plugin.trainer import EMGuardSFTTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    trainer = EMGuardSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if training_args.em_regularizer is None:
        trainer.accelerator.print("There is no `em_regularizer:` block: this run is NOT regularized.")
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    return trainer.is_world_process_zero(), dict(trainer.rendering_settings())
