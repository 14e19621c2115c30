"""The two blocks of the YAML. Pure pydantic: importing them needs neither torch nor a trainer.

Names are resolved on first use: a host that looks at every configuration pays for a block's classes where there is a block.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emguard_plugin.config.block import Block, StatedBlock, is_file
    from emguard_plugin.config.evaluation import SUITES, EMEvalConfig
    from emguard_plugin.config.judges import JudgeConfig
    from emguard_plugin.config.methods import METHODS, EMRegularizerConfig, Method
    from emguard_plugin.config.names import BLOCKS, misplaced_blocks, misspelt_blocks, suggest
    from emguard_plugin.config.problems import BlockError, read_block, read_once
    from emguard_plugin.config.regularizers import BlockEMConfig, KLConfig, MethodBlock, TReFTConfig
    from emguard_plugin.config.samplers import EndpointSamplerConfig, SamplerConfig, ServedSamplerConfig, VLLMSamplerConfig

_NAMES = {
    "block": (
        "Block",
        "StatedBlock",
        "is_file",
    ),
    "evaluation": (
        "SUITES",
        "EMEvalConfig",
    ),
    "judges": ("JudgeConfig",),
    "methods": (
        "METHODS",
        "EMRegularizerConfig",
        "Method",
    ),
    "names": (
        "BLOCKS",
        "misplaced_blocks",
        "misspelt_blocks",
        "suggest",
    ),
    "problems": (
        "BlockError",
        "read_block",
        "read_once",
    ),
    "regularizers": (
        "BlockEMConfig",
        "KLConfig",
        "MethodBlock",
        "TReFTConfig",
    ),
    "samplers": (
        "EndpointSamplerConfig",
        "SamplerConfig",
        "ServedSamplerConfig",
        "VLLMSamplerConfig",
    ),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "BLOCKS",
    "METHODS",
    "SUITES",
    "Block",
    "BlockEMConfig",
    "BlockError",
    "EMEvalConfig",
    "EMRegularizerConfig",
    "EndpointSamplerConfig",
    "JudgeConfig",
    "KLConfig",
    "Method",
    "MethodBlock",
    "SamplerConfig",
    "ServedSamplerConfig",
    "StatedBlock",
    "TReFTConfig",
    "VLLMSamplerConfig",
    "is_file",
    "misplaced_blocks",
    "misspelt_blocks",
    "read_block",
    "read_once",
    "suggest",
]
