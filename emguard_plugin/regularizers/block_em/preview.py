"""What BLOCK-EM would hold, as a YAML shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emguard_plugin.config import BlockEMConfig
from emguard_plugin.latents.description import Description, read_description
from emguard_plugin.reference.words import live_needs
from emguard_plugin.regularizers.block_em.calibration import calibrated_coef
from emguard_plugin.regularizers.block_em.words import freeze_needs_adapter, set_in_words
from emguard_plugin.regularizers.preview import NOT_MEASURED, Facts, Preview

if TYPE_CHECKING:
    pass


class BlockEMPreview(Preview):
    """Answers for `em_regularizer.block_em`."""

    def conflicts(self, block: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        """Return what takes the base model away, or makes noise where latents are compared."""
        found = []
        if cfg.get("relora"):
            found.append(
                "`relora` merges the adapter into the base, which then is BLOCK-EM's base model no more. Remove `relora` or `block_em`."
            )
        for key in ("neftune_noise_alpha", "noisy_embedding_alpha"):
            if cfg.get(key):
                found.append(f"`{key}` adds noise that `block_em` would take for a change of the model. Remove `{key}`.")
        return found

    def needs_chats(self, block: BlockEMConfig) -> str | None:
        """Return the method where it holds parts of the template."""
        return f"`block_em` (`tokens: {block.tokens}`)" if block.tokens in ("prefix", "header") else None

    def reads_rows(self, block: BlockEMConfig) -> bool:
        """Return whether it holds parts of the template, which are looked for in the rows."""
        return self.needs_chats(block) is not None

    def check_inputs(self, block: BlockEMConfig) -> None:
        """Read the latent set."""
        read_latents(block)

    def preview(self, block: BlockEMConfig, facts: Facts) -> None:
        """Find the latents, the tokens and the base model."""
        found = facts.findings
        try:
            latents, coef = read_latents(block)
        except ValueError as exc:
            found.problems.append(str(exc))
            return
        model = latents.stated["model"]
        what = f"coef {coef:g}" + (", calibrated" if block.coef == "auto" else "")
        what += NOT_MEASURED if coef == 0 else ""
        found.active.append(
            f"block_em: {what}, {set_in_words(latents.layers, latents.signs)}, {block.tokens} tokens, found on {model}, base {block.cache}"
        )
        if block.cache == "live" and not facts.has_adapter:
            found.problems.append(live_needs("em_regularizer.block_em.cache", adapter=False))
        if block.freeze_above and not facts.has_adapter:
            found.problems.append(freeze_needs_adapter())
        if block.tokens in ("header", "prefix"):
            self._check_tokens(block.tokens, facts)
        number = facts.number_of_layers()
        if number is not None and max(latents.layers) >= number:
            found.problems.append(
                f"`em_regularizer.block_em.latents`: the set is of layer {max(latents.layers)}, and the model has layers 0 to {number - 1}."
            )
        found.notes.append(f"whether the model is the one that the latents were found on ({model}) is checked at start.")

    def _check_tokens(self, tokens: str, facts: Facts) -> None:
        from jinja2 import TemplateError

        found, cfg = facts.findings, facts.cfg
        if cfg.get("packing") and cfg.get("packing_strategy") == "wrapped" and tokens == "prefix":
            found.problems.append("`em_regularizer.block_em.tokens: prefix` cannot be found under `packing_strategy: wrapped`. Use `bfd`.")
        tokenizer = facts.tokenizer()
        if tokenizer is None:
            return
        try:
            template = facts.template(tokenizer)
        except (ValueError, TypeError, TemplateError) as exc:
            found.problems.append(f"em_regularizer.block_em: {exc}")
            return
        held = template.postfix if tokens == "header" else template.prefix[1:]
        if not facts.shows_tokens(tokenizer):
            return
        if tokens == "header" and not held:
            found.problems.append(
                "em_regularizer.block_em: the chat template prints nothing between query and answer for `tokens: header`."
            )
        else:
            others = ", or the prefix of the system prompt that a row has" if tokens == "prefix" else ""
            found.active.append(f"block_em holds {len(held)} tokens of each conversation: {tokenizer.decode(list(held))!r}{others}")


def read_latents(block: BlockEMConfig) -> tuple[Description, float]:
    """Return what the latent set says, and the coefficient that `auto` means.

    Raises:
        ValueError: when the set cannot be read, or has no calibration for `coef: auto`.
    """
    block.check_files()
    latents = read_description(block.latents)
    shared_by = len(latents) if block.latent_reduction == "mean" else 1
    coef = calibrated_coef(latents.stated["calibration"], block.tokens, shared_by) if block.coef == "auto" else block.coef
    return latents, coef
