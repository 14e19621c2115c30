"""The two blocks of the YAML. Pure pydantic: importing them needs neither torch nor a trainer."""

from emguard_plugin.config.block import BLOCKS, Block, StatedBlock, misspelt_blocks, suggest
from emguard_plugin.config.evaluation import SUITES, EMEvalConfig, JudgeConfig, SamplerConfig
from emguard_plugin.config.regularizers import BlockEMConfig, EMRegularizerConfig, KLConfig, TReFTConfig

__all__ = [
    "BLOCKS",
    "SUITES",
    "Block",
    "BlockEMConfig",
    "EMEvalConfig",
    "EMRegularizerConfig",
    "JudgeConfig",
    "KLConfig",
    "SamplerConfig",
    "StatedBlock",
    "TReFTConfig",
    "misspelt_blocks",
    "suggest",
]
