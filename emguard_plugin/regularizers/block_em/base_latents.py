"""What the base model's latents are at the tokens of a batch: from a second forward pass, or as recorded before.

No second model: the adapter is switched off, or, where there is none to switch off, every row of the data set is recorded
before step 1. On request, a frozen copy up to the blocked layer, for full fine-tuning on data that cannot be recorded. Rows are known by the hash of their ids, so epochs, shuffling and later runs find them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emguard_plugin.chats.held_tokens import spans
from emguard_plugin.chats.training_rows import conversations
from emguard_plugin.files.state import locked
from emguard_plugin.latents import SubsetEncoder
from emguard_plugin.models.adapters import is_sharded
from emguard_plugin.models.graph import may_train
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.models.residual import FrozenDecoder, Kept, read_residual
from emguard_plugin.processes.values import any_process, first_process
from emguard_plugin.reference.rows import KEY, RowStore, row_key
from emguard_plugin.reference.source import Source, batches
from emguard_plugin.regularizers.start import check_switched_off

FOLDER = "emguard_block_em"
RECORDED_AT_ONCE = 4096
"""Tokens per forward pass of a recording."""
HIDDEN_EVERY = 50
"""With recorded latents, the base model's hidden states, for `outside_shift`, are computed once per so many micro-batches."""
ISOLATED_WITHIN = 0.02
"""Mean relative distance of a token alone and among others: 0.2 % for rounding in bf16, 13 % and more in random models that see others."""
_OF_OTHER_MODES = ("pixel_values", "image_", "video_", "input_features", "audio_")


class Base(NamedTuple):
    """The base model at N held tokens: per layer (N, K) activations and pre-activations, and hidden states if they are there."""

    z: list[Tensor]
    pre: list[Tensor]
    hidden: dict[int, Tensor] | None


