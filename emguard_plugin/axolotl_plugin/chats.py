"""The conversations that Axolotl trains on, read again by its own loaders, as its own strategy hands them to the template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axolotl.prompt_strategies import load
from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config
from axolotl.utils.dict import remove_none_values
from axolotl.utils.logging import get_logger

from emguard_plugin.chats import Chat
from emguard_plugin.chats.training_rows import MAX_ROWS, spread

LOG = get_logger("axolotl.emguard")


def read_chats(cfg: Any, tokenizer: Any) -> Iterator[Chat]:
    """Yield up to 2,000 conversations of the `datasets:` whose type renders a chat template, in proportion to their sizes.

    Field names, roles, property mappings, per-data-set templates and variables are Axolotl's business: its strategy object does
    them. A data set that is not there any more (prepared elsewhere) gives none, and its rows are then read from their ids.

    Args:
        cfg: Axolotl's configuration.
        tokenizer: The run's.
    """
    if cfg.streaming or cfg.pretraining_dataset or cfg.skip_prepare_dataset:
        return
    found = [pair for config in datasets_with_name_generator(cfg.datasets or []) if (pair := _open(config, cfg, tokenizer))]
    rows = sum(len(dataset) for dataset, _ in found)
    for dataset, strategy in found:
        prompter = strategy.prompter
        for row in spread(dataset, max(1, MAX_ROWS * len(dataset) // max(rows, 1)) if rows > MAX_ROWS else MAX_ROWS):
            prompt = remove_none_values(row)
            kwargs = {"chat_template": prompter.chat_template, **prompter.chat_template_kwargs}
            if tools := strategy._get_tools(prompt):
                kwargs["tools"] = tools
            yield Chat(strategy.get_conversation_thread(prompt), kwargs)


def _open(config: Any, cfg: Any, tokenizer: Any) -> tuple[Any, Any] | None:
    """Return a data set and the strategy that renders it, or None for one of another type."""
    if not isinstance(config.type, str):
        return None
    strategy = load(config.type, tokenizer, cfg, config)
    if not (hasattr(strategy, "get_conversation_thread") and getattr(strategy.prompter, "chat_template", None)):
        return None
    try:
        dataset = load_dataset_with_config(config, cfg.hf_use_auth_token)
    except Exception as exc:  # each source has errors of its own
        LOG.info(f"em_regularizer: {config.path} cannot be read again ({type(exc).__name__}), so its rows are read from their token ids.")
        return None
    if hasattr(dataset, "keys"):  # splits by name
        split = config.split if config.split in dataset else "train"
        dataset = dataset.get(split)
    return None if dataset is None or "input_ids" in dataset.column_names else (dataset, strategy)
