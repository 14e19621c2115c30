"""The methods, each a `TrainerCallback` with a `penalty`; which there are stands in `config.methods`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emguard_plugin.config import EMRegularizerConfig
    from emguard_plugin.regularizers.base import EMRegularizerCallback


def load(place: str) -> Any:
    """Return what a `module:name` of the table of methods names."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), name)


def build_regularizers(config: EMRegularizerConfig) -> list[EMRegularizerCallback]:
    """Build the callbacks that an `em_regularizer:` block asks for.

    Args:
        config: The validated block.

    Returns:
        One callback per method.
    """
    from emguard_plugin.config import METHODS

    return [load(METHODS[name].callback).configured(block) for name, block in config.methods().items()]
