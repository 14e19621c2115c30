"""Every YAML key of `em_regularizer:`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from emguard_plugin.config.block import Block


class TReFTConfig(Block):
    """`em_regularizer.treft`: hold the keys and values of chat-template tokens (arXiv 2606.06667)."""

    coef: float = Field(
        5.0, ge=0, allow_inf_nan=False, description="lambda of Eq. 3; the paper uses 1 to 30. 0 measures only."
    )
    tokens: Literal["prefix", "postfix"] = Field(
        "prefix",
        description="prefix: everything before the first user content. postfix: the tokens between query and answer, "
        "for templates without a system prompt (Qwen3).",
    )
    layers: Literal["all"] | list[NonNegativeInt] = Field(
        "all", description="0-based decoder layers to hold; `all` is the paper's choice."
    )
    extra_prefixes: list[str] = Field(
        default_factory=list,
        description="System prompts that do not occur in the data but will at inference; their prefixes are held too.",
    )
    postfix_reference: Literal["shared", "per_row"] | None = Field(
        None,
        description="tokens: postfix only. shared (default): the untuned model's postfix after an empty query (paper). "
        "per_row: the untuned model's postfix after the same query; needs an adapter.",
    )
    compat: bool = Field(
        False,
        description="Penalise k_proj/v_proj of the un-normalised residual stream, as the authors' released code does. "
        "For replication only.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TReFTConfig:
        if self.layers != "all" and not self.layers:
            raise ValueError("`layers: []` holds nothing. Use `layers: all`, list at least one layer, or `coef: 0`.")
        if self.tokens == "postfix" and self.extra_prefixes:
            raise ValueError("`extra_prefixes` goes with `tokens: prefix`. Remove it, or set `tokens: prefix`.")
        if self.tokens == "prefix" and self.postfix_reference is not None:
            raise ValueError("`postfix_reference` goes with `tokens: postfix`. Remove it, or set `tokens: postfix`.")
        if self.tokens == "postfix" and self.compat:
            raise ValueError("`compat: true` covers `tokens: prefix` only. Set `compat: false`.")
        return self


class EMRegularizerConfig(Block):
    """`em_regularizer:`, any combination of methods."""

    treft: TReFTConfig | None = Field(None, description="TReFT: keys and values of the chat-template tokens.")

    @model_validator(mode="before")
    @classmethod
    def _no_empty_method(cls, data: Any) -> Any:
        for name in cls.model_fields if isinstance(data, dict) else ():
            if name in data and data[name] is None:
                raise ValueError(f"`{name}:` is empty; write `{name}: {{}}` for the defaults, or remove it.")
        return data

    @model_serializer(mode="wrap")
    def _only_methods(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Hosts dump and validate again: a method that nobody named must not come back as an empty one.
        return {name: block for name, block in handler(self).items() if block is not None}

    @model_validator(mode="after")
    def _not_empty(self) -> EMRegularizerConfig:
        if not self.methods():
            raise ValueError(
                "the block names no method, so the run would be unguarded. Add `treft:`, or remove `em_regularizer:`."
            )
        return self

    def methods(self) -> dict[str, Block]:
        """Return the methods that the block asks for, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}
