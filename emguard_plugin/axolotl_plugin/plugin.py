"""YAML -> validated config -> callbacks -> trainer, and the post-train hook.

Axolotl keeps plugins of earlier configs in one process, so every hook first asks whether *this* config has our block.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.logging import get_logger

    from emguard_plugin.axolotl_plugin.hosts import PLUGIN_NAMES, finds_plugins
    from emguard_plugin.config.names import BLOCKS, misplaced_blocks, misspelt_blocks
    from emguard_plugin.files.progress import VARIABLE
except ImportError as exc:  # Axolotl catches this one while it loads a plugin, and trains on without it
    raise RuntimeError(
        f"emguard_plugin.EMGuardPlugin cannot be loaded: {exc}. Install what is missing, for instance "
        "`pip install 'emguard-plugin[axolotl]'`."
    ) from exc

LOG = get_logger("axolotl.emguard")  # Axolotl shows INFO of loggers with its own name alone


def _config(cfg: Any, name: str) -> Any:
    """Return a block that Axolotl's schema has validated and handed on as a dictionary."""
    from emguard_plugin.axolotl_plugin.asked import MODELS, plain
    from emguard_plugin.config import read_once

    return read_once(MODELS[name], plain(cfg.get(name)), name)


def _folder(cfg: Any) -> Path:
    """Return the folder of the YAML, or the current one for a configuration that was made in Python."""
    path = cfg.axolotl_config_path
    return Path(path).expanduser().resolve().parent if path else Path.cwd()


def _is_rank_0() -> bool:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def _listed(cfg: Any) -> bool:
    plugins = cfg.get("plugins") or []
    return any(name in PLUGIN_NAMES for name in (plugins if isinstance(plugins, list | tuple) else [plugins]))


def _is_ours(plugin: Any) -> bool:
    return (type(plugin).__module__, type(plugin).__name__) == (__name__, EMGuardPlugin.__name__)


class EMGuardPlugin(BasePlugin):
    """`plugins: [emguard_plugin.EMGuardPlugin]`; Axolotl 0.21 and later find it by its entry point.

    So it is asked about every configuration there. Where that has nothing of ours, it adds no keys to Axolotl's schema and imports
    nothing more.
    """

    _announced: Any = None
    _acts = True
    """Whether the configuration is ours, and no other instance acts for it."""

    def get_input_args(self) -> str | None:
        """Return the path of the pydantic class that adds our keys."""
        return "emguard_plugin.axolotl_plugin.args.EMGuardArgs" if self._acts else None

    def register(self, cfg: Any) -> None:
        """Read the raw YAML, before unknown keys are dropped and before the whole configuration is printed.

        Raises:
            ValueError: for a misspelt, misplaced, empty or faulty block, and for a key that stands twice in one.
            SecretInConfigError: for a key of an API in a block.
        """
        self._acts = self._asked(cfg)
        if not self._acts:
            return
        from emguard_plugin.axolotl_plugin.asked import look_at_settings

        look_at_settings(cfg)
        if cfg.get("em_regularizer") is None and _listed(cfg):
            LOG.warning("EMGuardPlugin is listed but there is no `em_regularizer:` block: this run is NOT regularized.")
        reentrant_default = cfg.get("gradient_checkpointing") and not cfg.get("gradient_checkpointing_kwargs")
        if cfg.get("em_regularizer") and reentrant_default and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            LOG.info("em_regularizer: setting gradient_checkpointing_kwargs to {use_reentrant: false}")
            cfg["gradient_checkpointing_kwargs"] = {"use_reentrant": False}

    def _asked(self, cfg: Any) -> bool:
        from axolotl.integrations.base import PluginManager

        if next((plugin for plugin in PluginManager.get_instance().plugins.values() if _is_ours(plugin)), self) is not self:
            return False  # the entry point's acts, or the one that is listed under our other name
        if _listed(cfg):
            return True
        # Axolotl keeps plugins of earlier configurations in one process: not listed means ours only where nobody need list us.
        return finds_plugins() and bool(any(block in cfg for block in BLOCKS) or misspelt_blocks(list(cfg)) or misplaced_blocks(cfg))

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Look at files, judges and servers: this hook is the first that `axolotl train` calls and `merge-lora` does not.

        Raises:
            ValueError: when one cannot work.
        """
        if preprocess or not self._acts or not (cfg.em_regularizer or cfg.em_eval):
            return
        from emguard_plugin.config.settings_file import search_beside

        search_beside(_folder(cfg))
        if cfg.em_regularizer:
            from emguard_plugin.regularizers.preview import check_inputs

            check_inputs(_config(cfg, "em_regularizer"))
        if cfg.em_eval:
            from emguard_plugin.evaluation.ready import get_ready

            ready = get_ready(_config(cfg, "em_eval"), Path(cfg.output_dir) / "em_eval")
            for warning in ready.warnings if _is_rank_0() else ():
                LOG.warning(warning)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Return our trainer when a regularizer is asked for."""
        if not self._acts or not cfg.em_regularizer or cfg.rl:
            return None  # for `rl:` Axolotl would build ours without a model: see `rl.py`
        from emguard_plugin.axolotl_plugin.trainer import AxolotlEMGuardTrainer

        return AxolotlEMGuardTrainer

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return what tells the program that started this run where it is, if it asked."""
        if not self._acts or not os.environ.get(VARIABLE):
            return []
        from emguard_plugin.training.steps import StepsCallback

        return [StepsCallback()]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Return the regularizers.

        Raises:
            RuntimeError: when another plugin's trainer won.
        """
        if not self._acts or not cfg.em_regularizer:
            return []
        from emguard_plugin.regularizers import build_regularizers
        from emguard_plugin.training.mixin import EMRegularizerMixin

        if cfg.rl:
            from emguard_plugin.axolotl_plugin.rl import guard_built

            guard_built(trainer, cfg)
        if not isinstance(trainer, EMRegularizerMixin):
            raise RuntimeError(
                f"em_regularizer: the trainer is {type(trainer).__name__}, which another plugin brought; it would never add a "
                "penalty. Remove that plugin, or `em_regularizer:`."
            )
        return build_regularizers(_config(cfg, "em_regularizer"))

    def post_train(self, cfg: Any, model: Any) -> None:
        """Say who measures: `axolotl.train.train()`, called from Python, never gets to `post_train_unload`."""
        if not self._acts or not cfg.em_eval or not _is_rank_0() or self._announced is cfg:
            return
        self._announced = cfg  # this hook is called before and after the save
        path = cfg.axolotl_config_path or "YAML"
        LOG.info(
            "em_eval: `axolotl train` measures the EM rate once the model is saved. After axolotl.train.train() in your own "
            f"code, run `emguard eval {cfg.output_dir} --config {path} --base {cfg.base_model}`."
        )

    def post_train_unload(self, cfg: Any) -> None:
        """Measure the EM rate of the saved model, on rank 0, in a process of its own."""
        if not self._acts or not cfg.em_eval or not _is_rank_0():
            return
        from emguard_plugin.evaluation.asking.as_trained import as_trained, saved_template
        from emguard_plugin.evaluation.post_train import measure_saved_model

        config = _config(cfg, "em_eval")
        config, notes = as_trained(config, cfg.to_dict(), saved_template(cfg.output_dir))
        for note in notes:
            LOG.info(f"em_eval: {note}")
        measure_saved_model(config, cfg.output_dir, base=cfg.base_model, import_from=[str(_folder(cfg))])
