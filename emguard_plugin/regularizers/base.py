"""A regularizer is a `TrainerCallback` with a `penalty`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.processes.values import over_processes
from emguard_plugin.regularizers.run_facts import Run
from emguard_plugin.regularizers.start import Floors, Start, precision_of, state_of_weights

__all__ = ["EMRegularizerCallback", "Penalty", "Run", "may_train"]


@dataclass(frozen=True)
class Penalty:
    """What `EMRegularizerCallback.penalty` returns.

    Attributes:
        value: Scalar fp32 tensor with gradient, before `coef`.
        metrics: Detached scalars by short name; logged as `em_regularizer/<method>/<name>`.
        per_layer: (layers,) detached contributions, used to name the layer of a non-finite penalty.
        away: How far the model is from its reference, in the unit of `EMRegularizerCallback.floors`; default `value`.
        held: How many tokens this share of the penalty holds; the trainer stops a run in which a method holds none for 20
            optimizer steps. None where it cannot be said.
        misheld: How many of them are what they must not be, answers that the loss supervises; one stops the run.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_layer: Tensor | None = None
    away: Tensor | None = None
    held: Tensor | int | None = None
    misheld: Tensor | None = None


def may_train(value: Tensor) -> bool:
    """Whether a trainable parameter stands behind `value`, as far as the autograd graph shows.

    `requires_grad` alone proves nothing: `enable_input_require_grads`, which hosts call for adapters, makes the output of
    frozen embeddings require grad. A custom function that runs code of its own in backward (reentrant checkpointing,
    offloading, tiled MLPs) can hide parameters, so it counts as training.
    """
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter) or _runs_code(node):
            return True
        stack += [n for n, _ in node.next_functions]
    return False


def _runs_code(node: Any) -> bool:
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    return any(callable(v) and not isinstance(v, type) for v in vars(node).values())


