"""BLOCK-EM: a small signed set of SAE latents must not move in the bad direction (arXiv 2602.00767)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.chats import Book, Template
from emguard_plugin.chats.held_tokens import TokenKind, answered, held_tokens
from emguard_plugin.config import BlockEMConfig
from emguard_plugin.files.state import Damaged, read_json, write_json
from emguard_plugin.latents import LatentSet
from emguard_plugin.models.modes import eval_mode
from emguard_plugin.models.residual import Kept, decoder, keep_residual, read_residual
from emguard_plugin.processes.values import any_process
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.block_em.base_latents import HIDDEN_EVERY, Base, BaseLatents
from emguard_plugin.regularizers.block_em.calibration import calibrated_coef
from emguard_plugin.regularizers.block_em.rules import (
    BASE_WITHIN,
    content,
    distance,
    freeze_above,
    span,
    template_of,
    unguarded_penalty,
    warn_if_bypassed,
    warn_of_dropout,
)
from emguard_plugin.regularizers.block_em.words import drawn_answers, set_in_words
from emguard_plugin.regularizers.functional import block_em_penalty, block_em_violation
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.penalty import Penalty
from emguard_plugin.regularizers.run_facts import RunFacts
from emguard_plugin.regularizers.start import Floors

STATE_FILE = "emguard_block_em.json"


class BlockEMCallback(EMRegularizerCallback):
    """Hold latents of a sparse autoencoder at the base model's values, one-sidedly, on the training rows themselves.

    `penalty = (1/N) sum_t [ sum_{k in K+} ReLU(z_k(t) - z_k^base(t))^2 + sum_{k in K-} ReLU(z_k^base(t) - z_k(t))^2 ]`

    over the held tokens t; N is the number of supervised tokens of the optimizer step, the very divisor of the SFT loss, whatever
    `tokens` is, so that accumulation, packing and processes change nothing. z is the encoder's activation of the residual stream
    after the blocked layer (before the final norm, for the last one), in fp32. With several layers their latents form one set.

    The training forward is used: its output at the blocked layer is kept, nothing else runs in it. The base model is the adapter
    switched off, run up to the blocked layer without gradient, or what was recorded of it (`cache`).

    Args:
        coef: lambda, or `auto`; see `calibrated_coef`.
        latents: The JSON of a latent set, or a `LatentSet`.
        tokens: `assistant` (the paper's), `all`, `prompt`, `header` or `prefix`; see `held_tokens`.
        latent_reduction: `sum` (the paper's formula) or `mean` over the latents, as a lambda may be meant that was published of code
            whose docstring averages.
        k_minus: `activation` (the paper's), or `pre_activation`, which keeps its gradient where a latent was switched off: the
            paper's form has a penalty there and cannot pull the latent back.
        freeze_above: Train nothing above the highest blocked layer. Adapters only.
        cache: `auto`, `live`, `memory`, `copy` or a folder.

    Raises:
        ValueError: for values outside these.

    Paper: BLOCK-EM: Preventing Emergent Misalignment via Latent Blocking, arXiv 2602.00767. It runs a second model and the SAE's
    whole encoder at each step.
    """

    name: ClassVar[str] = "block_em"
    latents: LatentSet
    """As given, or as `prepare` reads it."""
    state_file: ClassVar[str] = STATE_FILE
    floors: Floors | None = Floors(BASE_WITHIN, BASE_WITHIN, BASE_WITHIN, BASE_WITHIN)

    def __init__(
        self,
        coef: float | Literal["auto"] = "auto",
        latents: str | Path | LatentSet = "",
        tokens: TokenKind = "assistant",
        latent_reduction: Literal["sum", "mean"] = "sum",
        k_minus: Literal["activation", "pre_activation"] = "activation",
        freeze_above: bool = False,
        cache: str = "auto",
    ) -> None:
        given = isinstance(latents, LatentSet)
        config = BlockEMConfig(
            coef=coef if coef == "auto" else self._checked_coef(coef), latents="given" if given else str(latents), tokens=tokens, latent_reduction=latent_reduction,
            k_minus=k_minus, freeze_above=freeze_above, cache=str(cache),
        )  # fmt: skip
        self._configure(config, latents if isinstance(latents, LatentSet) else None)

    def _configure(self, config: BlockEMConfig, latents: LatentSet | None = None) -> None:
        self._set_up(1.0 if config.coef == "auto" else config.coef)
        self._config, self.automatic = config, config.coef == "auto"
        if latents is not None:
            self.latents = latents
        self.path = None if latents is not None else Path(config.latents).expanduser()
        self.tokens, self.latent_reduction = config.tokens, config.latent_reduction
        self.pre_activation, self.freeze_above, self.cache = config.k_minus == "pre_activation", config.freeze_above, config.cache
        self._template: Template | None = None
        self._book: Book | None = None
        self._answers_alone = False
        self._frozen: list[nn.Parameter] = []
        self.yardstick: float | None = None
        self._warned = False  # the host logs an evaluation before training

    # Before training

    def prepare(self, run: RunFacts) -> str:
        """Read the latents and check that they are this model's, settle the coefficient, freeze what is to be frozen."""
        self._config.check_folder()
        if self.path is not None:
            self._config.check_files()
            self.latents = LatentSet.load(self.path)
        latents = self.latents
        latents.check_model(run.model)
        decoder(run.model)
        self._layer_names = latents.layers
        shared_by = len(latents) if self.latent_reduction == "mean" else 1
        self.yardstick = unguarded_penalty(latents.calibration, self.tokens, shared_by)
        if self.automatic:
            self.coef = calibrated_coef(latents.calibration, self.tokens, shared_by)
        if self.tokens in ("header", "prefix"):
            self._template, self._book = template_of(run, self.tokens), run.book
            self._answers_alone = run.answers_alone(self.tokens)
        self._identity = run.identity
        self._belongs = {**run.identity._asdict(), **(self._stored_state(run) or {})}
        about = {"model": self._belongs["reference"], "latents": content(latents)}
        self._base = BaseLatents(run.model, latents.encoders, self.cache, about, run.rank)
        if run.answers_drawn and not self._base.source.live:
            raise ValueError(drawn_answers(self.cache))
        self.reference_name = self._base.source.in_words()
        if self.freeze_above:
            self._frozen = freeze_above(run, max(latents.layers))
        self._dataset, self._resume_from = run.dataset, run.resume_from
        self._spans = [span(e.weight) for e in latents.encoders]
        self._begun, self._measured, self._outside, self._warned, self.prepared = False, 0, None, False, True
        return f"block_em ({self._describe()})"

    def _describe(self) -> str:
        words = [
            f"coef {self.coef:g}{', calibrated' if self.automatic else ''}",
            set_in_words(self.latents.layers, self.latents.signs),
            f"{self.tokens} tokens",
            f"base: {self._base.describe()}",
        ]
        if self.pre_activation:
            words.append("K- by pre-activations")
        if self.freeze_above:
            words.append(f"{len(self._frozen)} tensors above frozen")
        words.append("no yardstick" if self.yardstick is None else f"unguarded penalty {self.yardstick:.3g}")
        return ", ".join(words)

    def _stored_state(self, run: RunFacts) -> dict[str, Any] | None:
        """Return which model the run that is continued started from, once its settings are found to be these."""
        stored = self.find_stored(run)
        if stored is None:
            return None
        for name, here in self._fixed().items():
            if stored[name] != here:
                raise ValueError(
                    f"{run.resume_from} was trained with another `em_regularizer.block_em.{name}`. Resume with the settings of the first "
                    "run, or start afresh without `resume_from_checkpoint`."
                )
        return {name: stored[name] for name in run.identity._asdict()}

    def read_state(self, path: Path, run: RunFacts, own: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read which model and settings a checkpoint was trained with."""
        stored = read_json(path)
        if not {*self._fixed(), *run.identity._asdict()} <= stored.keys():
            raise Damaged(f"{path} is no state of `em_regularizer.block_em`. Restore it from a copy of this checkpoint.")
        return stored, stored

    def write_state(self, path: Path) -> None:
        """Store what a checkpoint was trained with."""
        write_json(path, {"coef": self.coef, **self._fixed(), **self._belongs})

    def flush(self, output_dir: Path) -> None:
        """Write recorded latents that cannot be computed again."""
        self._base.flush(output_dir)

    def _fixed(self) -> dict[str, Any]:
        return {"latents": content(self.latents), "tokens": self.tokens, "freeze_above": self.freeze_above}

    @property
    def region(self) -> str:
        """The kind of tokens that is held."""
        return self.tokens

    def held(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tokens of a batch that are held; see `held_tokens`."""
        return held_tokens(inputs, self.tokens, self._template, self._book)

    # Each step

    def watch(self, moment: Moment) -> AbstractContextManager[Kept]:
        """Keep the blocked layers' outputs of the host's forward pass."""
        return keep_residual(moment.model, self.latents.layers)

    def penalty(self, moment: Moment) -> Penalty | None:
        """Return this micro-batch's share of the step's penalty; see the class for the formula."""
        model, inputs, kept = moment.model, moment.inputs, moment.seen
        hidden = kept.take(self.latents.layers, with_gradient=self.coef > 0)
        if not self._begun:
            if getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
                raise ValueError(
                    "em_regularizer.block_em: NEFTune adds noise to the embeddings in training alone, which the penalty would take for a "
                    "change of the model. Remove `neftune_noise_alpha`."
                )
            self._base.begin(model, kept, next(iter(hidden.values())), self._dataset, self._resume_from)
            self._dataset, self._begun = None, True
        held = self.held(inputs)
        hidden = {n: h[held.to(h.device)] for n, h in hidden.items()}
        base = self._base.get(model, kept, inputs, held)
        per_layer, bad, shift, pres = [], [], [], []
        for i, encoder in enumerate(self.latents.encoders):
            z, pre = encoder.both(hidden[encoder.layer])
            violation = block_em_violation(
                z, base.z[i].to(z.device), encoder.signs,
                *((pre, base.pre[i].to(z.device)) if self.pre_activation else ()),
            )  # fmt: skip
            total = block_em_penalty(violation).sum()
            per_layer.append(total / len(self.latents) if self.latent_reduction == "mean" else total)
            pres.append(pre)
            with torch.no_grad():
                bad.append((violation > 0).sum())
                shift.append((encoder.signs * (z - base.z[i].to(z.device))).relu().sum())
        away = (
            self._away(model, kept, held, pres, base) if moment.step == 0 and self._measured == 0 else torch.zeros((), device=held.device)
        )
        device = per_layer[0].device
        shares = torch.stack([p.to(device) for p in per_layer]) / torch.as_tensor(moment.tokens, device=device)
        pairs = (held.sum().to(device) * len(self.latents)).clamp_min(1)
        metrics = {
            "violating": sum(b.to(device) for b in bad) / pairs,
            "shift": sum(s.to(device) for s in shift) / pairs,
        }
        if (outside := self._outside_shift(model, kept, hidden, base, held)) is not None:
            metrics["outside_shift"] = outside.to(device)
        if self.yardstick is not None:
            metrics["unguarded"] = shares.new_tensor(self.yardstick)
        misheld = (held & answered(inputs["labels"])).sum() if self._answers_alone else None
        return Penalty(shares.sum(), metrics, shares, away, held.sum(), misheld)

    @torch.no_grad()
    def _away(self, model: nn.Module, kept: Kept, held: Tensor, pres: list[Tensor], base: Base) -> Tensor:
        """Return the relative distance from the base model's latents before the first update; what dropout adds is only warned of."""
        away, within = distance(pres, base.pre), BASE_WITHIN if base.hidden is None else BASE_WITHIN / 5
        if not any_process(model, away > within):
            return torch.tensor(away, device=held.device)
        with eval_mode(model), kept.precision():
            hidden = read_residual(model, self.latents.layers, kept.args, kept.kwargs)
        plain = distance([e.both(hidden[e.layer][held.to(hidden[e.layer].device)])[1] for e in self.latents.encoders], base.pre)
        if plain <= within:
            warn_of_dropout(away)
        return torch.tensor(plain, device=held.device)

    @torch.no_grad()
    def _outside_shift(self, model: nn.Module, kept: Kept, hidden: Mapping[int, Tensor], base: Base, held: Tensor) -> Tensor | None:
        """Return the mean of `||(I - P)(h - h_base)|| / ||h_base||`, P projecting on the span of K's encoder columns."""
        there = base.hidden
        if there is None and self._base.source.adapter_off and self._measured % HIDDEN_EVERY == 0:
            there = {n: h[held.to(h.device)] for n, h in self._base.read(model, kept).items()}
        self._measured += 1
        if there is not None:
            ratios = []
            for n, span in zip(self.latents.layers, self._spans, strict=True):
                base_h = there[n].float()
                moved = hidden[n].float() - base_h
                span = span.to(moved.device)
                moved = moved - (moved @ span) @ span.T
                ratios.append((moved.norm(dim=-1) / base_h.norm(dim=-1).clamp_min(1e-12)).sum() / max(len(moved), 1))
            self._outside = sum(r.to(ratios[0].device) for r in ratios) / len(ratios)
        return self._outside

    # Life cycle

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Warn when the penalty is met while the model moves where nothing is held."""
        name = f"em_regularizer/{self.name}"
        penalty, outside = (logs or {}).get(f"{name}/penalty"), (logs or {}).get(f"{name}/outside_shift")
        if not (self._warned or penalty is None or outside is None):
            self._warned = warn_if_bypassed(penalty, outside, self.yardstick, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a cache's last rows."""
        self._base.flush()

    def release(self) -> None:
        """Thaw what was frozen."""
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []
