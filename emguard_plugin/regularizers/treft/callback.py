"""TReFT: Token-Regularized Fine-Tuning (arXiv 2606.06667). Nothing to do with ReFT or LoReFT."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from emguard_plugin import chats as ct
from emguard_plugin.chats.training_rows import labelled_conversations, labels_in_stream, supervised
from emguard_plugin.config import TReFTConfig
from emguard_plugin.models.adapters import adapter_off, adapter_starts_at_zero
from emguard_plugin.models.kv import KV, has_rotary_positions, num_layers, read_kv, read_residual_projections
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.reference.source import lost
from emguard_plugin.reference.stored import read_reference, save_reference
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.functional import kv_drift, treft_penalty
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.penalty import Every, Penalty
from emguard_plugin.regularizers.run_facts import RunFacts
from emguard_plugin.regularizers.start import Floors, check_switched_off
from emguard_plugin.regularizers.treft.words import no_rotary, per_row_needs_adapter
from emguard_plugin.regularizers.words import no_such_layer

REFERENCE_FILE = "emguard_treft.safetensors"
FLOORS = Floors(fp32=1e-8, fp16=1e-3, bf16=1e-2, quantised=1e-2)
POSTFIX_ROWS = 8
"""Prompts drawn per optimizer step for `tokens: postfix`."""


class TReFTCallback(EMRegularizerCallback):
    """Hold the keys and values of chat-template tokens at those of the model before this run.

    `penalty = (1/L) sum_l (1/|T|) sum_{t in T} (||k_t - k_t_ref||^2 / ||k_t_ref||^2 + ||v_t - v_t_ref||^2 / ||v_t_ref||^2)`

    over the decoder layers l and the token positions T; all KV heads of a layer are one vector; fp32. The trainer adds
    `coef * penalty` to the mean cross-entropy, once per optimizer step.

    `tokens: prefix` holds every token that lies wholly before the first user's own text, system prompt and tools included. Its keys and values depend on the weights alone, so
    the penalty is a forward over the prefix, batch 1. With several prefixes in the data each step draws one, in proportion
    to its frequency. `tokens: postfix` holds the tokens wholly between query and answer (with an empty reasoning trace that the template writes and the loss does not supervise) on 8 training prompts per step; a shared
    reference is the untuned model's postfix after an empty query, at the same distance from every row's start (RoPE
    attention is relative, so each prompt is shifted to end where the longest does).

    Args:
        coef: lambda of Eq. 3. The paper picks 1 to 30 per model and data set.
        tokens: `prefix` or `postfix`.
        layers: `all`, or 0-based decoder layers.
        extra_prefixes: System prompts the data lacks but inference will use.
        postfix_reference: `shared` (default; the paper took a random row) or `per_row` (needs an adapter).
        compat: Follow the authors' released code: k_proj/v_proj of the residual stream before the input norm.

    Raises:
        ValueError: for values outside these.

    Paper: The Piggyback Hypothesis of Generalization, arXiv 2606.06667, Eq. 2 and 3. We differ from its released code: that
    projects the un-normalised residual stream (see `compat`), and takes the prefix length from row 0. Models with `k_norm`
    are held after the norm.
    """

    name: ClassVar[str] = "treft"
    every: ClassVar[Every] = "optimizer_step"
    own_forward: ClassVar[bool] = True
    state_file: ClassVar[str] = REFERENCE_FILE

    def __init__(
        self,
        coef: float = 5.0,
        tokens: Literal["prefix", "postfix"] = "prefix",
        layers: Literal["all"] | Sequence[int] = "all",
        extra_prefixes: Sequence[str] = (),
        postfix_reference: Literal["shared", "per_row"] | None = None,
        compat: bool = False,
    ) -> None:
        given = isinstance(layers, Sequence) and not isinstance(layers, str)
        self._configure(
            TReFTConfig(
                coef=self._checked_coef(coef),
                tokens=tokens,
                layers=list(layers) if given else layers,
                extra_prefixes=list(extra_prefixes) if not isinstance(extra_prefixes, str) else extra_prefixes,
                postfix_reference=postfix_reference,
                compat=compat,
            )
        )

    def _configure(self, config: TReFTConfig) -> None:
        self._set_up(config.coef)
        self.tokens, self.layers, self.compat = config.tokens, config.layers, config.compat
        self.extra_prefixes, self.postfix_reference = tuple(config.extra_prefixes), config.postfix_reference or "shared"
        self._prefixes: list[ct.Prefix] = []
        self._prompts: list[ct.Ids] = []
        self._postfix: ct.Ids = ()
        self._template: ct.Template | None = None
        self._book: ct.Book | None = None
        self._wrapped = False
        self._end = 0
        self._seed = 0
        self._reference: dict[str, Tensor] | None = None
        self._about: dict[str, str] = {}
        self._adapter_off = False

    # Before training

    def prepare(self, run: RunFacts) -> str:
        """Find the tokens to hold in the template and in the rows; load the reference of a resumed run."""
        n = num_layers(run.model)
        layers = list(range(n)) if self.layers == "all" else sorted(set(self.layers))
        if layers[-1] >= n:
            raise ValueError(no_such_layer("em_regularizer.treft.layers", layers[-1], n))
        self._layer_names, self._seed = layers, run.seed
        template, book = run.template, run.book
        self._template, self._book, self._wrapped = template, book, run.wrapped_packing
        rows, labels = _rows(run)
        if self.tokens == "prefix":
            prefixes = ct.training_prefixes(rows, template, book)
            extra = [ct.system_prefix(run.tokenizer, s, **run.rendering) for s in self.extra_prefixes]
            self._prefixes = ct.with_extra(prefixes, extra)
            what = f"prefix of {'/'.join(str(len(p.ids)) for p in self._prefixes[:8])} tokens"
            what += ", no tool definitions in user turns" if book is None and template.tools_unmarked else ""
        else:
            self._prepare_postfix(run, template, *ct.prompts_with_postfix(rows, template, book, map(supervised, labels)))
            what = f"postfix of {len(self._postfix)} tokens, {self.postfix_reference} reference"
        held_ids: list[Any] = [list(p.ids) for p in self._prefixes] or [*template.prefix, *self._postfix, self._end]
        settings = {"held": held_ids, "layers": layers, "compat": self.compat}
        self._about = {"settings": hashlib.sha256(json.dumps(settings).encode()).hexdigest(), **run.identity._asdict()}
        self._identity, self._checked = run.identity, False
        # A shared postfix is that of an empty query: no row's own is at 0 from it.
        self.floors = None if self._postfix and self.postfix_reference == "shared" else FLOORS
        self._reference, self._adapter_off = self._resumed_reference(run)
        self.prepared = True
        return f"treft (coef {self.coef:g}, {what}, {len(layers)} of {n} layers{', compat' if self.compat else ''})"

    def _prepare_postfix(self, run: RunFacts, template: ct.Template, postfix: ct.Ids, prompts: list[ct.Ids]) -> None:
        if self.postfix_reference == "per_row" and not adapter_starts_at_zero(run.model):
            raise ValueError(per_row_needs_adapter())
        if self.postfix_reference == "shared" and not has_rotary_positions(run.model):
            raise ValueError(no_rotary())
        self._postfix, self._prompts = postfix, prompts
        self._empty_query = (*template.prefix, *postfix)
        self._end = max(map(len, [self._empty_query, *prompts]))

    def _resumed_reference(self, run: RunFacts) -> tuple[dict[str, Tensor] | None, bool]:
        if run.resume_from is None:
            return None, False
        if (found := self.find_stored(run)) is not None:
            tensors, stored = found
            self._about = {k: stored[k] for k in self._about}
            return tensors, False
        if adapter_starts_at_zero(run.model):
            return None, True
        raise lost(run.resume_from, REFERENCE_FILE, "treft")

    def read_state(self, path: Path, run: RunFacts, own: bool) -> tuple[tuple[dict[str, Tensor], dict[str, str]], dict[str, str]]:
        """Read a reference, with what it says of itself."""
        tensors, stored = read_reference(path, {"settings": self._about["settings"]})
        return (tensors, stored), stored

    @property
    def region(self) -> str:
        """`prefix` or `postfix`."""
        return self.tokens

    def held(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the tokens of training rows that the held prefix or postfix is made of."""
        if self._wrapped:
            return None
        assert self._template is not None
        held = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        labels = inputs["labels"].tolist() if inputs.get("labels") is not None else [None] * len(held)
        for b, row in enumerate(inputs["input_ids"].tolist()):
            if self.tokens == "prefix":
                ids = ct.prefix_of(row, self._template, self._book)
                fits = ids is not None and any(p.ids == ids for p in self._prefixes)
                first, last = (0, len(ids)) if fits and ids is not None else (0, 0)
            else:
                first, last = ct.postfix_span(row, self._template, self._book, self._postfix, supervised(labels[b]))
            held[b, first:last] = True
        return held

    # Each step

    def penalty(self, moment: Moment) -> Penalty:
        """Return the drift of the held tokens; see the class for the formula."""
        model, device = moment.model, moment.device
        rng = np.random.default_rng([self._seed, moment.step])  # the same draw on every rank, and after resume
        if self.tokens == "postfix":
            now, ref = self._postfix_pair(model, rng, device)
        else:
            if self._reference is None:
                self._reference = self._record([p.ids for p in self._prefixes], model, device)
            which = int(rng.choice(len(self._prefixes), p=[p.weight for p in self._prefixes])) if len(self._prefixes) > 1 else 0
            now = self._read(model, torch.tensor([self._prefixes[which].ids], device=device))
            ref = self._stored(which, device)
        key, value = kv_drift(now.keys, now.values, ref.keys, ref.values)
        total = treft_penalty(key, value) + now.tie
        metrics = {"key_drift": key.detach().mean(), "value_drift": value.detach().mean()}
        return Penalty(total, metrics, per_layer=key + value, held=now.keys[0].shape[0] * now.keys[0].shape[1])

    def _read(self, model: nn.Module, ids: Tensor, position_ids: Tensor | None = None) -> KV:
        if self.compat:
            return read_residual_projections(model, ids, self._layer_names)
        return read_kv(model, ids, self._layer_names, position_ids=position_ids)

    def _record(self, rows: Sequence[ct.Ids], model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Record from the live model: in a fresh run, before the first update, that is the model before this run."""
        stored = {}
        if self._adapter_off:
            self._check_off(model, device)
        with torch.no_grad(), adapter_off(model) if self._adapter_off else contextlib.nullcontext():
            for r, ids in enumerate(rows):
                start = self._end - len(ids) if self.tokens == "postfix" else 0
                position_ids = torch.arange(start, start + len(ids), device=device)[None] if start else None
                kv = self._read(model, torch.tensor([ids], device=device), position_ids)
                keep = slice(-len(self._postfix), None) if self.tokens == "postfix" else slice(None)
                for layer, k, v in zip(self._layer_names, kv.keys, kv.values, strict=True):
                    stored[f"{r}.{layer}.key"], stored[f"{r}.{layer}.value"] = k[:, keep].clone(), v[:, keep].clone()
        return stored

    def _check_off(self, model: nn.Module, device: torch.device) -> None:
        with eval_mode(model):
            check_switched_off(model, torch.tensor([(self._postfix or self._prefixes[0].ids)[:2]], device=device), "em_regularizer.treft")

    def _stored(self, row: int, device: torch.device) -> KV:
        assert self._reference is not None
        at = {name: t.to(device) for name, t in self._reference.items()}
        self._reference = at
        keys, values = ([at[f"{row}.{i}.{n}"] for i in self._layer_names] for n in ("key", "value"))
        return KV(keys, values, torch.zeros((), device=device))

    def _postfix_pair(self, model: nn.Module, rng: np.random.Generator, device: torch.device) -> tuple[KV, KV]:
        shared = self.postfix_reference == "shared"
        if shared and self._reference is None:
            self._reference = self._record([self._empty_query], model, device)
        picks = rng.choice(len(self._prompts), size=min(POSTFIX_ROWS, len(self._prompts)), replace=False)
        rows = [self._prompts[int(i)] for i in picks]
        longest, q = max(map(len, rows)), len(self._postfix)
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
        mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for r, row in enumerate(rows):
            ids[r, : len(row)] = torch.tensor(row, device=device)
            mask[r, : len(row)] = 1
            start = self._end - len(row) if shared else 0
            # Padding repeats the last position: some RoPE scalings depend on the largest one.
            positions[r] = torch.arange(start, start + longest, device=device).clamp_max(start + len(row) - 1)
        at = torch.tensor([[len(row) - q + j for j in range(q)] for row in rows], device=device)[..., None]

        def pick(kv: KV) -> KV:
            keys, values = ([x.gather(1, at.expand(-1, -1, x.shape[-1])) for x in xs] for xs in (kv.keys, kv.values))
            return KV(keys, values, kv.tie)

        now = pick(read_kv(model, ids, self._layer_names, mask, positions))
        if shared:
            return now, self._stored(0, device)
        if not self._checked:
            self._check_off(model, device)
            self._checked = True
        with torch.no_grad(), adapter_off(model):
            return now, pick(read_kv(model, ids, self._layer_names, mask, positions))

    # Checkpoints

    @property
    def recorded(self) -> bool:
        """Whether there is a reference: of the drift from a live one nothing is kept."""
        return self._reference is not None

    def write_state(self, path: Path) -> None:
        """Store the reference in a checkpoint."""
        assert self._reference is not None
        save_reference(path, self._reference, self._about)


def _rows(run: RunFacts) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int] | None]]:
    """Return training conversations and their labels."""
    template = run.template
    if run.wrapped_packing and run.book is not None:  # packing lost where conversations begin, the raw ones have it
        rows = [row.ids for row in run.book.rows]
        return rows, labels_in_stream(run.sample, rows)
    both = list(
        labelled_conversations(run.sample, wrapped_at=template.prefix if run.wrapped_packing else None, system_open=template.system_open)
    )
    return [ids for ids, _ in both], [labels for _, labels in both]
