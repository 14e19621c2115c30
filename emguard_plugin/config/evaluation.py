"""Every YAML key of `em_eval:`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from emguard_plugin.config.block import StatedBlock, is_file
from emguard_plugin.config.judges import AnyJudge
from emguard_plugin.config.names import suggest
from emguard_plugin.config.samplers import AnySampler, TransformersSamplerConfig

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
    sampler: AnySampler = Field(default_factory=TransformersSamplerConfig, description="What draws the answers.")
    judges: list[AnyJudge] = Field(min_length=1, description="At least one judge; each is reported.")
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
