"""`em_eval.sampler`: what draws the answers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from emguard_plugin.config.provider import ProviderBlock, branch
from emguard_plugin.files.secrets import SecretInConfigError, check_endpoint, is_secret_name, shown


class SamplerConfig(ProviderBlock):
    """`em_eval.sampler`; its `provider:` is transformers, openai or vllm."""

    default: ClassVar[str] = "transformers"


class TransformersSamplerConfig(SamplerConfig):
    """`provider: transformers`."""

    provider: Literal["transformers"] = Field("transformers", description="In this process.")


class EndpointSamplerConfig(SamplerConfig):
    """`provider: openai`."""

    provider: Literal["openai"] = Field("openai", description="A model behind any OpenAI-compatible endpoint.")
    base_url: str = Field(description="The endpoint, up to and including `/v1`.")
    model: str | None = Field(None, description="The fine-tuned model's name there; default is MODEL itself.")
    base_model: str | None = Field(None, description="The base model's name there, for `evaluate_base`.")
    api_key_env: str | None = Field(None, description="NAME of the environment variable that holds the key.")
    allow_remote: bool = Field(False, description="Questions may be sent to another machine.")
    concurrency: int = Field(32, ge=1, le=512, description="Answers drawn at once.")
    timeout: float = Field(600, gt=0, description="Seconds that one answer may take.")
    deadline: float = Field(86400, gt=0, description="Seconds that drawing may take in all.")

    @model_validator(mode="after")
    def _may_be_sent(self) -> EndpointSamplerConfig:
        check_endpoint(self.base_url, self.api_key_env, self.allow_remote)
        return self


class VLLMSamplerConfig(SamplerConfig):
    """`provider: vllm`."""

    provider: Literal["vllm"] = Field("vllm", description="The command `vllm serve`, started and stopped by emguard.")
    args: list[str] = Field(default_factory=list, description="Further arguments of `vllm serve`.")
    concurrency: int = Field(32, ge=1, le=512, description="Answers drawn at once.")
    timeout: float = Field(600, gt=0, description="Seconds that one answer may take.")
    deadline: float = Field(86400, gt=0, description="Seconds that drawing may take in all.")

    @model_validator(mode="after")
    def _shows_no_key(self) -> VLLMSamplerConfig:
        for option in (arg.partition("=")[0] for arg in self.args if arg.startswith("-") and is_secret_name(arg.partition("=")[0])):
            raise SecretInConfigError(
                f"`sampler: args: {shown(option)}` would show a key in the list of processes. The server listens on this machine alone and "
                "needs none; tokens for a hub go into environment variables. Consider a key in the file as leaked."
            )
        return self


ServedSamplerConfig = EndpointSamplerConfig | VLLMSamplerConfig
AnySampler = Annotated[
    Annotated[TransformersSamplerConfig, Tag(branch("transformers"))]
    | Annotated[EndpointSamplerConfig, Tag(branch("openai"))]
    | Annotated[VLLMSamplerConfig, Tag(branch("vllm"))],
    Discriminator(SamplerConfig.branch),
]
"""A sampler by its `provider:`."""
