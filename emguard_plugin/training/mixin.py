"""The one place that adds penalties to a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.utils import gather_object
from torch import Tensor

from emguard_plugin.chats import Chat
from emguard_plugin.processes.link import agree, linked
from emguard_plugin.reference.checkpoints import step_of, whole_checkpoint
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.penalty import Penalty
from emguard_plugin.regularizers.run_facts import RunFacts
from emguard_plugin.training.em_rate import EMRateCallback
from emguard_plugin.training.held_guard import check_held
from emguard_plugin.training.held_watch import HeldWatch
from emguard_plugin.training.host_checks import check_trainer
from emguard_plugin.training.resumed_adapter import whole_adapter
from emguard_plugin.training.scale import scale, share
from emguard_plugin.training.tested_hosts import check_host

if TYPE_CHECKING:
    _Host: TypeAlias = Any  # the trainer that the mixin stands in front of
else:
    _Host = object


class EMRegularizerMixin(_Host):
    """Put in front of a `transformers.Trainer` subclass; registers nothing and changes nothing by itself.

    Regularizers are the trainer's `EMRegularizerCallback`s. Without one, or with `coef` 0, a run is bit for bit the
    host's own. `eval_loss` stays the task loss.
    """

    _regularizers: tuple[EMRegularizerCallback, ...] = ()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Prepare the regularizers, then train as the host does.

        Args:
            resume_from_checkpoint: As for the host: a folder, or True for the last checkpoint of `output_dir`.
            args: Passed on.
            kwargs: Passed on.

        Returns:
            What the host's `train` returns.

        Raises:
            ValueError: for settings or data that a regularizer cannot work with.
        """
        found = [c for c in self.callback_handler.callbacks if isinstance(c, EMRegularizerCallback)]
        self._regularizers = tuple(found)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EMRateCallback):
                callback.attach(self)
        rated = any(isinstance(callback, EMRateCallback) for callback in self.callback_handler.callbacks)

        def prepare() -> str | bool | None:
            whole = self._whole_checkpoint(resume_from_checkpoint)
            self._prepare_regularizers(whole)
            return whole

        try:
            with linked("training") if found or rated else nullcontext():
                resume = agree(prepare, "em_regularizer") if found else resume_from_checkpoint
                with whole_adapter(self, Path(str(resume)) if resume else None) if found else nullcontext():
                    return super().train(resume, *args, **kwargs)
        finally:
            for callback in found:
                callback.ended()

    def _prepare_regularizers(self, resume: str | bool | None) -> None:
        names = [c.name for c in self._regularizers]
        if len(set(names)) < len(names):
            raise ValueError(f"a method is registered twice: {names}. Keep one callback per method.")
        if warning := check_host(self):
            self.accelerator.print(warning)
        check_trainer(self)
        run = RunFacts(
            model=self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
            tokenizer=getattr(self.processing_class, "tokenizer", self.processing_class),
            dataset=self._rows_as_ids(),
            seed=self.args.seed,
            template_kwargs=self._template_kwargs(),
            wrapped_packing=getattr(self.args, "packing_strategy", None) == "wrapped" and bool(self.args.packing),
            resume_from=Path(str(resume)).resolve() if resume else None,  # what lies beside a checkpoint lies beside what a link names
            rows_per_batch=self.args.per_device_train_batch_size,
            batch_tokens=self._batch_tokens(),
            answers_drawn=self._draws_answers,
            micro_batches=self.args.gradient_accumulation_steps,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            optimizer_built=self.optimizer is not None,
            steps_early=self.is_deepspeed_enabled,
            autocast=str(self.accelerator.mixed_precision),
            chats=self._chats(),
            reference_model=self._reference_model(),
        )
        active = [c.prepare(run) for c in self._regularizers]
        check_held(self._regularizers, run)
        for callback in self._regularizers:
            callback.started(run)
        self._watch = HeldWatch(self._regularizers, self.accelerator)
        self._sums: dict[str, Tensor] = {}
        self._steps_measured = self._micro_batch = 0
        self.accelerator.print(f"em_regularizer active: {'; '.join(active)}")

    def _whole_checkpoint(self, resume: str | bool | None) -> str | bool | None:
        """Return what to resume from: the checkpoint, or the one before it when a kill cut the host's files in it."""
        if resume is True:
            from transformers.trainer_utils import get_last_checkpoint

            found = get_last_checkpoint(self.args.output_dir)
        else:
            found = resume or None
        if found is None or (whole := whole_checkpoint(Path(found))) == Path(found):
            return found or resume
        if whole is None and not (resume is True or self._resumes_by_itself()):
            raise ValueError(
                f"{found} was cut while it was written (it has no readable trainer_state.json), and no whole checkpoint stands before it. "
                "Delete it and start afresh without `resume_from_checkpoint`."
            )
        instead = "starting afresh" if whole is None else f"resuming from {whole.name}"
        self.accelerator.print(f"em_regularizer: {found} was cut while it was written (no readable trainer_state.json); {instead}")
        return None if whole is None else str(whole)

    def _resumes_by_itself(self) -> bool:
        """Return whether the host looked for a checkpoint itself, so that none means a fresh run."""
        return False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the host does; into a checkpoint, put what the regularizers need before the host completes it.

        A checkpoint without `trainer_state.json`, which the host writes last, is never resumed from.
        """
        super().save_model(output_dir, _internal_call=_internal_call)
        if not (_internal_call and output_dir and self._regularizers and step_of(Path(output_dir)) is not None):
            return
        if self.is_world_process_zero():
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # under FSDP with shards the host has written nothing yet
        for callback in self._regularizers:
            if callback.prepared:
                callback.save(Path(output_dir), self.is_world_process_zero())

    def _template_kwargs(self) -> dict[str, Any]:
        """Return what the host passes to the chat template besides the messages."""
        return {}

    def _chats(self) -> Callable[[], Iterable[Chat]] | None:
        """Return what gives the training conversations before they were tokenised, or None where they are gone."""
        return None

    def rendering_settings(self) -> Mapping[str, Any]:
        """Return the settings by which the host renders chats, as its YAML names them."""
        return {"chat_template_kwargs": self._template_kwargs()}

    _draws_answers = False
    """Whether the model writes the answers that it is trained on while it trains."""

    def _rows_as_ids(self) -> Any:
        """Return the training set with `input_ids` per row."""
        return self.train_dataset

    def _reference_model(self) -> Any:
        """Return the host's own reference model, unwrapped, or None."""
        own = getattr(self, "ref_model", None)
        return self.accelerator.unwrap_model(own, keep_torch_compile=False) if isinstance(own, torch.nn.Module) else None

    def _batch_tokens(self) -> float | None:
        """Return the tokens of a micro-batch where the rows do not show them."""
        return None

    def _policy_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch as rows that the trained model reads in the host's loss: `input_ids`, `attention_mask`, `labels`."""
        return dict(inputs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the host's loss plus `sum_i coef_i * penalty_i`, scaled so that accumulation does not change it.

        The host divides the loss by the number of accumulated micro-batches unless it is normalised by tokens already. A
        penalty of every micro-batch must be divided exactly once, a penalty of the optimizer step not at all.
        """
        active = self._regularizers if model.training else ()
        if not active:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        last, n = self.accelerator.sync_gradients, self.current_gradient_accumulation_steps
        batch = self._policy_batch(inputs)  # a copy: hosts pop from theirs
        moment = Moment(
            model=self.accelerator.unwrap_model(model, keep_torch_compile=False),
            inputs=batch,
            step=self.state.global_step,
            micro_batch=self._micro_batch,
            micro_batches=n,
            tokens=self._loss_tokens(batch, num_items_in_batch),
        )
        for regularizer in active:
            regularizer.joined()
        due = [r for r in active if last or r.every == "micro_batch"]
        # A penalty with a forward pass of its own goes before the host's: backward then reaches it last, and its weight
        # gradients do not wait beside the host's activations (TReFT, full fine-tuning: 6.8 % of peak memory).
        penalties = {r.name: r.measure(moment) for r in due if r.own_forward}
        with ExitStack() as watching:
            seen = {r.name: watching.enter_context(r.watch(moment)) for r in active}
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        penalties |= {r.name: r.measure(replace(moment, seen=seen[r.name])) for r in due if not r.own_forward}
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        host_divides = self._host_divides(num_items_in_batch)
        self._add("task_loss", loss.detach() / n if host_divides else loss.detach())
        for regularizer in due:
            penalty = penalties[regularizer.name]
            if penalty is None:
                continue
            if regularizer.coef > 0:
                loss = loss + scale(regularizer.every, host_divides, n) * regularizer.coef * penalty.value.to(loss.device)
            elif penalty.value.requires_grad:  # its graph must be gone through, and adds nothing
                loss = loss + 0.0 * penalty.value.nan_to_num(0.0, 0.0, 0.0).to(loss.device)
            self._record(regularizer, penalty, share(regularizer.every, n))
            self._watch.count(regularizer, penalty)
        if last:
            self._watch.step_ends()
        self._steps_measured += int(last)
        self._micro_batch = 0 if last else self._micro_batch + 1
        return (loss, *rest) if return_outputs else loss

    def _host_divides(self, num_items_in_batch: Any) -> bool:
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers >= 5.19
        if scaled is None:
            scaled = self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)
        return not scaled

    def _loss_tokens(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor | float:
        """Return what a sum over this micro-batch is divided by so that it is to the penalty as its tokens are to the loss.

        A penalty is averaged over micro-batches and processes. Where the host divides by the tokens of the whole step, that
        is their number per micro-batch and process; where it averages each micro-batch, the micro-batch's own.
        """
        labels = inputs.get("labels")
        if not self._host_divides(num_items_in_batch) and num_items_in_batch is not None:
            shared = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return num_items_in_batch / (self.current_gradient_accumulation_steps * shared)
        return 1.0 if labels is None else (labels[..., 1:] != -100).sum().clamp_min(1)

    # Metrics, through the host's own log

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _record(self, regularizer: EMRegularizerCallback, penalty: Penalty, share: float) -> None:
        name = f"em_regularizer/{regularizer.name}"
        self._add(f"{name}/penalty", penalty.value * share)
        for metric, value in penalty.metrics.items():
            self._add(f"{name}/{metric}", value * share)

    def _drain_metrics(self) -> dict[str, float]:
        """Return the means since the last log. A method that measured nothing since has a coefficient and no penalty."""
        names, steps = sorted(self._sums), max(self._steps_measured, 1)
        device = self.accelerator.device
        if self.accelerator.num_processes > 1:
            # A rank whose micro-batches had no share in a penalty has no sum of it, and a mean is over all ranks.
            names = sorted(set(gather_object(names)))
        nothing = torch.zeros((), device=device)
        means = torch.stack([self._sums.get(n, nothing).to(device) for n in names]) / steps
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        logs = dict(zip(names, means.tolist(), strict=True))
        for r in self._regularizers:
            logs[f"em_regularizer/{r.name}/coef"] = r.coef
            if (penalty := logs.get(f"em_regularizer/{r.name}/penalty")) is not None:
                logs[f"em_regularizer/{r.name}/weighted"] = r.coef * penalty
        self._sums, self._steps_measured = {}, 0
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `task_loss` and `em_regularizer/*` to the host's training logs."""
        if self._regularizers and "loss" in logs and self._sums:
            logs = {**logs, **self._drain_metrics()}
        super().log(logs, start_time)
