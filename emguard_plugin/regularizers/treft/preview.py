"""What TReFT would hold, as a YAML shows it."""

from __future__ import annotations

from emguard_plugin.config import TReFTConfig
from emguard_plugin.regularizers.preview import NOT_MEASURED, Facts, Preview
from emguard_plugin.regularizers.treft.words import no_rotary, per_row_needs_adapter


class TReFTPreview(Preview):
    """Answers for `em_regularizer.treft`."""

    def needs_chats(self, block: TReFTConfig) -> str:
        """Return the method: both regions are parts of the template."""
        return f"`treft` (`tokens: {block.tokens}`)"

    def reads_rows(self, block: TReFTConfig) -> bool:
        """Return True: prefixes and prompts are found in the rows."""
        return True

    def preview(self, block: TReFTConfig, facts: Facts) -> None:
        """Find the tokens that the template prints, and what model and layers lack."""
        from jinja2 import TemplateError

        found = facts.findings
        what = f"treft: coef {block.coef:g}, {block.tokens}, layers {block.layers}" + (", compat" if block.compat else "")
        found.active.append(what + (NOT_MEASURED if block.coef == 0 else ""))
        tokenizer = facts.tokenizer()
        if not found.problems:
            facts.check_layers("em_regularizer.treft", block.layers)
        self._check_model(block, facts)
        if tokenizer is None:
            return
        from emguard_plugin import chats as ct

        try:
            template = facts.template(tokenizer)
            if block.tokens == "prefix":
                ct.require_prefix(template)
            elif not template.postfix:
                raise ValueError("the chat template prints nothing between query and answer: `tokens: postfix` has nothing to hold.")
            held = [template.prefix] if block.tokens == "prefix" else [template.postfix]
            held += [ct.system_prefix(tokenizer, s, **facts.template_kwargs()) for s in block.extra_prefixes]
        except (ValueError, TypeError, TemplateError) as exc:
            found.problems.append(f"em_regularizer.treft: {exc}")
            return
        for ids in held if facts.shows_tokens(tokenizer) else ():
            found.active.append(f"treft holds {len(ids)} tokens: {tokenizer.decode(list(ids))!r}")
        if template.dated_after is not None and block.tokens == "prefix":
            found.problems.append(f"em_regularizer.treft: the chat template prints today's date in the prefix. {template.advice}")
        found.notes.append("rows with other system prompts are found when training starts, each with its own prefix.")

    def _check_model(self, block: TReFTConfig, facts: Facts) -> None:
        """Ask the model, without its weights, what training will ask of it."""
        problems = facts.findings.problems
        if block.postfix_reference == "per_row" and not facts.has_adapter:
            problems.append(per_row_needs_adapter())
        shared = block.tokens == "postfix" and block.postfix_reference != "per_row"
        if problems or not (shared or block.compat) or (model := facts.skeleton()) is None:
            return
        from emguard_plugin.models.kv import has_rotary_positions, residual_projections

        if shared and not has_rotary_positions(model):
            problems.append(no_rotary())
        if block.compat and (number := facts.number_of_layers()) is not None:
            try:
                residual_projections(model, range(number) if block.layers == "all" else block.layers)
            except ValueError as exc:
                problems.append(f"em_regularizer.treft: {exc}")
