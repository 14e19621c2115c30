"""KL to the model before this run, on anchor text of other domains (Soligo et al., arXiv 2602.07852)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from emguard_plugin import chats as ct
from emguard_plugin.chats import anchors as an
from emguard_plugin.chats.sources import TokenizedChat
from emguard_plugin.chats.training_rows import mean_row_tokens
from emguard_plugin.config import KLConfig
from emguard_plugin.files.state import Damaged, read_json, write_json
from emguard_plugin.models.modes import checkpointed_eval_mode, eval_mode
from emguard_plugin.models.output_head import base_head, call_with_hidden, logit_transform, output_head
from emguard_plugin.processes.values import first_process
from emguard_plugin.reference.folder import tokenizer_identity
from emguard_plugin.reference.source import Source
from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.kl.reference import KEY, KLReference, collate
from emguard_plugin.regularizers.kl.replies import sample_replies
from emguard_plugin.regularizers.kl.schedule import Schedule
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.penalty import Every, Penalty
from emguard_plugin.regularizers.run_facts import RunFacts
from emguard_plugin.regularizers.start import Floors, check_switched_off

logger = logging.getLogger(__name__)
STATE_FILE = "emguard_kl.json"
DEFAULT_COEF = 0.7
GAIN, LARGEST_ERROR = 0.5, 0.2
COEF_BOUNDS = (1e-3, 1e3)
_FIELDS = {"coef", "anchors", "sampled", "base", "name", "adapter_off", "content", "model"}


def adapted_coef(coef: float, kl: float, target: float) -> float:
    """Return `clip(coef * (1 + 0.5 * clip(kl / target - 1, -0.2, 0.2)), 1e-3, 1e3)`: up when the KL is above its target.

    The adaptive KL controller of Ziegler et al., arXiv 1909.08593, section 2.2, with a gain of 0.5 per step instead of 0.1:
    a fine-tune has hundreds of steps, not thousands.
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return min(max(coef * (1 + GAIN * error), COEF_BOUNDS[0]), COEF_BOUNDS[1])


