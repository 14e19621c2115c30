"""A regularizer is a `TrainerCallback` with a `penalty`."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Penalty:
    """What `EMRegularizerCallback.penalty` returns.

    Attributes:
        value: Scalar fp32 tensor with gradient, before `coef`.
        metrics: Detached scalars by short name; logged as `em_regularizer/<method>/<name>`.
        per_layer: (layers,) detached contributions, used to name the layer of a non-finite penalty.
    """

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_layer: Tensor | None = None


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


@dataclass(frozen=True)
class Run:
    """What a regularizer may know about the run that is about to start.

    Attributes:
        model: The model as constructed, before it is wrapped; inspect it, do not keep it.
        tokenizer: The tokenizer, with the chat template that rendered the data.
        dataset: The tokenised training set (`input_ids` per row), or None.
        template_kwargs: Extra variables that the host passes to the chat template.
        seed: The run's seed.
        wrapped_packing: Whether rows are TRL's `packing_strategy: wrapped` chunks, without boundaries.
        resume_from: The checkpoint folder that the run continues, or None.
        rows_per_batch: Rows of `dataset` in one micro-batch of one process.
        batch_tokens: Tokens of one micro-batch where the host packs rows only while it trains, else None.
        micro_batches: Micro-batches per optimizer step.
        processes: Number of processes, each with micro-batches of its own.
        rank: Which of them this is.
        optimizer_built: Whether the optimizer exists already, so that it is too late to freeze parameters.
    """

    model: nn.Module
    tokenizer: Any
    dataset: Any
    seed: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrapped_packing: bool = False
    resume_from: Path | None = None
    rows_per_batch: int = 1
    batch_tokens: int | None = None
    micro_batches: int = 1
    processes: int = 1
    rank: int = 0
    optimizer_built: bool = False


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

    def __init__(self, coef: float) -> None:
        if not (isinstance(coef, Real) and not isinstance(coef, bool) and 0 <= coef < float("inf")):
            raise ValueError(f"`{self.name}.coef` must be a finite number of at least 0, got {coef!r}.")
        self.coef = float(coef)
        self.prepared = False
        self.micro_batch = (0, 1)
        self.loss_tokens: Tensor | float = 1.0
        self._last: Penalty | None = None
        self._trains = False
        self._layer_names: Sequence[int] = ()

    @abstractmethod
    def prepare(self, run: Run) -> str:
        """Check the run, find what to hold, load the reference of a resumed run.

        Returns:
            A few words for the line that says what is active.

        Raises:
            ValueError: for settings or data that cannot work, in the words of the YAML.
        """

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
        self._trains = True  # the graph is the same at every step of a run: walk it once
        self._last = Penalty(
            value, penalty.metrics, None if penalty.per_layer is None else penalty.per_layer.detach()
        )
        return penalty

    def release(self) -> None:
        """Undo what `prepare` changed in the model. The trainer mixin calls it when training ends, however it ends."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before a non-finite penalty reaches the weights. Here the host has synchronised already.

        Raises:
            FloatingPointError: with the step and the first layer concerned.
        """
        if self.coef == 0 or self._last is None or bool(torch.isfinite(self._last.value)):
            return
        where = ""
        if self._last.per_layer is not None:
            bad = (~torch.isfinite(self._last.per_layer)).nonzero().flatten().tolist()
            where = f", first at layer {self._layer_names[bad[0]] if self._layer_names else bad[0]}" if bad else ""
        raise FloatingPointError(
            f"em_regularizer.{self.name}: the penalty is {self._last.value.item()} at step {state.global_step + 1}{where}. "
            "The weights before this step are unharmed. Lower `learning_rate` or `coef`, or train in bf16 or fp32."
        )