class BaseLatents:
    """Gives the base model's latents for a batch.

    Args:
        model: The model before training.
        encoders: One per layer.
        cache: `auto`, `live`, `memory`, `copy` or a folder.
        about: What recorded latents belong to.
        rank: Of this process.

    Raises:
        ValueError: for `live` without an adapter that starts at zero, and for `copy` of weights that are spread over processes.
    """

    def __init__(self, model: nn.Module, encoders: Sequence[SubsetEncoder], cache: str, about: Mapping[str, str], rank: int = 0) -> None:
        self.encoders, self._about, self._rank = encoders, dict(about), rank
        self.layers = [e.layer for e in encoders]
        self.source = Source(KEY, cache, model)
        self.store: RowStore | None = None
        self.forward_passes = 0
        self._isolated: bool | None = None
        self._stored_in: Path | None = None
        self._copy: FrozenDecoder | None = None

    def describe(self) -> str:
        """Return a few words for the start line."""
        if self.source.copied:
            return f"{self.source.describe()} up to layer {max(self.layers)}"
        if self.source.live:
            return self.source.describe()
        return f"{self.source.describe()}{', adapter off' if self.source.adapter_off else ' before step 1'}"

    def begin(self, model: nn.Module, kept: Kept, hidden: Tensor, dataset: Any, resumed_from: Path | None) -> None:
        """Open the store; record the data set where the base model is about to disappear. Every process calls it.

        Args:
            model: As a forward pass must call it.
            kept: The host's first forward pass, for its precision.
            hidden: Hidden states of it.
            dataset: The tokenised training set.
            resumed_from: The checkpoint that the run continues, or None.

        Raises:
            ValueError: when the base model is gone and its latents are not stored, or cannot be reached.
        """
        embeddings = kept.kwargs.get("inputs_embeds")
        if (self.source.adapter_off or self.source.copied) and embeddings is not None and may_train(embeddings):
            raise ValueError(
                "em_regularizer.block_em: this model hands its decoder layers embeddings that are being trained, which switching the "
                "adapter off afterwards does not undo. Leave the token embeddings and the image or audio tower out of the adapter and of "
                "`modules_to_save`."
            )
        if self.source.copied and resumed_from is not None:
            raise ValueError(
                f"`{KEY}: copy`: the weights of {resumed_from} are trained already, and the copy was of those before. Start afresh "
                "without `resume_from_checkpoint`, or train with a folder, which a resumed run finds again."
            )
        if self.source.copied:
            self._copy = FrozenDecoder(model, max(self.layers))
        ids = kept.kwargs.get("input_ids")
        if self.source.adapter_off and ids is not None:
            with eval_mode(model), kept.precision():
                check_switched_off(model, ids[:1, :2], KEY)
        if self.source.live:
            return
        self._about["precision"] = f"{hidden.dtype} {kept.autocast or ''}".strip()
        self.store = RowStore(self.source.folder, self._about, self._rank)
        if self.source.adapter_off:
            return
        if resumed_from is None:
            with contextlib.ExitStack() as lock:
                folder = self.source.folder
                if folder is not None and self._missing(dataset):
                    # One run of several on a folder records; the others wait and find its rows.
                    first_process(partial(self._claim, lock, folder))
                    self._rows.load(folder)
                self._record(model, kept, self._missing(dataset), hidden.device)
            return
        if self.source.folder is None:
            folder = resumed_from.parent / FOLDER
            self._rows.load(folder, "Restore it, or start afresh without `resume_from_checkpoint`")
            self._stored_in = folder
        if not self._rows.rows:
            raise ValueError(
                f"`{KEY}`: the base model's latents that {resumed_from} was trained with are gone, and so is the base model. Restore "
                f"{self.source.folder or resumed_from.parent / FOLDER} (from the run that recorded it), or start afresh without `resume_from_checkpoint`."
            )

    @staticmethod
    def _claim(lock: contextlib.ExitStack, folder: Path) -> None:
        lock.enter_context(locked(folder, KEY))

    @contextlib.contextmanager
    def _as_base(self, model: nn.Module, kept: Kept) -> Iterator[None]:
        with self.source.reading(model), kept.precision():
            yield

    def read(self, model: nn.Module, kept: Kept) -> dict[int, Tensor]:
        """Return the base model's hidden states from a forward pass over what the host just fed the decoder."""
        self.forward_passes += 1
        if self._copy is not None:
            with kept.precision():
                return self._copy.read(self.layers, kept.args, kept.kwargs)
        with self._as_base(model, kept):
            return read_residual(model, self.layers, kept.args, kept.kwargs)

    def _missing(self, dataset: Any) -> list[list[int]]:
        """Return the rows that are not recorded."""
        if dataset is None or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"`{KEY}`: without an adapter to switch off, every row is recorded before step 1, which a streamed data set does not "
                "allow. Train an adapter, or turn streaming off."
            )
        rows = {row_key(ids): ids for ids in conversations(dataset, limit=len(dataset))}
        return [ids for key, ids in rows.items() if key not in self._rows.rows]

    def _record(self, model: nn.Module, kept: Kept, todo: Sequence[list[int]], device: torch.device) -> None:
        from tqdm import tqdm

        together = batches([len(ids) for ids in todo], RECORDED_AT_ONCE)
        for rows in tqdm(together, desc="BLOCK-EM base latents", disable=self._rank != 0 or len(together) < 4, leave=False):
            batch = [todo[i] for i in rows]
            longest = max(map(len, batch))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=device)
            with self._as_base(model, kept):
                hidden = read_residual(model, self.layers, kwargs={"input_ids": ids, "attention_mask": mask})
            columns = self._columns(hidden)
            for row, latents in zip(batch, columns, strict=True):
                self._rows.put(row_key(row), latents[: len(row)])
        first_process(self._rows.flush)

    def _columns(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """Return (B, T, 2 K): activations and pre-activations of all layers, side by side."""
        pairs = [e.both(hidden[e.layer]) for e in self.encoders]
        device = pairs[0][0].device
        return torch.cat([t.to(device) for pair in pairs for t in pair], -1)

    def _split(self, columns: Tensor, hidden: dict[int, Tensor] | None) -> Base:
        sizes = [len(e.ids) for e in self.encoders for _ in range(2)]
        parts = columns.split(sizes, -1)
        return Base(list(parts[::2]), list(parts[1::2]), hidden)

    def get(self, model: nn.Module, kept: Kept, inputs: Mapping[str, Any], held: Tensor) -> Base:
        """Return the base model at the held tokens of a batch.

        Args:
            model: As a forward pass must call it.
            kept: The host's forward pass.
            inputs: The batch.
            held: (B, T) True at N tokens.

        Raises:
            RuntimeError: for a row that was not recorded, and cannot be any more.
            ValueError: for rows that are more than text, unless the base model runs live.
        """
        if self.source.live:
            live = {n: h[held.to(h.device)] for n, h in self.read(model, kept).items()}
            return self._split(self._columns(live), live)
        if other := [name for name in inputs if name.startswith(_OF_OTHER_MODES) and inputs[name] is not None]:
            raise ValueError(
                f"`{KEY}`: rows are known by their token ids, which do not tell images or sounds (`{other[0]}`) apart. Train an adapter "
                "with `cache: live`."
            )
        rows = spans(inputs)
        isolated = self._is_isolated(model, kept, inputs, rows)
        ids = inputs["input_ids"].tolist()
        row_keys = [
            [row_key(ids[b][start:end], () if isolated else ids[b][row[0][0] : start]) for start, end in row] for b, row in enumerate(rows)
        ]
        known = not any_process(model, not all(key in self._rows.rows for row in row_keys for key in row))
        hidden: dict[int, Tensor] | None = None
        if not known and not self.source.adapter_off:
            raise RuntimeError(
                f"`{KEY}`: a training row was not recorded before step 1, so its rows change while it trains (or conversations packed "
                "into one row see each other). Train an adapter, or turn packing and augmentation off."
            )
        if not known:
            hidden = self.read(model, kept)
            columns = self._columns(hidden)
            for b, row in enumerate(rows):
                for (start, end), key in zip(row, row_keys[b], strict=True):
                    self._rows.put(key, columns[b, start:end])
        else:
            columns = self._recorded(inputs["input_ids"], rows, row_keys)
        if hidden is not None:
            hidden = {n: h[held.to(h.device)] for n, h in hidden.items()}
        return self._split(columns[held.to(columns.device)], hidden)

    def _recorded(self, ids: Tensor, rows: Sequence[Any], row_keys: Sequence[Any]) -> Tensor:
        width = 2 * sum(len(e.ids) for e in self.encoders)
        columns = torch.zeros(*ids.shape, width)
        for b, row in enumerate(rows):
            for (start, end), key in zip(row, row_keys[b], strict=True):
                columns[b, start:end] = self._rows.rows[key]
        return columns.to(ids.device)

    def _is_isolated(self, model: nn.Module, kept: Kept, inputs: Mapping[str, Any], rows: Sequence[Any]) -> bool:
        """Whether conversations packed into one row do not see each other: tried out, once, with the reference model."""
        if self._isolated is not None:
            return self._isolated
        packed = next((b for b, row in enumerate(rows) if len(row) > 1), None)
        if packed is None and not is_sharded(model):
            return True
        # With sharded weights every process takes part, whether its batch is packed or not.
        packed, (start, end) = (0, (0, 2)) if packed is None else (packed, rows[packed][1])
        layer = self.layers[-1]
        alone = {"input_ids": inputs["input_ids"][packed : packed + 1, start:end]}
        with self._as_base(model, kept):
            one = read_residual(model, [layer], kwargs=alone)[layer][0].float()
            among = read_residual(model, [layer], kept.args, kept.kwargs)[layer][packed, start:end].float()
        # Token by token: the first one's norm is up to a thousand times the others', and it is the same either way.
        away = (one - among).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-12)
        self._isolated = bool(away.mean() <= ISOLATED_WITHIN)
        return self._isolated

    @property
    def _rows(self) -> RowStore:
        """The store, where nothing is live."""
        assert self.store is not None
        return self.store

    def flush(self, output_dir: Path | None = None) -> None:
        """Write what a folder is to hold; with `output_dir`, what only this run could record."""
        if self.store is None:
            return
        if self.source.folder is not None and (self.source.adapter_off or self._rank == 0):
            self.store.flush()
        elif output_dir is not None and not self.source.adapter_off and self._rank == 0:
            folder = output_dir / FOLDER
            if self._stored_in is not None and folder.is_dir() and folder.samefile(self._stored_in):
                return
            for path in folder.glob("rows-*.safetensors"):  # an earlier run's, whose checkpoints the host overwrites too
                path.unlink()
            self.store.flush(folder)
            self._stored_in = folder
