"""`guard`: any trainer class with penalties, or a refusal that says why not."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import trl
from transformers import Trainer

from emguard_plugin.training.mixin import EMRegularizerMixin
from emguard_plugin.training.policy_rows import PreferenceRows, PromptRows, UnpairedRows
from emguard_plugin.training.trl_trainer import EMGuardSFTTrainer, PreferenceGuard, PromptGuard, TRLGuard, UnpairedGuard

T = TypeVar("T", bound=Trainer)

GUARDS: dict[type, tuple[type[TRLGuard], type[EMRegularizerMixin]]] = {
    trl.SFTTrainer: (TRLGuard, EMRegularizerMixin),
    trl.DPOTrainer: (PreferenceGuard, PreferenceRows),
    trl.KTOTrainer: (UnpairedGuard, UnpairedRows),
    trl.GRPOTrainer: (PromptGuard, PromptRows),
    trl.RLOOTrainer: (PromptGuard, PromptRows),
}
"""By TRL trainer what stands in front of it and of its subclasses: with TRL's own way of being built, and what it reads of rows alone."""
REFUSED = {
    "RewardTrainer": "it trains a score in the place of the next token: nobody samples from that model, so there is no behaviour to hold",
    "PRMTrainer": "it trains a score in the place of the next token: nobody samples from that model, so there is no behaviour to hold",
}
"""By the name of a TRL trainer the reason why it is refused."""


@cache
def guard(trainer_class: type[T]) -> type[T]:
    """Return `trainer_class` with penalties: the same arguments, with regularizers among the `callbacks`.

    `loss = host's loss + sum_i coef_i * penalty_i`, each penalty once per optimizer step, whatever the accumulation, the processes and,
    for GRPO, the mini-batches and iterations over drawn answers. `eval_loss` stays the host's. What a method reads of a trainer:

    | trainer                | rows before training            | held by BLOCK-EM in a batch |
    |------------------------|---------------------------------|-----------------------------|
    | `transformers.Trainer` | `input_ids` (and `labels`)      | supervised tokens           |
    | `trl.SFTTrainer`       | as tokenised                    | supervised tokens           |
    | `trl.DPOTrainer`       | prompt and chosen answer        | chosen answers              |
    | `trl.KTOTrainer`       | prompt and answer               | all answers                 |
    | `trl.GRPOTrainer`      | prompts                         | drawn answers               |
    | `trl.RLOOTrainer`      | prompts                         | drawn answers               |

    A TRL config with the blocks of a YAML (`EMGuardDPOConfig`, `EMGuardKTOConfig`, `EMGuardGRPOConfig`) brings its regularizers along.

    Args:
        trainer_class: `transformers.Trainer`, one of the TRL trainers above, or a subclass of these that calls
            `super().compute_loss(...)`, if it has a `compute_loss` of its own.

    Returns:
        A subclass named `EMGuard...`; the class itself where it is guarded already. The same one for every call.

    Raises:
        TypeError: for a class that is no trainer, or a TRL trainer that a penalty cannot serve.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"guard() takes a trainer class, such as `trl.DPOTrainer`, and got {trainer_class!r}.")
    if issubclass(trainer_class, EMRegularizerMixin):
        return trainer_class
    if trainer_class is trl.SFTTrainer:
        return EMGuardSFTTrainer
    host = _known(trainer_class)
    bases: tuple[type, ...] = (EMRegularizerMixin if host is None else GUARDS[host][0], trainer_class)
    name = f"EMGuard{trainer_class.__name__}"
    about: dict[str, Any] = {"__module__": trainer_class.__module__, "__doc__": f"`{trainer_class.__name__}` with penalties; see `guard`."}
    if tags := getattr(trainer_class, "_tag_names", None):
        about["_tag_names"] = [*tags, "emguard"]
    if called := getattr(trainer_class, "_name", None):
        about["_name"] = f"EMGuard {called}"
    return type(name, bases, about)


def rows_of_trainer(trainer_class: type) -> type[EMRegularizerMixin]:
    """Return the mixin that knows the rows of a trainer class and nothing of how it was built.

    Args:
        trainer_class: As for `guard`.

    Raises:
        TypeError: for a TRL trainer that a penalty cannot serve.
    """
    host = _known(trainer_class)
    return EMRegularizerMixin if host is None else GUARDS[host][1]


def _known(trainer_class: type) -> type | None:
    """Return the TRL trainer that a class is one of; None for one of transformers alone."""
    for base in trainer_class.__mro__:
        if base in GUARDS:
            return base
        if base.__module__.partition(".")[0] == "trl" and base.__name__.endswith("Trainer") and not base.__name__.startswith("_"):
            if base.__name__ == "BaseTrainer":
                continue
            reason = REFUSED.get(base.__name__, "how its batches and its loss go together was never looked at")
            known = ", ".join(sorted(host.__name__ for host in GUARDS))
            raise TypeError(f"guard() does not take trl's {base.__name__}: {reason}. It takes {known} and `transformers.Trainer`.")
    return None
