"""`emguard sft`, `dpo`, `kto` and `grpo`: TRL's scripts with a guard, since they have no plugin hook."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

logger = logging.getLogger(__name__)


Kind = Literal["sft", "dpo", "kto", "grpo"]


def _types(kind: Kind) -> tuple[Any, ...]:
    """Return the dataclasses that hold a kind's options."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
    from trl.scripts.grpo import GRPOScriptArguments

    from emguard_plugin.training import trl_config

    script = GRPOScriptArguments if kind == "grpo" else ScriptArguments
    return script, getattr(trl_config, f"EMGuard{kind.upper()}Config"), ModelConfig, DatasetMixtureConfig


def parse(arguments: list[str], kind: Kind = "sft") -> tuple[Any, ...]:
    """Read command-line arguments and `--config run.yaml`, and look at every file, judge and server that they name.

    Args:
        arguments: What TRL's parser takes, plus `em_regularizer` and `em_eval`.
        kind: Of which of TRL's scripts.

    Returns:
        The four dataclasses that `train` takes.

    Raises:
        ValueError: for a misspelt, empty or faulty block, for any key that TRL does not know, when no data is named, and when a file or
            judge cannot work.
        SecretInConfigError: for a key of an API in a block.
    """
    from trl import TrlParser

    # TRL knows `--config FILE` alone; its `--config=FILE` would be dropped.
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser = TrlParser(_types(kind), prog=f"emguard {kind}")
    parser.error = _refuse
    folder = _check_keys(arguments, {action.dest for action in parser._actions} | {"env"})
    try:
        script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(arguments)
    except (TypeError, AttributeError, KeyError, IndexError, ImportError, RuntimeError, OverflowError) as exc:
        from emguard_plugin.files.secrets import SecretInConfigError

        if isinstance(exc, SecretInConfigError):
            raise
        raise ValueError(f"TRL cannot use these settings: {type(exc).__name__}: {exc}") from exc
    if not (dataset_args.datasets or script_args.dataset_name):
        raise ValueError("name the data: `dataset_name:` or `datasets:`.")
    _get_ready(training_args, folder)
    if kind == "grpo":
        script_args.reward_funcs = _rewards(script_args)
    return script_args, training_args, model_args, dataset_args


def _rewards(script_args: Any) -> list[Any]:
    """Return the rewards: TRL's own by name, a function of a module beside the YAML or in the current folder, or a reward model.

    Raises:
        ValueError: for none, or one that cannot be found.
    """
    from trl import rewards

    from emguard_plugin.config.functions import import_function

    found: list[Any] = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    for name in script_args.reward_funcs or ():
        if name == "get_soft_overlong_punishment":
            found.append(rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))  # as TRL's script has it
        elif name.isidentifier() and name in rewards.__all__:
            found.append(getattr(rewards, name))
        else:
            named = name if ":" in name else ":".join(name.rsplit(".", 1))
            found.append(import_function(named, f"`reward_funcs: {name}`"))
    if not found:
        raise ValueError("GRPO needs a reward: name a function, `reward_funcs: [my_rewards.score]`, or a `reward_model_name_or_path:`.")
    return found


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _check_keys(arguments: list[str], known: set[str]) -> Path:
    """Check the names of all keys, and return the folder of the YAML."""
    from emguard_plugin.config import BLOCKS, misplaced_blocks, suggest
    from emguard_plugin.config.settings_file import read_settings
    from emguard_plugin.files.secrets import refuse_keys, shown

    keys: list[Any] = [a[2:].split("=")[0] for a in arguments if a.startswith("--")]
    folder = Path()
    if "--config" in arguments:
        if arguments[-1] == "--config":
            raise ValueError("`--config` needs a file.")
        path = Path(arguments[arguments.index("--config") + 1])
        cfg, folder = read_settings(path), path.parent
        for name in BLOCKS:
            refuse_keys(cfg.get(name), name)
        for place in misplaced_blocks(cfg):
            raise ValueError(f"`{place}` stands where nothing reads it. Move it to the top level of the file, without indentation.")
        for key in (k for k in BLOCKS if k in cfg and cfg[k] is None):
            raise ValueError(f"`{key}:` is empty, so it asks for nothing. Fill it in, or remove it.")
        _named(list(cfg))
        for key in (k for k in cfg if k not in known):
            raise ValueError(f"{path}: unknown key `{shown(str(key))}`.{suggest(str(key), sorted(known))} Neither TRL nor emguard has it.")
    _named(keys)
    return folder


