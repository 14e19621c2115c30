"""The two blocks of the YAML. Pure pydantic: importing them needs neither torch nor a trainer."""

from emguard_plugin.config.block import Block, StatedBlock, is_file
from emguard_plugin.config.evaluation import SUITES, EMEvalConfig, JudgeConfig, SamplerConfig
from emguard_plugin.config.methods import METHODS, EMRegularizerConfig, Method
from emguard_plugin.config.names import BLOCKS, misplaced_blocks, misspelt_blocks, suggest
from emguard_plugin.config.problems import BlockError, read_block
from emguard_plugin.config.regularizers import BlockEMConfig, KLConfig, MethodBlock, TReFTConfig

__all__ = [
    "BLOCKS",
    "METHODS",
    "SUITES",
    "Block",
    "BlockEMConfig",
    "BlockError",
    "EMEvalConfig",
    "EMRegularizerConfig",
    "JudgeConfig",
    "KLConfig",
    "Method",
    "MethodBlock",
    "SamplerConfig",
    "StatedBlock",
    "TReFTConfig",
    "is_file",
    "misplaced_blocks",
    "misspelt_blocks",
    "read_block",
    "suggest",
]
