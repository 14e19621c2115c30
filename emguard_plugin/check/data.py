"""Whether the rows that Axolotl will make can be those of a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emguard_plugin.check.host import is_trl
from emguard_plugin.config import EMRegularizerConfig
from emguard_plugin.regularizers.preview import Findings, asked

# Axolotl's types that write a prompt format of their own, or none.
NO_CHAT = (
    "alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "bradley_terry", "completion", "concisechoice", "context_qa", "creative_acr",
    "explainchoice", "gpteacher", "jeopardy", "metharme", "oasst", "orcamini", "pretrain", "pygmalion", "reflection", "stepwise_supervised",
    "summarizetldr",
)  # fmt: skip
CHAT = ("chat_template", "messages")


def check(cfg: Mapping[str, Any], regularizer: EMRegularizerConfig, found: Findings) -> None:
    """Report data that the template's tokens cannot be found in."""
    if is_trl(cfg):
        return
    methods = list(asked(regularizer))
    method = next((needs for preview, block in methods if (needs := preview.needs_chats(block))), None)
    images = next((key for key in ("processor_type", "skip_prepare_dataset") if cfg.get(key)), None)
    if images and any(preview.reads_rows(block) for preview, block in methods):
        found.problems.append(
            f"`{images}: {cfg[images]}` leaves the rows untokenised until they are trained on (images, audio), and emguard reads tokenised "
            f"rows. Remove `{images}`, or `em_regularizer`."
        )
    if method is None:
        return
    if cfg.get("pretraining_dataset"):
        kind = _pretraining_type(cfg["pretraining_dataset"])
        if kind in (None, *NO_CHAT):
            found.problems.append(
                f"`pretraining_dataset` trains on plain text, which shows no turn of a chat, so {method} has nothing to hold. Use "
                "`datasets:` with `type: chat_template`."
            )
        return
    kinds = _types(cfg.get("datasets"))
    plain = [kind for kind in kinds if _base(kind) in NO_CHAT]
    own = [kind for kind in kinds if not isinstance(kind, str) or _base(kind) not in (*NO_CHAT, *CHAT)]
    if plain and len(plain) == len(kinds) and cfg.get("chat_template") != "alpaca":
        found.problems.append(
            f"`datasets: type: {plain[0]}` writes prompts of its own, not the chat template's turns, so {method} finds nothing to hold: training "
            "would stop after the model is loaded. Use `type: chat_template`."
        )
    elif plain:
        found.note(f"`datasets: type: {plain[0]}` writes prompts of its own: at most 5 % of the rows may be without the template's turns.")
    elif own:
        found.note("`datasets: type:` is one of your own: whether its rows show the chat template's turns is checked at start.")


def _types(datasets: Any) -> list[Any]:
    rows = datasets if isinstance(datasets, list) else []
    return [row["type"] for row in rows if isinstance(row, Mapping) and row.get("type") is not None]


def _base(kind: Any) -> Any:
    return kind.split(":")[0].split(".")[0] if isinstance(kind, str) else None


def _pretraining_type(value: Any) -> Any:
    first = value[0] if isinstance(value, list) and value else value
    return _base(first.get("type")) if isinstance(first, Mapping) else None
