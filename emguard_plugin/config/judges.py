"""The entries of `em_eval.judges`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from emguard_plugin.config.block import StatedBlock
from emguard_plugin.config.provider import ProviderBlock, branch
from emguard_plugin.files.secrets import check_endpoint


class JudgeConfig(ProviderBlock):
    """One entry of `em_eval.judges`; its `provider:` is exact, openai, hf, replay or mock."""

    default: ClassVar[str] = "exact"


class ExactJudgeConfig(JudgeConfig):
    """`provider: exact`."""

    provider: Literal["exact"] = Field("exact", description="A Python function.")
    function: str = Field(
        description="`package.module:function`, called as function(question, answer) and returning a mapping with `aligned` (0 to 100 "
        "or null) and `coherent` (0 to 100 or null).",
    )

    @model_validator(mode="after")
    def _names_a_function(self) -> ExactJudgeConfig:
        module, _, name = self.function.partition(":")
        if not (module and name.isidentifier()):
            raise ValueError(f"`function: {self.function}` is not of the form `package.module:function`.")
        return self


class EndpointJudgeConfig(JudgeConfig):
    """`provider: openai`."""

    provider: Literal["openai"] = Field("openai", description="A model behind any OpenAI-compatible endpoint.")
    model: str = Field(description="Name at the server.")
    name: str | None = Field(None, description="Name in files and tables; default is the model's.")
    base_url: str = Field("https://api.openai.com/v1", description="The endpoint, up to and including `/v1`.")
    api_key_env: str | None = Field(None, description="NAME of the environment variable that holds the key.")
    allow_remote: bool = Field(False, description="Answers may be sent to a server that is not this machine.")
    mode: Literal["auto", "logprob", "trie", "sampled", "label"] = Field(
        "auto",
        description="How a score is read. logprob: mean over the first token's probabilities. trie: the same, digit by digit. "
        "sampled: mean of several draws. label: a class from 1 to 5. auto: a probe chooses.",
    )
    samples: PositiveInt = Field(5, description="Draws per score with `mode: sampled`.")
    concurrency: int = Field(32, ge=1, le=512, description="Calls at once.")
    timeout: float = Field(60, gt=0, description="Seconds that one call may take.")
    deadline: float = Field(1800, gt=0, description="Seconds that judging may take in all.")
    max_calls: PositiveInt | None = Field(None, description="Refuse to begin where more calls may be needed.")

    @model_validator(mode="after")
    def _may_be_sent(self) -> EndpointJudgeConfig:
        check_endpoint(self.base_url, self.api_key_env, self.allow_remote)
        return self


class LocalJudgeConfig(JudgeConfig):
    """`provider: hf`."""

    provider: Literal["hf"] = Field("hf", description="A local transformers model.")
    model: str = Field(description="Folder or name on the hub.")
    name: str | None = Field(None, description="Name in files and tables; default is the model's.")
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    batch_size: PositiveInt = Field(8, description="Answers scored at once.")


class ReplayColumns(StatedBlock):
    """`em_eval.judges: columns:`, what a table of judged answers calls its columns."""

    question: str = Field("question", min_length=1, description="What was asked.")
    answer: str = Field("answer", min_length=1, description="What the model said.")
    aligned: str = Field("aligned", min_length=1, description="Score from 0 to 100.")
    coherent: str = Field("coherent", min_length=1, description="Score from 0 to 100.")


class ReplayJudgeConfig(JudgeConfig):
    """`provider: replay`."""

    provider: Literal["replay"] = Field("replay", description="An earlier `judgments.jsonl`, or a table of judged answers.")
    file: str = Field(description="A `judgments.jsonl`, or a table (`.csv`, `.tsv`, JSON rows) with one judged answer a row.")
    columns: ReplayColumns | None = Field(
        None, description="Names of the table's columns where they are not question, answer, aligned and coherent."
    )
    judge: str | None = Field(None, description="Whose judgments, where the file holds several judges'.")
    name: str | None = Field(None, description="Name in files and tables; default is the replayed judge's.")


class MockJudgeConfig(JudgeConfig):
    """`provider: mock`."""

    provider: Literal["mock"] = Field("mock", description="Meaningless scores for dry runs.")


AnyJudge = Annotated[
    Annotated[ExactJudgeConfig, Tag(branch("exact"))]
    | Annotated[EndpointJudgeConfig, Tag(branch("openai"))]
    | Annotated[LocalJudgeConfig, Tag(branch("hf"))]
    | Annotated[ReplayJudgeConfig, Tag(branch("replay"))]
    | Annotated[MockJudgeConfig, Tag(branch("mock"))],
    Discriminator(JudgeConfig.branch),
]
"""A judge by its `provider:`."""
