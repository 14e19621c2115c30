"""Every YAML key of the methods of `em_regularizer:`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from emguard_plugin.config.block import Block, exists, is_file
from emguard_plugin.config.names import suggest

CACHES = ("auto", "live", "memory")


def check_cache(cache: str, words: tuple[str, ...] = CACHES) -> None:
    """Refuse a `cache` that is neither a known word nor looks like a folder.

    Raises:
        ValueError: with the nearest word.
    """
    if cache not in words and not ("/" in cache or cache.startswith((".", "~"))):
        raise ValueError(f"`cache: {cache}` is neither {', '.join(words)} nor a folder such as `./{cache}`.{suggest(cache, words)}")


def check_folder(key: str, cache: str, words: tuple[str, ...] = CACHES) -> None:
    """Raise before a run starts when a `cache` cannot be a folder that is written to; what lies in it is looked at when it is opened.

    Raises:
        ValueError: naming the key and the path.
    """
    if cache in words:
        return
    try:
        path = Path(cache).expanduser()
    except RuntimeError:
        raise ValueError(f"`{key}: {cache}`: there is no such home folder. Write the path out.") from None
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    if not there.is_dir():
        raise ValueError(f"`{key}: {cache}`: {'it' if there == path else there} is a file. Name a folder, new or empty.")
    if not os.access(there, os.R_OK | os.X_OK | (0 if there == path else os.W_OK)):
        raise ValueError(f"`{key}: {cache}`: no permission to {'read' if there == path else 'write into'} {there}. Name another folder.")


class MethodBlock(Block):
    """What every method's block answers."""

    def folders(self) -> dict[str, str]:
        """Return the folders that the method writes, by key: no two methods may share one."""
        return {}

    def check_files(self) -> None:
        """Raise before a run starts when a file that the method needs is missing.

        Raises:
            ValueError: naming the key and the path.
        """


class TReFTConfig(MethodBlock):
    """`em_regularizer.treft`: hold the keys and values of chat-template tokens (arXiv 2606.06667)."""

    coef: float = Field(5.0, ge=0, allow_inf_nan=False, description="lambda of Eq. 3; the paper uses 1 to 30. 0 measures only.")
    tokens: Literal["prefix", "postfix"] = Field(
        "prefix",
        description="prefix: everything before the first user content. postfix: the tokens between query and answer, "
        "for templates without a system prompt (Qwen3).",
    )
    layers: Literal["all"] | list[NonNegativeInt] = Field("all", description="0-based decoder layers to hold; `all` is the paper's choice.")
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


class KLConfig(MethodBlock):
    """`em_regularizer.kl`: hold next-token distributions on other-domain chats (arXiv 2602.07852)."""

    coef: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="lambda, in nats per token; 0.7 when neither this nor `target` is set. The paper's 1e5 (LoRA), a mean over "
        "the vocabulary, is 0.66 here on Qwen2.5 and 0.78 on Llama 3. 0 measures only.",
    )
    anchors: str = Field(
        "bundled",
        min_length=1,
        description="bundled; a JSONL of chats, a folder, or a data set's name (`name:split`); train: the training rows; self, or "
        "self:<any of these>: the prompts alone, with replies that the model gives before training.",
    )
    direction: Literal["base||model", "model||base"] = Field(
        "base||model",
        description="base||model: sum_v p_base (log p_base - log p_model), the paper's. model||base: sum_v p_model (log p_model "
        "- log p_base).",
    )
    tokens: Literal["all", "assistant"] = Field(
        "all", description="Which tokens' predictions to hold: all (the paper's choice), or those of the replies."
    )
    ratio: float = Field(
        0.125, gt=0, le=64, allow_inf_nan=False, description="Anchor tokens per training token; the paper's recipe has about 4."
    )
    target: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Instead of `coef`: hold the anchor KL near this value, in nats per token, by moving the coefficient.",
    )
    cache: str = Field(
        "auto",
        min_length=1,
        description="Where the reference comes from. live: the adapter is switched off for a second forward pass. memory, or a "
        "folder such as ./kl_reference: its hidden states, recorded before step 1. auto: live where an adapter allows it, else memory.",
    )

    def folders(self) -> dict[str, str]:
        """Return the cache, where it is a folder."""
        return {} if self.cache in CACHES else {"cache": self.cache}

    def check_folder(self) -> None:
        """Raise when `cache` cannot be a folder."""
        check_folder("em_regularizer.kl.cache", self.cache)

    @model_validator(mode="after")
    def _coherent(self) -> KLConfig:
        if self.coef is not None and self.target is not None:
            raise ValueError("`coef` and `target` are both set. Keep `coef` for a fixed weight, `target` to hold the KL at a value.")
        check_cache(self.cache)
        return self

    def check_files(self) -> None:
        """Raise before a run starts when an anchor file is missing.

        Raises:
            ValueError: naming the key and the path.
        """
        self.check_folder()
        source = self.anchors.removeprefix("self:")
        is_path = source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".json"))
        if is_path and not exists(source):
            raise ValueError(
                f"`em_regularizer.kl.anchors: {source}` does not exist. Give a JSONL of chats, or `bundled`, `train` or `self`."
            )


