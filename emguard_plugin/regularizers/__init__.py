"""The three methods, each a `TrainerCallback` with a `penalty`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emguard_plugin.config import EMRegularizerConfig
    from emguard_plugin.regularizers.base import EMRegularizerCallback

# The one table: YAML key -> module:class. A new method adds a line.
METHODS = {"treft": "treft.callback:TReFTCallback", "block_em": "block_em.callback:BlockEMCallback", "kl": "kl.callback:KLCallback"}


def build_regularizers(config: EMRegularizerConfig) -> list[EMRegularizerCallback]:
    """Build the callbacks that an `em_regularizer:` block asks for.

    Args:
        config: The validated block.

    Returns:
        One callback per method; the block's keys are the callback's keyword arguments.
    """
    callbacks = []
    for name, block in config.methods().items():
        module, _, cls = METHODS[name].partition(":")
        callbacks.append(getattr(import_module(f"{__name__}.{module}"), cls)(**block.model_dump()))
    return callbacks
