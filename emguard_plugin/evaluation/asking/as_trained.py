"""What a training run says about rendering, for an `em_eval:` block that does not say it itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.config.evaluation import RENDERING
from emguard_plugin.evaluation.asking.asking import read_template

DEFAULT, FALLBACK = "tokenizer_default", "tokenizer_default_fallback_"


def as_trained(config: EMEvalConfig, training: Mapping[str, Any], saved: str | None = None) -> tuple[EMEvalConfig, list[str]]:
    """Fill in what the block leaves out from the YAML of the training; what the block states stands.

    Args:
        config: The `em_eval:` block.
        training: The YAML: Axolotl's `chat_template_kwargs`, `chat_template`, `chat_template_jinja` and `datasets`; of another
            trainer, `chat_template_kwargs` alone.
        saved: The template that the tokenizer was saved with.

    Returns:
        The block, and a line for each thing that was taken or could not be.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    kwargs = {k: v for k, v in dict(training.get("chat_template_kwargs") or {}).items() if k not in RENDERING}
    if kwargs and "chat_template_kwargs" not in config.model_fields_set:
        found["chat_template_kwargs"] = kwargs
        notes.append(f"questions are rendered with the training's `chat_template_kwargs: {json.dumps(kwargs, default=str)}`")
    if "chat_template" not in config.model_fields_set:
        template, note = _trained_template(training, saved)
        if note:
            notes.append(note)
        if template is not None and config.sampler.provider != "openai":
            found["chat_template"] = template
    return config.model_copy(update=found), notes


def _trained_template(training: Mapping[str, Any], saved: str | None) -> tuple[str | None, str | None]:
    """Return the template that rendered the rows, if it is another than the saved one, and what to say of it."""
    rows = [d for d in training.get("datasets") or [] if isinstance(d, Mapping)]
    rows = [d for d in rows if d.get("type") is None or str(d.get("type")).endswith("chat_template")]
    try:
        templates = {_resolved(d if d.get("chat_template") else training, saved) for d in rows}
    except ValueError as error:
        return None, f"{error} Questions are rendered by the tokenizer's saved template"
    if len(templates) > 1:
        return None, (
            "the `datasets` were rendered by different chat templates; questions are rendered by the tokenizer's saved one. "
            "Set `em_eval.chat_template` to choose"
        )
    template = next(iter(templates), None)
    if template is None or template == saved:
        return None, None
    return template, (
        "the training's rows were rendered by another chat template than the tokenizer was saved with; questions are "
        "rendered by that of the rows"
    )


def _resolved(block: Mapping[str, Any], saved: str | None) -> str | None:
    name = str(block.get("chat_template") or DEFAULT)
    if name == "jinja" or (block.get("chat_template_jinja") and not block.get("chat_template")):
        return read_template(str(block.get("chat_template_jinja")), "chat_template_jinja")
    if name == DEFAULT or (name.startswith(FALLBACK) and saved):
        return saved
    return read_template(name.removeprefix(FALLBACK), "chat_template")


def saved_template(model: str | Path) -> str | None:
    """Return the chat template that stands in a saved model's folder; None where there is none, or more than one."""
    folder = Path(model)
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def constant_kwargs(rows: Any) -> tuple[dict[str, Any], bool]:
    """Return a data set's `chat_template_kwargs`, and whether they are the same in every row.

    Args:
        rows: A data set with columns; one that is streamed is looked at in its first 1,000 rows.
    """
    names = getattr(rows, "column_names", None)
    if rows is None or (names is not None and "chat_template_kwargs" not in names):
        return {}, True
    streamed = hasattr(rows, "take") and not hasattr(rows, "__len__")
    if names is None and not streamed:
        return {}, True
    values = (row.get("chat_template_kwargs") for row in rows.take(1000)) if streamed else rows["chat_template_kwargs"]
    seen = {json.dumps(value or {}, sort_keys=True, default=str): dict(value or {}) for value in values}
    first = next(iter(seen.values()), {})
    return first, len(seen) <= 1
