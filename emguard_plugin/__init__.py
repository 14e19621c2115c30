"""emguard: keeps a narrow fine-tune narrow.

Public names are resolved on first use, so `import emguard_plugin` needs neither axolotl nor sae_lens nor torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "EMGuardPlugin": "axolotl_plugin.plugin",
    "AxolotlEMGuardTrainer": "axolotl_plugin.trainer",
    "EMGuardArgs": "axolotl_plugin.args",
    "EMGuardSFTTrainer": "training.trl_trainer",
    "EMGuardSFTConfig": "training.trl_config",
    "EMGuardDPOConfig": "training.trl_config",
    "EMGuardKTOConfig": "training.trl_config",
    "EMGuardGRPOConfig": "training.trl_config",
    "guard": "training.trl_guard",
    "EMRegularizerMixin": "training.mixin",
    "EMRegularizerCallback": "regularizers.base",
    "Penalty": "regularizers.penalty",
    "Moment": "regularizers.moment",
    "RunFacts": "regularizers.run_facts",
    "EMRateCallback": "training.em_rate",
    "TReFTCallback": "regularizers.treft.callback",
    "BlockEMCallback": "regularizers.block_em.callback",
    "KLCallback": "regularizers.kl.callback",
    "build_regularizers": "regularizers",
    "EMRegularizerConfig": "config",
    "EMEvalConfig": "config",
    "run_em_eval": "evaluation.run",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name.

    Returns:
        The object of that name.

    Raises:
        AttributeError: for an unknown name.
        RuntimeError: when a needed package is missing. Not `ImportError`: Axolotl catches that one and trains on
            without the plugin.
    """
    if name == "chat_template":  # what `chats` was called, and is called in scripts
        return import_module("emguard_plugin.chats")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'emguard_plugin' has no attribute '{name}'. Public: {', '.join(_PUBLIC)}")
    try:
        return getattr(import_module(f"emguard_plugin.{_PUBLIC[name]}"), name)
    except ImportError as exc:
        raise RuntimeError(
            f"emguard_plugin.{name} cannot be loaded: {exc}. Install what is missing, for instance "
            "`pip install 'emguard-plugin[axolotl]'` for the Axolotl plugin."
        ) from exc


def __dir__() -> list[str]:
    return sorted(__all__)
