"""The two blocks of the YAML. Pure pydantic: importing them needs neither torch nor a trainer."""

from emguard_plugin.config.block import Block, StatedBlock, is_file
from emguard_plugin.config.evaluation import SUITES, EMEvalConfig
from emguard_plugin.config.judges import JudgeConfig
from emguard_plugin.config.methods import METHODS, EMRegularizerConfig, Method
from emguard_plugin.config.names import BLOCKS, misplaced_blocks, misspelt_blocks, suggest
from emguard_plugin.config.problems import BlockError, read_block, read_once
from emguard_plugin.config.regularizers import BlockEMConfig, KLConfig, MethodBlock, TReFTConfig
from emguard_plugin.config.samplers import EndpointSamplerConfig, SamplerConfig, ServedSamplerConfig, VLLMSamplerConfig

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
