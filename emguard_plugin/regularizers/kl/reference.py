"""Where KL's reference comes from: the adapter switched off, or hidden states recorded before step 1."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emguard_plugin.chats.sources import TokenizedChat
from emguard_plugin.files.state import locked
from emguard_plugin.models.output_head import call_with_hidden, head_tensors, trains_head
from emguard_plugin.processes.values import first_process, raised
from emguard_plugin.reference.folder import ReferenceCache, contents_hash, discard, discard_unfinished, is_cache
from emguard_plugin.reference.source import Source, batches, lost
from emguard_plugin.regularizers.kl.linear_kl import Head, linear_kl

KEY = "em_regularizer.kl.cache"
FOLDER = "emguard_kl_reference"
"""In `output_dir`: what a resumed full fine-tune needs."""
RECORDED_AT_ONCE = 8192


class Batch(NamedTuple):
    """Padded anchors: ids and mask (B, T), and the row and column of each held position (N,)."""

    rows: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor

    def held(self, hidden: Tensor) -> Tensor:
        """Pick the held positions: (B, T, H) -> (N, H), anchor by anchor."""
        return hidden[self.row, self.column]


def collate(anchors: Sequence[TokenizedChat], rows: Sequence[int], device: torch.device) -> Batch:
    """Pad anchors on the right to one batch."""
    longest = max(len(anchors[i].ids) for i in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    at = [(r, t) for r, i in enumerate(rows) for t in anchors[i].held]
    for r, i in enumerate(rows):
        n = len(anchors[i].ids)
        ids[r, :n], mask[r, :n] = torch.tensor(anchors[i].ids), 1
    row, column = torch.tensor(at, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Batch(tuple(rows), *(x.to(device) for x in (ids, mask, row, column)))


class KLReference:
    """The model before this run, as hidden states at held positions and an output head.

    Args:
        model: Before training, unwrapped.
        anchors: All anchors.
        cache: `live`, `memory`, `auto` or a folder.
        about: Hashes of what a stored cache must belong to.
        resume_from: The checkpoint folder of a resumed run.
        resumed: What that checkpoint says about its reference, if it had one.
        beside: The host's own frozen copy of the model before this run, or None.

    Raises:
        ValueError: when the reference asked for cannot be had.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: Sequence[TokenizedChat],
        cache: str,
        about: Mapping[str, str],
        resume_from: Path | None,
        resumed: Mapping[str, Any] | None,
        beside: nn.Module | None = None,
    ) -> None:
        self.anchors = anchors
        self.source = Source(KEY, cache, model, None if resumed is None else bool(resumed["adapter_off"]), beside)
        if resume_from is not None and resumed is None and not self.source.adapter_off and self.source.beside is None:
            raise lost(resume_from, "reference of `kl`", "kl")
        self.about = {**about, "model": resumed["model"]} if resumed else dict(about)
        self.content: str | None = None
        self._resumed = resumed
        self._resume_from = resume_from
        self._cache: ReferenceCache | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded reference."""
        return 0 if self._cache is None else self._cache.nbytes

    # Before step 1

    def begin(self, model: nn.Module, transform: tuple[float, float | None], device: torch.device, rank: int) -> None:
        """Record or load what is needed. Every process calls it.

        Raises:
            ValueError: for a cache of something else.
        """
        self.transform = transform
        if self.source.live:
            return
        sizes = [len(a.held) for a in self.anchors]
        about = {**self.about, "precision": self._precision(model, device)}
        if self._resumed is not None and not self.source.adapter_off:
            self._continue(sizes, about)
        elif self.source.folder is None:
            self._cache = ReferenceCache(sizes)
            self._record(model, device, rank)
        else:
            self._share(self.source.folder, model, device, rank, sizes, about)
        self.about = about

    def _load(self, folder: Path, sizes: Sequence[int], about: Mapping[str, str], advice: str = "Delete the folder") -> None:
        self._cache = ReferenceCache(sizes)
        self.content = self._cache.load(folder, about, advice=advice)

    def _continue(self, sizes: Sequence[int], about: Mapping[str, str]) -> None:
        """Load what the checkpoint was trained with: from the folder that the YAML names, else from beside the checkpoints."""
        assert self._resume_from is not None
        assert self._resumed is not None
        folder = self.source.folder or self._resume_from.parent / FOLDER
        advice = "Restore it from the output folder of the run that recorded it" if self.source.folder is None else "Restore it"
        if not folder.is_dir():
            raise ValueError(
                f"`{KEY}`: {self._resume_from} was trained with the reference in {folder}, which is not there. {advice}, or start afresh "
                "without `resume_from_checkpoint`."
            )
        self._load(folder, sizes, about, advice)
        if self.content != self._resumed["content"]:
            raise ValueError(
                f"`{KEY}`: {folder} is not the reference that {self._resume_from} was trained with. {advice}, or start afresh without "
                "`resume_from_checkpoint`."
            )

    def _share(
        self, folder: Path, model: nn.Module, device: torch.device, rank: int, sizes: Sequence[int], about: Mapping[str, str]
    ) -> None:
        """Use the folder's recording, or make it, once for all processes and runs."""
        with contextlib.ExitStack() as lock:

            def claim() -> bool:
                if is_cache(folder):
                    return False
                lock.enter_context(locked(folder, KEY))
                if done := is_cache(folder):
                    lock.close()
                else:
                    discard_unfinished(folder)
                return not done

            if not first_process(claim):
                self._load(folder, sizes, about)
                return
            cache = self._cache = ReferenceCache(sizes, folder)
            self._record(model, device, rank)
            head = cache.head
            first_process(lambda: cache.save(folder, about))
        if rank != 0:
            self._load(folder, sizes, about)
            cache = self._cache
            cache.head = head
        self.content = contents_hash(folder)

    def _precision(self, model: nn.Module, device: torch.device) -> str:
        ids = collate(self.anchors, [0], device).ids[:, :2]
        with self.source.reading(model):
            hidden, _ = call_with_hidden(model, ids, None, lambda h: h)
        kind = device.type
        return f"{hidden.dtype} {torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else ''}".strip()

    def _record(self, model: nn.Module, device: torch.device, rank: int) -> None:
        from tqdm import tqdm

        assert self._cache is not None
        cache = self._cache
        todo = batches([len(a.ids) for a in self.anchors], RECORDED_AT_ONCE)
        keep, failed = trains_head(model) and not self.source.adapter_off, None

        def use(batch: Batch, hidden: Tensor) -> Tensor:
            if keep and cache.head is None:
                cache.keep_head(*head_tensors(model))
            return batch.held(hidden)

        with self.source.reading(model):
            for rows in tqdm(todo, desc="KL reference", disable=rank != 0 or len(todo) < 4, leave=False):
                batch = collate(self.anchors, rows, device)
                hidden, _ = call_with_hidden(model, batch.ids, batch.mask, partial(use, batch))
                for i, part in zip(rows, hidden.split([len(self.anchors[i].held) for i in rows]), strict=True):
                    try:
                        self._cache.put(i, part, write=rank == 0 and failed is None)
                    except OSError as exc:  # the other processes' forward passes need this one's
                        failed = exc
        first_process(lambda: raised(failed))

    # Each step

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the reference's hidden states (N, H) at the batch's held positions."""
        if self._cache is not None:
            return self._cache.take(batch.rows, batch.ids.device)
        with self.source.reading(model) as base:
            return call_with_hidden(base, batch.ids, batch.mask, batch.held)[0]

    def kl(self, model: nn.Module, hidden: Tensor, reference: Tensor, direction: str = "base||model") -> Tensor:
        """Return the summed KL; called where the model would call its head, so that the weights are there."""
        weight, bias = head_tensors(model)
        if self._cache is not None and self._cache.head is not None:
            kept, kept_bias = self._cache.head
            base = self._cache.head = (kept.to(weight.device), None if kept_bias is None else kept_bias.to(weight.device))
        elif self.source.beside is not None:
            base = head_tensors(self.source.beside)
            base = base[0].detach(), None if base[1] is None else base[1].detach()
        else:
            base = head_tensors(model, reference=True)
        hidden, reference = hidden.to(weight.device), reference.to(weight.device)
        return linear_kl(hidden, Head(weight, bias, *self.transform), reference, Head(base[0], base[1], *self.transform), direction)

    # Checkpoints

    def state(self, output_dir: Path) -> dict[str, Any]:
        """Return what a checkpoint keeps; store a reference that only this run could record. For one process."""
        if self._cache is not None and not self.source.adapter_off and self.source.folder is None:
            folder = output_dir / FOLDER
            if self.content is None or not is_cache(folder) or contents_hash(folder) != self.content:
                discard(folder)  # an earlier run's, whose checkpoints the host overwrites too
                self.content = self._cache.save(folder, self.about)
        return {"adapter_off": self.source.adapter_off, "content": self.content, "model": self.about["model"]}