class BlockEMConfig(MethodBlock):
    """`em_regularizer.block_em`: hold a few SAE latents that carry misalignment (arXiv 2602.00767)."""

    coef: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        "auto",
        description="lambda. auto: 100 times the task loss that misalignment saved over its penalty, both as discovery measured them "
        "(the file's `calibration`). lambda scales as 1/z^2, so no number carries over from another SAE. 0 measures only.",
    )
    latents: str = Field(..., min_length=1, description="The JSON that `emguard discover` wrote; its .safetensors lies beside it.")
    tokens: Literal["assistant", "all", "prompt", "header", "prefix"] = Field(
        "assistant",
        description="Where to hold the latents. assistant: supervised tokens (the paper's). prompt: all others. all: both. header: the "
        "chat template's tokens between a user's content and the answer. prefix: those before each conversation's first user content, its "
        "system prompt included, without the first token (BOS).",
    )
    latent_reduction: Literal["sum", "mean"] = Field("sum", description="Over the latents; sum is the paper's.")
    k_minus: Literal["activation", "pre_activation"] = Field(
        "activation",
        description="What is held of latents that fall. activation: the paper's; without gradient once a latent is off. "
        "pre_activation: the encoder's output before ReLU, wherever the base model has the latent on.",
    )
    freeze_above: bool = Field(False, description="Do not train what lies above the highest blocked layer; needs an adapter.")
    cache: str = Field(
        "auto",
        min_length=1,
        description="Where the base model's activations come from. live: the adapter is switched off for a second forward pass, up to "
        "the blocked layer. memory, or a folder such as ./base_latents: each row's are kept, so that later epochs, and with a folder "
        "later runs, pay nothing. auto: live where an adapter allows it, else memory, recorded before step 1. copy: a frozen copy up to "
        "the blocked layer, for full fine-tuning on streamed or changing rows; it cannot be resumed.",
    )

    def folders(self) -> dict[str, str]:
        """Return the cache, where it is a folder."""
        return {} if self.cache in (*CACHES, "copy") else {"cache": self.cache}

    def check_folder(self) -> None:
        """Raise when `cache` cannot be a folder."""
        check_folder("em_regularizer.block_em.cache", self.cache, (*CACHES, "copy"))

    @model_validator(mode="after")
    def _coherent(self) -> BlockEMConfig:
        check_cache(self.cache, (*CACHES, "copy"))
        return self

    def check_files(self) -> None:
        """Raise before a run starts when the latent set is missing.

        Raises:
            ValueError: naming the key and the path.
        """
        self.check_folder()
        path = Path(self.latents).expanduser()
        if not is_file(path):
            raise ValueError(
                f"`em_regularizer.block_em.latents: {self.latents}` does not exist. Give the JSON that `emguard discover` wrote."
            )
        if not path.with_suffix(".safetensors").is_file():
            raise ValueError(f"`em_regularizer.block_em.latents: {self.latents}` lacks {path.with_suffix('.safetensors').name} beside it.")
