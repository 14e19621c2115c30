"""Axolotl's SFT trainer with penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer

from emguard_plugin.axolotl_plugin.hosts import PLUGIN_NAMES, finds_plugins
from emguard_plugin.chats import Chat
from emguard_plugin.training.mixin import EMRegularizerMixin


class AxolotlEMGuardTrainer(EMRegularizerMixin, AxolotlTrainer):
    """`AxolotlTrainer` plus `EMRegularizerMixin`.

    `EMGuardPlugin` selects it. Naming it as `trainer_cls: emguard_plugin.AxolotlEMGuardTrainer` as well makes a missing or
    misspelt plugin an error: before 0.21 Axolotl skips a plugin that it cannot import, but not a trainer.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, unless the plugin that reads `em_regularizer:` is absent.

        Returns:
            What Axolotl's trainer returns.

        Raises:
            RuntimeError: when this trainer runs without `EMGuardPlugin`.
        """
        from axolotl.integrations.base import PluginManager

        plugins = PluginManager.get_instance().plugins
        listed = self.axolotl_cfg.plugins or []
        if not any(name in PLUGIN_NAMES and (name in listed or finds_plugins()) for name in plugins):
            raise RuntimeError(
                "`trainer_cls: emguard_plugin.AxolotlEMGuardTrainer` without the plugin: any `em_regularizer:` block was "
                "dropped. Add `plugins: [emguard_plugin.EMGuardPlugin]`."
            )
        return super().train(*args, **kwargs)

    def _resumes_by_itself(self) -> bool:
        return bool(self.axolotl_cfg.auto_resume_from_checkpoints)

    def _template_kwargs(self) -> dict[str, Any]:
        kwargs = self.axolotl_cfg.chat_template_kwargs
        return dict(kwargs) if kwargs else {}

    def rendering_settings(self) -> Mapping[str, Any]:
        """Return the YAML."""
        return self.axolotl_cfg.to_dict()

    def _chats(self) -> Callable[[], Iterable[Chat]] | None:
        from emguard_plugin.axolotl_plugin.chats import read_chats

        return partial(read_chats, self.axolotl_cfg, getattr(self.processing_class, "tokenizer", self.processing_class))

    def _batch_tokens(self) -> float | None:
        cfg = self.axolotl_cfg
        return cfg.sequence_len * cfg.micro_batch_size if cfg.sample_packing else None
