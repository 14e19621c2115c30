"""What KL would hold, as a YAML shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emguard_plugin.config import KLConfig
from emguard_plugin.config.block import exists
from emguard_plugin.reference.words import live_needs
from emguard_plugin.regularizers.preview import NOT_MEASURED, Facts, Preview


class KLPreview(Preview):
    """Answers for `em_regularizer.kl`."""

    def conflicts(self, block: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        """Return what takes the reference away."""
        if cfg.get("relora"):
            return ["`relora` merges the adapter into the base, which then is KL's reference no more. Remove `relora` or `kl`."]
        return []

    def reads_rows(self, block: KLConfig) -> bool:
        """Return True: how many anchors a step takes depends on the rows' lengths."""
        return True

    def check_inputs(self, block: KLConfig) -> None:
        """Read the anchors, and look whose folder the cache is."""
        count_anchors(block)

    def preview(self, block: KLConfig, facts: Facts) -> None:
        """Find the anchors and the reference."""
        found, coef = facts.findings, 0.7 if block.coef is None else block.coef
        what = f"coef {coef:g} nats per token" if block.target is None else f"held at {block.target:g} nats per token"
        what += NOT_MEASURED if coef == 0 and block.target is None else ""
        count = "anchors"
        try:
            number = count_anchors(block)
            count = count if number is None else f"{number} anchors"
            if number is None and block.anchors.removeprefix("self:") != "train":
                found.notes.append(f"em_regularizer.kl.anchors: {block.anchors.removeprefix('self:')} is loaded when training starts.")
        except ValueError as exc:
            found.problems.append(str(exc))
        found.active.append(f"kl: {what}, KL({block.direction}), {count} ({block.anchors}), {block.tokens} tokens, reference {block.cache}")
        if block.cache == "live" and not facts.has_adapter:
            found.problems.append(live_needs("em_regularizer.kl.cache", adapter=False))


def count_anchors(block: KLConfig) -> int | None:
    """Return the number of anchor chats; None where they are the training rows, or a data set that is loaded at the start.

    Raises:
        ValueError: when they cannot be read.
    """
    block.check_files()
    for folder in block.folders().values():
        from emguard_plugin.reference.folder import check_ours

        check_ours(Path(folder).expanduser())
    source = block.anchors.removeprefix("self:").replace("self", "bundled")
    if source == "train" or not (source == "bundled" or exists(source)):
        return None
    from emguard_plugin.chats.anchors import load_chats

    return len(load_chats(source))
