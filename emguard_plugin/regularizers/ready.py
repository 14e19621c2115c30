"""Read the files that a method names before a model is loaded, by the code that will use them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emguard_plugin.config import BlockEMConfig, EMRegularizerConfig, KLConfig
from emguard_plugin.config.block import exists
from emguard_plugin.config.regularizers import CACHES

if TYPE_CHECKING:
    from emguard_plugin.latents import LatentSet


def check_inputs(config: EMRegularizerConfig) -> None:
    """Raise when a file of a method is missing or is not what the method needs.

    Raises:
        ValueError: naming the key and the path.
    """
    if config.block_em is not None:
        read_latents(config.block_em)
    if config.kl is not None:
        count_anchors(config.kl)


def read_latents(block: BlockEMConfig) -> tuple[LatentSet, float]:
    """Return the latent set and the coefficient that `auto` means.

    Raises:
        ValueError: when the set cannot be read, or has no calibration for `coef: auto`.
    """
    from emguard_plugin.latents import LatentSet
    from emguard_plugin.regularizers.block_em.rules import calibrated_coef

    block.check_files()
    latents = LatentSet.load(block.latents)
    shared_by = len(latents) if block.latent_reduction == "mean" else 1
    coef = calibrated_coef(latents.calibration, block.tokens, shared_by) if block.coef == "auto" else block.coef
    return latents, coef


def count_anchors(kl: KLConfig) -> int | None:
    """Return the number of anchor chats; None where they are the training rows, or a data set that is loaded at the start.

    Raises:
        ValueError: when they cannot be read.
    """
    from emguard_plugin.chats.anchors import load_chats

    kl.check_files()
    if kl.cache not in CACHES:
        from emguard_plugin.reference.folder import check_ours

        check_ours(Path(kl.cache).expanduser())
    source = kl.anchors.removeprefix("self:").replace("self", "bundled")
    if source == "train" or not (source == "bundled" or exists(source)):
        return None
    return len(load_chats(source))