class EMRegularizerCallback(TrainerCallback):
    """Base class: the callback side has the life cycle, `penalty` returns one differentiable scalar.

    The trainer mixin calls `prepare` once before training and `penalty` in `compute_loss`, and is the only place that
    adds `coef * penalty` to a loss.

    Args:
        coef: The papers' lambda. 0 measures the penalty without gradient and leaves the run bit for bit unchanged.

    Raises:
        ValueError: for a negative or non-finite `coef`.
    """

    name: ClassVar[str]
    every: ClassVar[Literal["optimizer_step", "micro_batch"]] = "micro_batch"
    """`optimizer_step`: the penalty depends on the weights alone and is added once per step."""
    own_forward: ClassVar[bool] = False
    """The penalty runs the model itself and goes before the host's forward pass, which it does not read."""
    floors: ClassVar[Floors | None] = None
    """What rounding alone makes of `Penalty.away` before the first update, where that is 0 but for rounding."""

    def __init__(self, coef: float) -> None:
        if not (isinstance(coef, Real) and not isinstance(coef, bool) and 0 <= coef < float("inf")):
            raise ValueError(f"`{self.name}.coef` must be a finite number of at least 0, got {coef!r}.")
        self.coef = float(coef)
        self.prepared = False
        self.micro_batch = (0, 1)
        self.loss_tokens: Tensor | float = 1.0
        self._last: Penalty | None = None
        self._trains = False
        self.answers_alone = False
        self._layer_names: Sequence[int] = ()
        self.source = "the reference"
        self.saved_in: Path | None = None
        self._fresh, self._steps_early, self._autocast, self._start = False, False, "no", None

    @abstractmethod
    def prepare(self, run: Run) -> str:
        """Check the run, find what to hold, load the reference of a resumed run.

        Returns:
            A few words for the line that says what is active.

        Raises:
            ValueError: for settings or data that cannot work, in the words of the YAML.
        """

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
    def penalty(self, model: nn.Module, inputs: Mapping[str, Any], step: int) -> Penalty | None:
        """Return the unweighted penalty, or None when this micro-batch (`self.micro_batch`) has no share in it.

        The mean over micro-batches and processes is what counts for the step.

        Args:
            model: The model as the forward pass must call it (wrapped under FSDP2, unwrapped otherwise).
            inputs: The batch as the host's loss saw it.
            step: Optimizer steps taken so far.
        """

    def watch(self, model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Return a context in which the host runs its forward pass and loss; one that sees nothing by default.

        Args:
            model: As for `penalty`.
            inputs: As for `penalty`.
        """
        return nullcontext()

    def started(self, run: Run) -> None:
        """Note what the trainer mixin has just prepared for."""
        self._fresh, self._steps_early = run.resume_from is None, run.steps_early
        self._start, self.saved_in, self._model, self._autocast = None, None, run.identity.in_words(), run.autocast

    def measure(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        step: int,
        micro_batch: tuple[int, int] = (0, 1),
        loss_tokens: Tensor | float = 1.0,
    ) -> Penalty | None:
        """Call `penalty` and check that it can train something.

        Args:
            model: As for `penalty`.
            inputs: As for `penalty`.
            step: As for `penalty`.
            micro_batch: Which micro-batch of the optimizer step this is, and of how many.
            loss_tokens: What a sum over this micro-batch is to be divided by, as the host divides its loss: supervised tokens
                of the optimizer step, per micro-batch and process.

        Raises:
            RuntimeError: when `coef > 0` and no trainable parameter stands behind the penalty.
        """
        self.micro_batch, self.loss_tokens = micro_batch, loss_tokens
        with torch.set_grad_enabled(self.coef > 0):
            penalty = self.penalty(model, inputs, step)
        if penalty is None:
            return None
        if self.coef > 0 and not (penalty.value.requires_grad and (self._trains or may_train(penalty.value))):
            raise RuntimeError(
                f"em_regularizer.{self.name}: the penalty has no gradient, so it would train nothing. No trainable "
                f"parameter reaches what it holds; widen the adapter's target modules or `layers`, or set `coef: 0`."
            )
        value = penalty.value.detach()
        if micro_batch[0] > 0 and self._last is not None:  # what is not finite in one micro-batch stays so for the step
            value = value + 0 * self._last.value
        if step == 0 and self._fresh and self.floors is not None:
            away = (penalty.value if penalty.away is None else penalty.away).detach().float()
            share = away if self.every == "optimizer_step" else away / micro_batch[1]
            self._start = Start(share if self._start is None else self._start.away + share, precision_of(model, self._autocast))
        self._trains = True  # the graph is the same at every step of a run: walk it once
        self._last = Penalty(value, penalty.metrics, None if penalty.per_layer is None else penalty.per_layer.detach())
        return penalty

    def release(self) -> None:
        """Undo what `prepare` changed in the model. The trainer mixin calls it when training ends, however it ends."""

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

    def save(self, folder: Path, first: bool) -> None:
        """Write into a checkpoint what a resumed run needs; nothing by default. Every process calls it.

        The trainer mixin does so after the weights and before the host's last file, without which no run resumes from it.

        Args:
            folder: `checkpoint-N` in the output folder.
            first: Whether this is the process that writes.

        Raises:
            OSError: naming the file, when it cannot be written.
        """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write into a checkpoint what `save` has not yet written there."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.saved_in != folder:
            self.save(folder, state.is_world_process_zero)
        self.saved_in = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Stop before a non-finite penalty reaches the weights, and before the first update where the reference is another model.

        Here the host has synchronised already.

        Raises:
            FloatingPointError: with the step and the first layer concerned.
            RuntimeError: naming reference and model.
        """
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
            f"{start.precision}), and it is {away:.3g} away from {self.source}: that belongs to another model than {self._model}, which "
            "this run trains, or this model computes in training what it does not compute otherwise. Record a new reference."
        )
