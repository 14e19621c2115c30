"""Axolotl's `rl:` trainers with penalties.

Axolotl asks plugins for a trainer class before it settles model, reference model and rewards, and calls theirs without any of these. So
its own trainer is built, and its class is then put behind the mixin, which has no `__init__` and no state before `train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emguard_plugin.training.mixin import EMRegularizerMixin
from emguard_plugin.training.trl_guard import rows_of_trainer


class _AxolotlRL(EMRegularizerMixin):
    """What Axolotl's YAML says of a run; its SFT trainer has the YAML itself."""

    emguard_cfg: Any

    def _resumes_by_itself(self) -> bool:
        return bool(self.emguard_cfg.auto_resume_from_checkpoints)

    def _template_kwargs(self) -> dict[str, Any]:
        return dict(self.emguard_cfg.chat_template_kwargs or {})

    def rendering_settings(self) -> Mapping[str, Any]:
        """Return the YAML, without the data sets, whose prompt strategies are not those of SFT."""
        return {k: v for k, v in self.emguard_cfg.to_dict().items() if k != "datasets"}


def guard_built(trainer: Any, cfg: Any) -> None:
    """Put the mixin in front of the class of a trainer that Axolotl has built.

    Args:
        trainer: For `rl: dpo`, `ipo`, `kto` or `grpo`.
        cfg: The YAML.

    Raises:
        TypeError: for another trainer.
    """
    if isinstance(trainer, EMRegularizerMixin):
        return
    host = type(trainer)
    bases = (rows_of_trainer(host), _AxolotlRL, host)
    trainer.__class__ = type(f"EMGuard{host.__name__}", bases, {"emguard_cfg": cfg, "__module__": host.__module__})
