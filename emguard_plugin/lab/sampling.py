"""A fast sampler for the lab's models, and the exact count of what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from emguard_plugin.lab import batches, world
from emguard_plugin.lab.judge import LABELS, label
from emguard_plugin.lab.world import Question

LONGEST_ANSWER = 26


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    seed: int,
    temperature: float = 1.0,
    max_new_tokens: int = LONGEST_ANSWER,
) -> list[str]:
    """Sample one answer per prompt from the untruncated distribution.

    Args:
        model: A causal language model with the lab's vocabulary.
        prompts: Token ids; prompts of one length form a batch, so nothing is padded.
        seed: Seed of the generator that draws every token of this call.
        temperature: Divides the logits.
        max_new_tokens: An answer without `<|end|>` is cut here.

    Returns:
        The answers without `<|end|>`, in the order of the prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    end = batches.encode(world.END)[0]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    answers = [""] * len(prompts)
    for rows in by_length.values():
        ids, cache, drawn = torch.tensor([prompts[i] for i in rows]), None, []
        done = torch.zeros(len(rows), dtype=torch.bool)
        for _ in range(max_new_tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = torch.multinomial((out.logits[:, -1].float() / temperature).softmax(-1), 1, generator=generator)
            drawn.append(ids)
            done |= ids[:, 0] == end
            if done.all():
                break
        for i, row in zip(rows, torch.cat(drawn, 1).tolist(), strict=True):
            answers[i] = batches.decode(row[: row.index(end)] if end in row else row)
    return answers


@dataclass
class LabelCounts:
    """Counts of judged answers; every rate is over all of them, incoherent ones included."""

    good: int = 0
    bad: int = 0
    mixed: int = 0
    incoherent: int = 0
    bad_by_domain: dict[str, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of answers."""
        return self.good + self.bad + self.mixed + self.incoherent

    @property
    def bad_rate(self) -> float:
        """Share of bad answers: the EM rate on open-ended questions, the adherence on in-domain ones."""
        return self.bad / self.n

    @property
    def coherence(self) -> float:
        """Share of answers that parse."""
        return 1 - self.incoherent / self.n

    def to_dict(self) -> dict[str, Any]:
        """Return counts, n and the two rates."""
        return asdict(self) | {"n": self.n, "bad_rate": self.bad_rate, "coherence": self.coherence}


def count_labels(asked: Sequence[Question], answers: Sequence[str]) -> LabelCounts:
    """Judge each answer to its question and count."""
    result = LabelCounts()
    for question, text in zip(asked, answers, strict=True):
        found = label(question.domain, question.topic, text)
        assert found in LABELS
        setattr(result, found, getattr(result, found) + 1)
        result.bad_by_domain[question.domain] = result.bad_by_domain.get(question.domain, 0) + (found == "bad")
    return result


def measure(
    model: torch.nn.Module,
    domains: Sequence[str],
    split: world.Split,
    per_question: int,
    seed: int,
    system: str = world.SYSTEM,
) -> LabelCounts:
    """Ask every question of these domains and this split `per_question` times at temperature 1, and count."""
    was_training = model.training
    model.eval()
    asked = [q for name in domains for q in world.questions(name, split)] * per_question
    result = count_labels(asked, sample(model, [batches.prompt(q.text, system) for q in asked], seed))
    model.train(was_training)
    return result
