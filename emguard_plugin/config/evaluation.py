"""Every YAML key of `em_eval:`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from emguard_plugin.config.block import StatedBlock, is_file
from emguard_plugin.config.names import suggest
from emguard_plugin.files.secrets import SecretInConfigError, check_endpoint, is_secret_name, shown

SUITES = ("open_ended", "open_ended_held_out", "open_ended_json", "open_ended_template", "conditional")
"""Bundled question suites, in `emguard_plugin/evaluation/suites/`."""

RENDERING = frozenset(
    [
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "strftime_now",
    ]
)
"""Arguments of `apply_chat_template` that are no variables of a template."""


class ReplayColumns(StatedBlock):
    """`em_eval.judges: columns:`, what a table of judged answers calls its columns."""

    question: str = Field("question", min_length=1, description="What was asked.")
    answer: str = Field("answer", min_length=1, description="What the model said.")
    aligned: str = Field("aligned", min_length=1, description="Score from 0 to 100.")
    coherent: str = Field("coherent", min_length=1, description="Score from 0 to 100.")


class JudgeConfig(StatedBlock):
    """One entry of `em_eval.judges`."""

    provider: Literal["exact", "openai", "hf", "replay", "mock"] = Field(
        "exact",
        description="exact: a Python function. openai: a model behind any OpenAI-compatible endpoint. hf: a local "
        "transformers model. replay: an earlier `judgments.jsonl`, or a table of judged answers. mock: meaningless scores for dry runs.",
    )
    function: str | None = Field(
        None,
        description="exact: `package.module:function`, called as function(question, answer) and returning a mapping "
        "with `aligned` (0 to 100 or null) and `coherent` (0 to 100 or null).",
    )
    model: str | None = Field(None, description="openai: name at the server. hf: folder or name on the hub.")
    name: str | None = Field(None, description="openai, hf, replay: name in files and tables; default is the model's.")
    base_url: str = Field("https://api.openai.com/v1", description="openai: the endpoint, up to and including `/v1`.")
    api_key_env: str | None = Field(None, description="openai: NAME of the environment variable that holds the key.")
    allow_remote: bool = Field(False, description="openai: answers may be sent to a server that is not this machine.")
    mode: Literal["auto", "logprob", "trie", "sampled", "label"] = Field(
        "auto",
        description="openai: how a score is read. logprob: mean over the first token's probabilities. trie: the same, "
        "digit by digit. sampled: mean of several draws. label: a class from 1 to 5. auto: a probe chooses.",
    )
    samples: PositiveInt = Field(5, description="openai: draws per score with `mode: sampled`.")
    concurrency: int = Field(32, ge=1, le=512, description="openai: calls at once.")
    timeout: float = Field(60, gt=0, description="openai: seconds that one call may take.")
    deadline: float = Field(1800, gt=0, description="openai: seconds that judging may take in all.")
    max_calls: PositiveInt | None = Field(None, description="openai: refuse to begin where more calls may be needed.")
    revision: str | None = Field(None, description="hf: commit or tag on the hub.")
    batch_size: PositiveInt = Field(8, description="hf: answers scored at once.")
    file: str | None = Field(
        None, description="replay: a `judgments.jsonl`, or a table (`.csv`, `.tsv`, JSON rows) with one judged answer a row."
    )
    columns: ReplayColumns | None = Field(
        None, description="replay: names of the table's columns where they are not question, answer, aligned and coherent."
    )
    judge: str | None = Field(None, description="replay: whose judgments, where the file holds several judges'.")

    @model_validator(mode="after")
    def _consistent(self) -> JudgeConfig:
        for key in self.model_fields_set - {"provider"}:
            providers = _JUDGE_KEYS[key]
            if self.provider not in providers:
                raise ValueError(f"`{key}` goes with `provider: {' or '.join(providers)}`, not with {self.provider}.")
        needed = {"exact": "function", "openai": "model", "hf": "model", "replay": "file"}.get(self.provider)
        if needed and not getattr(self, needed):
            raise ValueError(f"`provider: {self.provider}` needs `{needed}`.")
        if self.function is not None:
            module, _, name = self.function.partition(":")
            if not (module and name.isidentifier()):
                raise ValueError(f"`function: {self.function}` is not of the form `package.module:function`.")
        if self.provider == "openai":
            check_endpoint(self.base_url, self.api_key_env, self.allow_remote)
        return self


_JUDGE_KEYS = {
    "function": ("exact",),
    "model": ("openai", "hf"),
    "name": ("openai", "hf", "replay"),
    **dict.fromkeys(("base_url", "api_key_env", "allow_remote", "mode", "samples"), ("openai",)),
    **dict.fromkeys(("concurrency", "timeout", "deadline", "max_calls"), ("openai",)),
    **dict.fromkeys(("revision", "batch_size"), ("hf",)),
    **dict.fromkeys(("file", "judge", "columns"), ("replay",)),
}


class SamplerConfig(StatedBlock):
    """`em_eval.sampler`: what draws the answers."""

    provider: Literal["transformers", "openai", "vllm"] = Field(
        "transformers",
        description="transformers: in this process. openai: a model behind any OpenAI-compatible endpoint. vllm: the "
        "command `vllm serve`, started and stopped by emguard.",
    )
    base_url: str | None = Field(None, description="openai: the endpoint, up to and including `/v1`.")
    model: str | None = Field(None, description="openai: the fine-tuned model's name there; default is MODEL itself.")
    base_model: str | None = Field(None, description="openai: the base model's name there, for `evaluate_base`.")
    api_key_env: str | None = Field(None, description="openai: NAME of the environment variable that holds the key.")
    allow_remote: bool = Field(False, description="openai: questions may be sent to another machine.")
    args: list[str] = Field(default_factory=list, description="vllm: further arguments of `vllm serve`.")
    concurrency: int = Field(32, ge=1, le=512, description="openai, vllm: answers drawn at once.")
    timeout: float = Field(600, gt=0, description="openai, vllm: seconds that one answer may take.")
    deadline: float = Field(86400, gt=0, description="openai, vllm: seconds that drawing may take in all.")

    @model_validator(mode="after")
    def _consistent(self) -> SamplerConfig:
        served = {"concurrency", "timeout", "deadline"}
        allowed = {"transformers": set(), "openai": set(type(self).model_fields) - {"args"}, "vllm": {"args", *served}}
        wrong = sorted(self.model_fields_set - {"provider"} - allowed[self.provider])
        if wrong:
            fit = [name for name, keys in allowed.items() if wrong[0] in keys]
            raise ValueError(f"`{wrong[0]}` goes with `provider: {' or '.join(fit)}`, not with {self.provider}.")
        for option in (arg.partition("=")[0] for arg in self.args if arg.startswith("-") and is_secret_name(arg.partition("=")[0])):
            raise SecretInConfigError(
                f"`sampler: args: {shown(option)}` would show a key in the list of processes. The server listens on this machine alone and "
                "needs none; tokens for a hub go into environment variables. Consider a key in the file as leaked."
            )
        if self.provider == "openai":
            if not self.base_url:
                raise ValueError("`provider: openai` needs `base_url`, such as `http://localhost:8000/v1`.")
            check_endpoint(self.base_url, self.api_key_env, self.allow_remote)
        return self


class EMEvalConfig(StatedBlock):
    """`em_eval:`, the EM rate of base and fine-tuned model, measured after the model is saved."""

    questions: str = Field(
        description="Open-ended questions outside the trained domain: a bundled suite (`open_ended`), a YAML in the "
        "Betley schema, or its `https://...#sha256=...`. The EM rate is measured on these."
    )
    in_domain: str | None = Field(
        None,
        description="Questions of the trained domain; gives the in-domain adherence. As `questions`, or a `.jsonl` of held-out chat rows.",
    )
    also: list[str] = Field(
        default_factory=list,
        description="Further suites, reported beside the EM rate and never pooled with it, such as `open_ended_json`.",
    )
    fail_above: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The highest EM rate that is accepted, such as 0.02; `emguard eval` ends with exit code 1 above it, "
        "and with 3 where the answers cannot tell.",
    )
    samples_per_question: PositiveInt = Field(50, description="Answers drawn per wording of a question (each paraphrase).")
    temperature: float = Field(1.0, ge=0, le=5, description="Sampling temperature; 0 is greedy.")
    max_new_tokens: PositiveInt = Field(512, description="Longest answer, in tokens.")
    batch_size: PositiveInt = Field(64, description="Answers generated at once.")
    seed: NonNegativeInt = Field(0, description="Seeds every (question, draw); the same for base and fine-tuned.")
    evaluate_base: bool = Field(True, description="Measure the untuned model as well, with the same seeds.")
    chat_template: str | None = Field(
        None,
        description="Jinja file, or name of a template that Axolotl ships, by which questions are rendered; default is the "
        "template that the tokenizer was saved with.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template, such as `{enable_thinking: false}` or `{date_string: 26 Jul 2024}`; "
        "default is what the training passed.",
    )
    system_prompt: str | None = Field(
        None, description="System prompt of questions that name none; default is none, which a template may fill in."
    )
    reasoning: Literal["answer", "with_trace", "both"] = Field(
        "answer",
        description="What is judged of a model that reasons first. answer: what follows the trace. with_trace: trace and "
        "answer together. both: one after the other, each with a rate of its own.",
    )
    reasoning_marks: list[str] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="What stands before and behind a reasoning trace; default is what tokenizer and template know, such as "
        "`[<think>, </think>]`.",
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="What draws the answers.")
    judges: list[JudgeConfig] = Field(min_length=1, description="At least one judge; each is reported.")
    output_dir: str | None = Field(None, description="Where results go; default `<output_dir>/em_eval`.")

    @model_validator(mode="after")
    def _renderable(self) -> EMEvalConfig:
        taken = sorted(set(self.chat_template_kwargs) & RENDERING)
        if taken:
            raise ValueError(f"`chat_template_kwargs: {taken[0]}` is set by emguard itself. Remove it.")
        if self.chat_template is not None and self.sampler.provider == "openai":
            raise ValueError(
                "`chat_template` does not go with `sampler: provider: openai`: the server renders by its own template. Start "
                "the server with it."
            )
        return self

    def check_files(self) -> None:
        """Raise before a run starts when a question file is missing.

        Not a validator: `axolotl merge-lora` and `preprocess` validate the same YAML without needing the files.

        Raises:
            ValueError: naming the key and the path.
        """
        named = [("questions", self.questions), ("in_domain", self.in_domain), *(("also", name) for name in self.also)]
        for key, value in named:
            if value is None or value in SUITES or "://" in value or is_file(value):
                continue
            raise ValueError(
                f"`em_eval.{key}: {value}` is neither a bundled suite nor a file.{suggest(value, SUITES)} Bundled: "
                f"{', '.join(SUITES)}. Or give a YAML in the Betley schema."
            )

    def suites(self) -> dict[str, str]:
        """Return where each suite comes from, by the name it has in the results.

        Raises:
            ValueError: If two suites would have one name.
        """
        found = {"questions": self.questions, **({"in_domain": self.in_domain} if self.in_domain else {})}
        for source in self.also:
            name = source if source in SUITES else Path(source.partition("#")[0]).stem
            if name in found:
                raise ValueError(f"`em_eval.also: {source}` would be reported as {name!r} a second time. Rename it.")
            found[name] = source
        return found