def _named(keys: list[Any]) -> None:
    from emguard_plugin.config import misspelt_blocks
    from emguard_plugin.files.secrets import shown

    for key, meant in misspelt_blocks(keys).items():
        raise ValueError(f"unknown key `{shown(str(key))}`. Did you mean `{meant}`?")


def _get_ready(training_args: Any, folder: Path) -> None:
    from emguard_plugin.config.settings_file import search_beside
    from emguard_plugin.regularizers.preview import check_inputs

    search_beside(folder)
    if (regularizer := training_args.regularizer_config()) is not None:
        check_inputs(regularizer)
    if (config := training_args.eval_config()) is not None:
        from emguard_plugin.evaluation.ready import get_ready

        for warning in get_ready(config, Path(training_args.output_dir) / "em_eval").warnings:
            logger.warning(warning)
        training_args.import_from = [str(folder.resolve())]


def train(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, kind: Kind = "sft") -> None:
    """Train, save and measure; the arguments are those of TRL's own script.

    Args:
        script_args: The data, and for GRPO the rewards.
        training_args: The config with our blocks.
        model_args: The model and its adapter.
        dataset_args: Several data sets.
        kind: Of which of TRL's scripts.

    Raises:
        SystemExit: With `em_eval.fail_above` set, after everything is saved, if the gate is not passed: 1 above it, 3
            where the answers cannot tell, 2 where nothing could be measured. In a distributed run rank 0 ends so.
    """
    from emguard_plugin.evaluation.asking.as_trained import as_trained
    from emguard_plugin.evaluation.post_train import measure_saved_model

    is_rank_0, rendering = _train_and_save(script_args, training_args, model_args, dataset_args, kind)
    gc.collect()  # the trainer is gone: its memory is the measurement's
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    eval_config = training_args.eval_config()
    if eval_config is not None and is_rank_0:
        eval_config, notes = as_trained(eval_config, rendering)
        for note in notes:
            print(f"em_eval: {note}")
        measured = measure_saved_model(
            eval_config, training_args.output_dir, base=model_args.model_name_or_path, import_from=getattr(training_args, "import_from", ())
        )
        # Only a gate ends a run that was saved with an exit code: without one, a measurement that failed is a line.
        if eval_config.fail_above is not None and measured.exit_code:
            raise SystemExit(measured.exit_code)


def _resume_from(training_args: Any) -> str | bool | None:
    """Return what `resume_from_checkpoint` names: a folder, True for the last checkpoint, or None, also where there is none yet."""
    from transformers.trainer_utils import get_last_checkpoint

    asked = str(training_args.resume_from_checkpoint or "")
    if asked.lower() in ("", "false"):
        return None
    if asked.lower() != "true":
        return asked
    folder = Path(training_args.output_dir)
    if folder.is_dir() and get_last_checkpoint(str(folder)):
        return True
    logger.warning("resume_from_checkpoint: %s holds no checkpoint yet; starting afresh", folder)
    return None


def _train_and_save(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, kind: Kind) -> tuple[bool, dict[str, Any]]:
    """Return whether this is rank 0, and by which settings the rows were rendered."""
    import trl
    from datasets import load_dataset
    from transformers import set_seed
    from trl import get_dataset, get_peft_config, get_quantization_config

    from emguard_plugin.training.trl_guard import guard

    set_seed(training_args.seed)  # the trainer seeds after the adapter is drawn: `seed:` would not fix a run

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
        dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    trainer: Any = guard(getattr(trl, f"{kind.upper()}Trainer"))(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **({"reward_funcs": script_args.reward_funcs} if kind == "grpo" else {}),
    )
    trainer.train(resume_from_checkpoint=_resume_from(training_args))
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}")
    return trainer.is_world_process_zero(), dict(trainer.rendering_settings())
