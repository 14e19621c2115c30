"""`emguard sft`: `trl sft` with a guard, since `trl sft` has no plugin hook."""

from __future__ import annotations

from typing import Any


def main(arguments: list[str]) -> None:
    """Train from command-line arguments or `--config run.yaml`, save, measure.

    Args:
        arguments: What TRL's parser takes, plus `em_regularizer` and `em_eval`.

    Raises:
        ValueError: for a misspelt block, or when no data set is named.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from emguard_plugin.trainer import EMGuardSFTConfig

    _refuse_misspelt_blocks(arguments)
    parser = TrlParser((ScriptArguments, EMGuardSFTConfig, ModelConfig, DatasetMixtureConfig), prog="emguard sft")
    train(*parser.parse_args_and_config(arguments))


def _refuse_misspelt_blocks(arguments: list[str]) -> None:
    import yaml

    from emguard_plugin.config import misspelt_blocks

    keys = [a[2:].split("=")[0] for a in arguments if a.startswith("--")]
    if "--config" in arguments[:-1]:
        with open(arguments[arguments.index("--config") + 1], encoding="utf-8") as f:
            keys += list(yaml.safe_load(f) or {})
    for key, meant in misspelt_blocks(keys).items():
        raise ValueError(f"unknown key `{key}`. Did you mean `{meant}`?")


def train(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train, save and measure; the arguments are those of TRL's own script.

    Raises:
        SystemExit: With `em_eval.fail_above` set, after everything is saved, if the gate is not passed: 1 above it, 3
            where the answers cannot tell, 2 where nothing could be measured. In a distributed run rank 0 ends so.
    """
    from datasets import load_dataset
    from trl import get_dataset, get_peft_config, get_quantization_config

    from emguard_plugin.evaluation.post_train import measure_saved_model
    from emguard_plugin.trainer import EMGuardSFTTrainer

    eval_config = training_args.eval_config()
    if eval_config is not None:
        eval_config.check_files()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    elif script_args.dataset_name:
        dataset = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    else:
        raise ValueError("name the data: `dataset_name:` or `datasets:`.")
    trainer = EMGuardSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    if eval_config is not None and trainer.is_world_process_zero():
        measured = measure_saved_model(eval_config, training_args.output_dir, base=model_args.model_name_or_path)
        # Only a gate ends a run that was saved with an exit code: without one, a measurement that failed is a line.
        if eval_config.fail_above is not None and measured.exit_code:
            raise SystemExit(measured.exit_code)
