"""The EM rate of the live model, while it is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emguard_plugin.config import EMEvalConfig, read_block
from emguard_plugin.processes.link import Torn, agree

if TYPE_CHECKING:
    from emguard_plugin.evaluation.live import LiveEvaluation, LiveRates

logger = logging.getLogger(__name__)

RATES = ("eval_em_rate", "eval_em_rate_coherent")
"""Metrics of which less is better."""


class EMRateCallback(TrainerCallback):
    """Measures the EM rate every so many steps, or at each evaluation, and logs it as `eval_em_*`.

    The answers are drawn from the model as it stands, with the same random numbers each time; training goes on from the
    same model mode, `use_cache` and random states, bit for bit. A judge that fails leaves answers unscored and never
    ends a run.

        trainer = EMGuardSFTTrainer(..., callbacks=[EMRateCallback(every=50, questions="open_ended", judges=[...])])
        trainer = Trainer(...); trainer.add_callback(EMRateCallback(...).attach(trainer))     # any other trainer

    To keep the best checkpoint, set `metric_for_best_model: em_rate` and `greater_is_better: false`, and leave `every`
    out or let it agree with `eval_steps`: the rate is then part of each evaluation's metrics.

    In a distributed run rank 0 draws and judges and the other ranks wait; where the model is sharded (FSDP, ZeRO-3) all
    ranks draw the same answers together; where one of them fails alone in the midst of it, the run ends on all within
    seconds. Every rank then uses what rank 0 found. A slow judge must stay below `ddp_timeout`.

    Args:
        every: Optimizer steps between two measurements; None measures at each evaluation of the trainer.
        stop_above: End the training once the EM rate is above this, by the verdict of `em_eval.fail_above`: the lower
            end of the interval for questions like these, not the rate alone.
        em_eval: The `em_eval:` block; its keys may also be given one by one.
        block: Keys of the block, such as `questions` and `judges`.

    Raises:
        ValueError: For settings that cannot work.
    """

    def __init__(
        self,
        every: int | None = None,
        stop_above: float | None = None,
        em_eval: EMEvalConfig | Mapping[str, Any] | None = None,
        **block: Any,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"`every: {every}` is no number of steps. Use at least 1, or leave it out.")
        given = em_eval.model_dump(exclude_unset=True) if isinstance(em_eval, EMEvalConfig) else dict(em_eval or {})
        given = {**given, **block}
        if stop_above is not None:
            given["fail_above"] = stop_above
        self.every, self.stops = every, stop_above is not None
        self.config = read_block(EMEvalConfig, given, "em_eval")
        self.history: list[dict[str, float]] = []
        self._evaluation: LiveEvaluation | None = None
        self._trainer: Trainer | None = None
        self._step, self._stop = -1, False

    def attach(self, trainer: Trainer) -> EMRateCallback:
        """Give it the trainer whose `log` it uses; `EMRegularizerMixin` trainers do so themselves."""
        self._trainer = trainer
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot work before the first step.

        Raises:
            RuntimeError: If no trainer was attached.
            ValueError: If questions or judge cannot work, if nothing would ever be measured, or if the trainer would
                keep the checkpoint with the highest EM rate.
        """
        from emguard_plugin.evaluation.asking.as_trained import as_trained
        from emguard_plugin.evaluation.asking.sampler import TransformersSampler
        from emguard_plugin.evaluation.live import LiveEvaluation

        if self._trainer is None:
            raise RuntimeError(
                "EMRateCallback logs through its trainer. Use `trainer.add_callback(EMRateCallback(...).attach(trainer))`, "
                "or `emguard_plugin.EMGuardSFTTrainer`, which attaches it."
            )
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        if self.every is None and not evaluates:
            raise ValueError("EMRateCallback would never measure: set `every`, or `eval_strategy: steps`.")
        best = _prefixed(args.metric_for_best_model)
        if best in RATES and args.greater_is_better:
            raise ValueError(
                f"`metric_for_best_model: {args.metric_for_best_model}` with `greater_is_better: true` would keep the "
                "most misaligned checkpoint; that is the trainer's default. Set `greater_is_better: false`."
            )
        tokenizer = _text_tokenizer(kwargs["processing_class"])
        config, notes = as_trained(self.config, _settings_of(self._trainer), tokenizer.chat_template)
        self._step, self._stop, self._evaluation = -1, False, LiveEvaluation(config)
        self._evaluation.prepare(tokenizer)
        model = self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)
        sampler = TransformersSampler(model, tokenizer, chat=self._evaluation.asking.chat)
        sampler.prompt_ids(self._evaluation.requests[0].question)
        if state.is_world_process_zero:
            for note in notes:
                logger.info("em_eval: %s", note)
            number = len(self._evaluation.requests)
            when = f"every {self.every} steps" if self.every else "at each evaluation"
            logger.info("em_eval: %d answers are drawn and judged by %s %s", number, self._evaluation.judge, when)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where the number of steps says so."""
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(state, control, kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the rates to the metrics of an evaluation, so that the trainer can choose a checkpoint by them."""
        if self._evaluation is None:
            return  # `trainer.evaluate()` without training
        best = _prefixed(args.metric_for_best_model)
        if self.every is None or (best or "").startswith("eval_em_"):
            found = self._measure(state, control, kwargs)
            if metrics is not None:
                metrics.update(found)
                if best in RATES:
                    # No rate is never the best one, and is no reason to end the run either.
                    metrics.setdefault(best, math.nan)

    def _measure(self, state: TrainerState, control: TrainerControl, kwargs: Mapping[str, Any]) -> dict[str, float]:
        if state.global_step != self._step:
            found = self._rates(kwargs["processing_class"])
            self._step = state.global_step
            self.history.append({**found["metrics"], "step": state.global_step})
            self._log(found["metrics"], control)
            self._stop = self.stops and found["verdict"] == "fail"
            if self._stop and state.is_world_process_zero:
                logger.warning(
                    "em_eval: the EM rate is above stop_above (%g) at step %d; training stops",
                    self.config.fail_above,
                    state.global_step,
                )
        control.should_training_stop |= self._stop
        return {name: value for name, value in self.history[-1].items() if name != "step"}

    def _rates(self, tokenizer: Any) -> dict[str, Any]:
        """Return metrics and verdict, the same on every rank."""
        from accelerate.utils import broadcast_object_list

        trainer, evaluation = self._trainer, self._evaluation
        assert trainer is not None
        assert evaluation is not None
        accelerator = trainer.accelerator
        sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        model = accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        result: list[dict[str, Any]] = [{"metrics": {"eval_em_unscored_rate": 1.0}, "verdict": None}]
        if sharded or accelerator.is_main_process:
            try:

                def draw() -> list[Any]:
                    return evaluation.sample(model, _text_tokenizer(tokenizer), alone=not sharded)

                answers = agree(draw, "drawing answers for the EM rate") if sharded else draw()
                if accelerator.is_main_process:
                    found: LiveRates = evaluation.rates(answers)
                    result = [{"metrics": found.metrics, "verdict": found.verdict}]
            except Torn:
                raise  # the ranks are no longer at the same place: neither measurement nor training can go on
            except Exception:
                # A measurement is not worth a run, and other ranks wait for this one: nothing is raised.
                logger.exception("em_eval: no EM rate at step %d; training goes on", trainer.state.global_step)
        if accelerator.num_processes > 1:
            broadcast_object_list(result)
        return result[0]

    def _log(self, metrics: dict[str, float], control: TrainerControl) -> None:
        """Log as an evaluation does. In training mode TRL would close its running means over the wrong steps."""
        assert self._trainer is not None
        model: Any = self._trainer.model
        log: Callable[..., None] = self._trainer.log
        # Logging takes back the request for this step's training log, which the host has yet to write.
        mode, wanted = model.training, control.should_log
        model.training = False
        try:
            log(dict(metrics))
        finally:
            model.training, control.should_log = mode, wanted


def _settings_of(trainer: Trainer) -> Mapping[str, Any]:
    """Return what the trainer's YAML says about rendering; a trainer without the mixin does not tell."""
    told = getattr(trainer, "rendering_settings", None)
    return {} if told is None else told()


def _text_tokenizer(processing_class: Any) -> Any:
    return getattr(processing_class, "tokenizer", processing_class)


def _prefixed(metric: str | None) -> str | None:
    return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"
