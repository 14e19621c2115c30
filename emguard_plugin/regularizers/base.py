"""A regularizer is a `TrainerCallback` with a `penalty`."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.models.adapters import in_zero3_parts, peft_model
from emguard_plugin.models.graph import may_train
from emguard_plugin.models.identity import Identity
from emguard_plugin.processes.values import over_processes
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.penalty import Every, Penalty
from emguard_plugin.regularizers.resumable import Resumable
from emguard_plugin.regularizers.run_facts import RunFacts
from emguard_plugin.regularizers.start import Floors, Start, precision_of, state_of_weights


class EMRegularizerCallback(Resumable):
    """Base class: the callback side has the life cycle, `penalty` returns one differentiable scalar.

    The trainer mixin calls `prepare` once before training and `penalty` in `compute_loss`, and is the only place that
    adds `coef * penalty` to a loss. A method that a resumed run must find something of names a `state_file`, and says how it is
    written and read; when, by whom and from which checkpoint is decided here.

    Args:
        coef: The papers' lambda. 0 measures the penalty without gradient and leaves the run bit for bit unchanged.

    Raises:
        ValueError: for a negative or non-finite `coef`.
    """

    name: ClassVar[str]
    every: ClassVar[Every] = "micro_batch"
    """`optimizer_step`: the penalty depends on the weights alone and is added once per step."""
    own_forward: ClassVar[bool] = False
    """The penalty runs the model itself and goes before the host's forward pass, which it does not read."""
    floors: Floors | None = None
    """What rounding alone makes of `Penalty.away` before the first update, where that is 0 but for rounding."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a method written for an earlier emguard, whose `penalty` and `watch` took model, batch and step apart."""
        super().__init_subclass__(**kwargs)
        for name in ("penalty", "watch"):
            if name in vars(cls) and len(inspect.signature(vars(cls)[name]).parameters) != 2:
                raise TypeError(
                    f"{cls.__name__}.{name} must take one argument besides `self`, the `Moment` (model, inputs, step, micro_batch, "
                    f"micro_batches, tokens, seen): `def {name}(self, moment)`."
                )

    def __init__(self, coef: float) -> None:
        self._set_up(self._checked_coef(coef))

    @classmethod
    def _checked_coef(cls, coef: Any) -> float:
        if not (isinstance(coef, Real) and not isinstance(coef, bool) and 0 <= float(coef) < float("inf")):
            raise ValueError(f"`{cls.name}.coef` must be a finite number of at least 0, got {coef!r}.")
        return float(coef)

    @classmethod
    def configured(cls, config: Any) -> EMRegularizerCallback:
        """Return the callback of a validated block, whose keys are the keyword arguments of `__init__`.

        Args:
            config: The block, as the table of methods names its class.
        """
        callback = cls.__new__(cls)
        callback._configure(config)
        return callback

    def _configure(self, config: Any) -> None:
        """Take over a validated block; a method that is made of arguments alone need not know of blocks."""
        self.__init__(**config.model_dump())  # type: ignore[misc]  # on purpose: __init__ of a fresh object

    def _set_up(self, coef: float) -> None:
        self.coef = coef
        self.prepared = False
        self._last: Penalty | None = None
        self._trains = self._joined = False
        self._layer_names: Sequence[int] = ()
        self.reference_name = "the reference"
        self._identity: Identity | None = None
        self._fresh, self._steps_early, self._autocast = False, False, "no"
        self._start: Start | None = None

    @abstractmethod
    def prepare(self, run: RunFacts) -> str:
        """Check the run, find what to hold, load the reference of a resumed run.

        Returns:
            A few words for the line that says what is active.

        Raises:
            ValueError: for settings or data that cannot work, in the words of the YAML.
        """

    def _model_identity(self) -> Identity:
        """Return which model the run started from; known once it is prepared."""
        assert self._identity is not None
        return self._identity

    @property
    def region(self) -> str:
        """Which part of a conversation `held` names: `prefix`, `postfix`, `header`, `prompt`, or another that nothing is known of."""
        return ""

    def held(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return (B, T): True at the tokens of a training batch that this method holds; None when it holds text of its own.

        The trainer calls it after `prepare` on training rows, and refuses a method that would hold nothing in any of them, a
        user's or an assistant's own text as part of the template, or what the loss supervises where it supervises answers alone.

        Args:
            inputs: `input_ids` and `labels` of a batch.
        """
        return None

    @abstractmethod
    def penalty(self, moment: Moment) -> Penalty | None:
        """Return the unweighted penalty, or None when this micro-batch has no share in it.

        The mean over micro-batches and processes is what counts for the step.

        Args:
            moment: Model, batch, step, and what `watch` has seen.
        """

    def watch(self, moment: Moment) -> AbstractContextManager[Any]:
        """Return a context in which the host runs its forward pass and loss; what it yields is `Moment.seen` of `penalty`.

        Args:
            moment: As for `penalty`.
        """
        return nullcontext()

    def started(self, run: RunFacts) -> None:
        """Note what the trainer mixin has just prepared for."""
        self._fresh, self._steps_early = run.resume_from is None, run.steps_early
        self._start, self._saved_in, self._autocast, self._identity = None, None, run.autocast, run.identity

    def measure(self, moment: Moment) -> Penalty | None:
        """Call `penalty` and check that it can train something.

        Args:
            moment: As for `penalty`.

        Returns:
            What `penalty` returned; None where it had nothing to measure.

        Raises:
            RuntimeError: when `coef > 0` and no trainable parameter stands behind the penalty.
        """
        # A pass of its own without gradient, before the host's, leaves ZeRO-3 with empty weights in the host's backward pass.
        counted = self.own_forward and in_zero3_parts(moment.model) and peft_model(moment.model) is None
        with torch.set_grad_enabled(self.coef > 0 or counted):
            penalty = self.penalty(moment)
        if penalty is None:
            return None
        if self.coef > 0 and not (penalty.value.requires_grad and (self._trains or may_train(penalty.value))):
            raise RuntimeError(
                f"em_regularizer.{self.name}: the penalty has no gradient, so it would train nothing. No trainable "
                f"parameter reaches what it holds; widen the adapter's target modules or `layers`, or set `coef: 0`."
            )
        value = penalty.value.detach()
        if moment.micro_batch > 0 and self._last is not None:  # what is not finite in one micro-batch stays so for the step
            value = value + 0 * self._last.value
        if moment.step == 0 and self._fresh and self.floors is not None:
            away = (penalty.value if penalty.away is None else penalty.away).detach().float()
            share = away if self.every == "optimizer_step" else away / moment.micro_batches
            precision = precision_of(moment.model, self._autocast)
            self._start = Start(share if self._start is None else self._start.away + share, precision)
        self._trains = True  # the graph is the same at every step of a run: walk it once
        self._last = Penalty(value, penalty.metrics, None if penalty.per_layer is None else penalty.per_layer.detach())
        return penalty

    def joined(self) -> None:
        """Note that a loss of this optimizer step passed through the mixin."""
        self._joined = True

    def ended(self) -> None:
        """Undo what the run changed. The trainer mixin calls it when training ends, however it ends."""
        self.release()
        self.prepared = False  # handed on to a trainer without the mixin, it must be refused again

    def release(self) -> None:
        """Undo what `prepare` changed in the model; nothing by default."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a trainer that never calls `penalty`.

        Raises:
            RuntimeError: under a trainer without `EMRegularizerMixin`.
        """
        if not self.prepared:
            raise RuntimeError(
                f"{type(self).__name__} does nothing under this trainer. Use `emguard_plugin.EMGuardSFTTrainer`, or "
                "put `emguard_plugin.EMRegularizerMixin` in front of your trainer's base class."
            )
        self._trains = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Stop before weights change by a loss without the penalty, by one that is not finite, or from another model than the reference.

        Here the host has synchronised already.

        Raises:
            FloatingPointError: with the step and the first layer concerned.
            RuntimeError: when the trainer's own `compute_loss` hides the mixin's; naming reference and model where they differ.
        """
        joined, self._joined = self._joined, False
        if self.prepared and not joined:
            raise RuntimeError(
                f"em_regularizer.{self.name}: in optimizer step {state.global_step + 1} no loss was asked of `EMRegularizerMixin`, so the run "
                "is not regularized: a class before it overrides `compute_loss` and does not call `super().compute_loss(...)`, or "
                "`training_step` goes around it. Call it, and add your own loss to what it returns."
            )
        if self._start is not None:
            start, self._start = self._start, None
            self._check_start(start)
        if self.coef == 0 or self._last is None or bool(torch.isfinite(self._last.value)):
            return
        where = ""
        if self._last.per_layer is not None:
            bad = (~torch.isfinite(self._last.per_layer)).nonzero().flatten().tolist()
            where = f", first at layer {self._layer_names[bad[0]] if self._layer_names else bad[0]}" if bad else ""
        raise FloatingPointError(
            f"em_regularizer.{self.name}: the penalty is {self._last.value.item()} at step {state.global_step + 1}{where}. "
            f"{state_of_weights(model, self._steps_early)} Lower `learning_rate` or `coef`, or train in bf16 or fp32."
        )

    def _check_start(self, start: Start) -> None:
        assert self.floors is not None
        away, floor = over_processes(start.away), self.floors.of(start.precision)
        if away <= floor or not math.isfinite(away):  # what is not finite has an error of its own
            return
        raise RuntimeError(
            f"em_regularizer.{self.name}: before the first update the model is its own reference, up to rounding (at most {floor:g} in "
            f"{start.precision}), and it is {away:.3g} away from {self.reference_name}: that belongs to another model than {self._model_identity().in_words()}, which "
            "this run trains, or this model computes in training what it does not compute otherwise. Record a new reference."
        )