class KLCallback(EMRegularizerCallback):
    """Hold the next-token distribution on anchor chats at that of the model before this run.

    `penalty = (1/N) sum_t KL(p_base(. | x_<t) || p_model(. | x_<t))`, in nats per token, exact over the vocabulary,

    over the N held tokens of the anchors that one optimizer step draws, whatever the number of micro-batches and processes;
    `direction: model||base` has the two swapped. The trainer adds `coef * penalty` to the mean cross-entropy. The anchors go
    through forward passes of their own, without dropout, checkpointed where the host checkpoints; the output head runs a few
    hundred tokens at a time, softmax in fp32. With bf16 weights the penalty is known to about 1e-4 nats: do not read more
    into it, and do not set `target` below 1e-3.

    The reference is the adapter switched off (`cache: live`), the trainer's own reference model where DPO, KTO or GRPO has one and nothing
    else gives the model before this run, or its last hidden states at the held tokens, recorded before
    step 1 in memory or in a folder; with a head that trains, the head as it was is kept too.

    Args:
        coef: lambda, in nats per token; default 0.7.
        anchors: `bundled`, a JSONL of chats, a folder, a data set's name, `train`, `self` or `self:<one of these>`.
        direction: `base||model` or `model||base`.
        tokens: `all`, or those of the `assistant`.
        ratio: Anchor tokens per training token. At least one anchor per process and step is used.
        target: Hold the penalty near this value instead, by moving the coefficient; see `adapted_coef`.
        cache: `auto`, `live`, `memory` or a folder.

    Raises:
        ValueError: for values outside these, or `coef` and `target` together.

    Paper: Emergent Misalignment is Easy, Narrow Misalignment is Hard, arXiv 2602.07852. Its code averages over the vocabulary
    too, so its lambda of 1e5 is 0.66 here at V = 152,064; it holds a second model and all logits, and adds the term once per
    micro-batch, which multiplies it by the accumulation steps under today's trainers.
    """

    name: ClassVar[str] = "kl"
    every: ClassVar[Every] = "micro_batch"
    own_forward: ClassVar[bool] = True
    state_file: ClassVar[str] = STATE_FILE
    floors: Floors | None = Floors(fp32=1e-5, fp16=1e-3, bf16=1e-2, quantised=3e-2)

    def __init__(
        self,
        coef: float | None = None,
        anchors: str = "bundled",
        direction: Literal["base||model", "model||base"] = "base||model",
        tokens: Literal["all", "assistant"] = "all",
        ratio: float = 0.125,
        target: float | None = None,
        cache: str = "auto",
    ) -> None:
        coef = None if coef is None else self._checked_coef(coef)
        anchors, cache = (str(value) if isinstance(value, Path) else value for value in (anchors, cache))
        self._configure(KLConfig(coef=coef, anchors=anchors, direction=direction, tokens=tokens, ratio=ratio, target=target, cache=cache))

    def _configure(self, config: KLConfig) -> None:
        self._set_up(DEFAULT_COEF if config.coef is None else config.coef)
        self._config = config
        self.anchors, self.direction, self.tokens, self.ratio = config.anchors, config.direction, config.tokens, config.ratio
        self.target, self.cache = config.target, config.cache
        self._anchors: list[TokenizedChat] = []
        self._prompts: list[ct.Ids] = []
        self._begun = False
        self._step_kl: Tensor | None = None

    # Before training

    def prepare(self, run: RunFacts) -> str:
        """Read and check the anchors, find the reference, continue a resumed run's coefficient."""
        self._config.check_files()
        output_head(run.model)
        self._beside = run.shared_reference if self.cache in ("auto", "live") else None
        if self.cache == "live":
            Source(KEY, self.cache, run.model, beside=self._beside)  # before the anchors are read
        self._tokenizer, self._longest = run.tokenizer, run.context_length
        self._batch_tokens = run.batch_tokens or mean_row_tokens(run.sample) * run.rows_per_batch
        if not self._batch_tokens:
            raise ValueError("the training data is empty: `em_regularizer.kl.ratio` cannot be kept.")
        self._identity, self._begun = run.identity, False
        self._run = replace(run, model=None, dataset=None, reference_model=None)
        stored = self._stored_state(run)
        self._load_anchors(run, stored)
        if stored is not None:
            self.coef = stored["coef"] if self.target is not None else self.coef
        self._resumed = stored
        if self._anchors:
            self._plan(run.model)
        what = f"coef {self.coef:g} nats per token" if self.target is None else f"held at {self.target:g} nats per token"
        self.prepared = True
        return f"kl ({what}, KL({self.direction}), {self._describe()})"

    def _describe(self) -> str:
        if not self._anchors:
            return f"replies to {len(self._prompts)} prompts to be sampled"
        plan = self._schedule
        return (
            f"{len(self._anchors)} anchors ({self.anchors}), {plan.per_step} per step in {plan.passes} of {plan.micro_batches} "
            f"micro-batches ({plan.ratio:.3g} anchor tokens per training token), {self.tokens} tokens, reference: "
            f"{self._reference.source.describe()}"
        )

    def _load_anchors(self, run: RunFacts, stored: Mapping[str, Any] | None) -> None:
        source, _, rest = self.anchors.partition(":")
        if source == "self":
            if stored is not None:
                self._anchors = [TokenizedChat(tuple(ids), tuple(held)) for ids, held in stored["sampled"]]
            else:
                self._prompts = an.prompts_of(an.load_chats(rest or "bundled"), run.tokenizer, run.template_kwargs)
            return
        if self.anchors == "train":
            if run.answers_drawn:
                raise ValueError(
                    f"`{an.KEY}: train`: the model writes the answers of this run while it trains, so its rows are prompts alone. Use "
                    "`bundled`, or chats of your own."
                )
            prefix = run.template.prefix if run.wrapped_packing else None
            self._anchors = an.training_anchors(run.sample, self.tokens, prefix)
            return
        chats = an.load_chats(self.anchors)
        self._anchors = an.tokenize_chats(chats, run.tokenizer, self.tokens, self._longest, run.template_kwargs)
        same_prompt, same = an.overlap(chats, run.sample, run.tokenizer)
        if same == len(chats):
            raise ValueError(
                f"`{an.KEY}: {self.anchors}`: every anchor stands in the training data, so KL would hold the very task. Use chats "
                "of other domains (`bundled`), or say `anchors: train` if this is meant."
            )
        if same_prompt:
            logger.warning(
                "em_regularizer.kl: %d of %d anchors ask what training rows ask too; KL holds the model back there. Use anchors "
                "of other domains.", same_prompt, len(chats),
            )  # fmt: skip

    def _plan(self, model: nn.Module) -> None:
        run = self._run
        sizes = [len(a.ids) for a in self._anchors]
        self._schedule = Schedule.plan(sizes, self.ratio, self._batch_tokens, run.micro_batches, run.processes, run.seed)
        about = {"tokenizer": tokenizer_identity(self._tokenizer), "anchors": an.content_hash(self._anchors)}
        about["model"] = self._model_identity().reference
        resumed = self._resumed
        if resumed is not None and resumed["anchors"] != about["anchors"]:
            raise ValueError(
                f"{run.resume_from} was trained with other anchors than `{an.KEY}: {self.anchors}` or another `tokens`. Resume "
                "with the settings of the first run, or start afresh without `resume_from_checkpoint`."
            )
        self._reference = KLReference(model, self._anchors, self.cache, about, run.resume_from, resumed, self._beside)

    def _stored_state(self, run: RunFacts) -> dict[str, Any] | None:
        if run.resume_from is None:
            return None
        found = self.find_stored(run)
        if found is None and self.anchors.startswith("self"):
            raise ValueError(
                f"{run.resume_from} holds no {STATE_FILE} with sampled replies. Start afresh, or use other anchors than `self`."
            )
        if self.target is not None and (found is None or found["folder"] != run.resume_from):
            lost = f"{run.resume_from} holds no readable {STATE_FILE}, where alone the coefficient stood that `target` had come to"
            if found is not None:
                raise ValueError(f"{lost}. Resume from {found['folder']}, which has its own.")
            logger.warning("em_regularizer.kl: %s; it begins at %g again", lost, self.coef)
        return found

    def read_state(self, path: Path, run: RunFacts, own: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's coefficient, sampled anchors and reference."""
        stored = read_json(path)
        if not stored.keys() >= _FIELDS:
            raise Damaged(f"{path} is no state of `em_regularizer.kl`. Restore it from a copy of this checkpoint.")
        return {**stored, "folder": path.parent}, {**stored, "reference": stored["model"]}

    # Each step

    def penalty(self, moment: Moment) -> Penalty | None:
        """Return this micro-batch's share of the step's mean KL; see the class for the formula."""
        model, device = moment.model, moment.device
        if not self._begun:
            self._begin(model, device)
        index, micro_batches = moment.micro_batch, moment.micro_batches
        if index == 0:
            self._step_kl = None
        processes = self._run.processes
        slots = self._schedule.slots(moment.step, micro_batches)
        slot = index * processes + self._run.rank
        if slot >= len(slots):
            return None
        batch = collate(self._anchors, slots[slot], device)
        total = sum(len(self._anchors[i].held) for rows in slots for i in rows)
        reference = self._reference.hidden(model, batch)
        with checkpointed_eval_mode(model):
            kl, logits = call_with_hidden(
                model, batch.ids, batch.mask, lambda h: self._reference.kl(model, batch.held(h), reference, self.direction)
            )
        # The mixin and DDP take means over micro-batches and processes: this makes them a mean over the step's tokens.
        share = micro_batches * processes / total
        # FSDP2 gathers weights for backward only when an output of the model depends on what is differentiated.
        value = kl * share + 0.0 * logits.float().sum().to(kl.device)
        self._step_kl = value.detach() / micro_batches + (0 if self._step_kl is None else self._step_kl)
        tokens = value.new_tensor(micro_batches * processes * len(reference))
        return Penalty(value, {"tokens": tokens}, held=len(reference))

    def _begin(self, model: nn.Module, device: torch.device) -> None:
        run = self._run
        if not self._anchors:
            self._sample(model, run)
            self._plan(model)
            logger.info("em_regularizer.kl: %s", self._describe())
        ids = torch.tensor([self._anchors[0].ids[:2]], device=device)
        with eval_mode(model):  # dropout would draw from the host's random numbers
            transform = logit_transform(model, ids)
            base_head(model, ids, transform, self._reference.source.adapter_off)
            if self._reference.source.adapter_off:
                check_switched_off(model, ids, "em_regularizer.kl")
        self._reference.begin(model, transform, device, run.rank)
        self.reference_name = self._reference.source.in_words()
        self._begun = True

    def _sample(self, model: nn.Module, run: RunFacts) -> None:
        prompts = [p for p in self._prompts if len(p) < self._longest]
        replies = sample_replies(model, self._tokenizer, prompts, run.seed, self._longest)
        for prompt, reply in zip(prompts, first_process(lambda: replies), strict=True):
            ids = (*prompt, *reply)
            start = 0 if self.tokens == "all" else len(prompt) - 1
            self._anchors.append(TokenizedChat(ids, tuple(range(start, len(ids) - 1))))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the coefficient towards the target, by the same amount on every process."""
        if self.target is None or self._step_kl is None:
            return
        kl = self._step_kl.clone()
        if self._run.processes > 1:
            torch.distributed.all_reduce(kl)
            kl /= self._run.processes
        self.coef = adapted_coef(self.coef, kl.item(), self.target)

    # Checkpoints

    @property
    def recorded(self) -> bool:
        """Whether the reference is there, and the anchors sampled."""
        return self._begun

    def write_state(self, path: Path) -> None:
        """Store coefficient, sampled anchors and the reference's identity in a checkpoint."""
        sampled = [[a.ids, a.held] for a in self._anchors] if self.anchors.startswith("self") else None
        stored = {"coef": self.coef, "anchors": an.content_hash(self._anchors), "sampled": sampled}
        stored |= {"base": self._model_identity().base, "name": self._model_identity().name, **self._reference.state(path.parent.parent)}
        write_json(path, stored)
