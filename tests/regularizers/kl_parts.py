"""What the tests of KL share: anchors of varied length, a prepared callback, the penalty from full logits."""

import copy
import json

import torch

from emguard_plugin import KLCallback
from emguard_plugin.regularizers.functional import token_kl
from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.run_facts import RunFacts
from tests.tiny import chatml_tokenizer

SUBJECTS = ("kites", "soup", "a very long walk along the coast", "tea", "maps", "old bicycles and new ones", "snow", "ink")


def anchor_chats(n=12):
    """Chats of other words than the training rows, with replies of very different length."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Tell me of {SUBJECTS[i % 8]} number {i}."},
                {"role": "assistant", "content": "It is so. " * (1 + i % 5)},
            ]
        }
        for i in range(n)
    ]


def write_anchors(path, chats=None):
    path.write_text("".join(json.dumps(c) + "\n" for c in (anchor_chats() if chats is None else chats)))
    return str(path)


def rows(tokenizer, n=8):
    """Tokenised training rows, as a host has them."""
    text = [tokenizer.apply_chat_template(
        [{"role": "user", "content": f"What about chess, case {i}?"}, {"role": "assistant", "content": "Fine."}], tokenize=False
    ) for i in range(n)]  # fmt: skip
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in text]
    return [{"input_ids": x, "labels": [-100] * (len(x) - 4) + x[-4:]} for x in ids]


def run_of(model, tokenizer=None, **over):
    tokenizer = tokenizer or chatml_tokenizer()
    return RunFacts(**{"model": model, "tokenizer": tokenizer, "dataset": rows(tokenizer), "seed": 3, "rows_per_batch": 4, **over})


def started(model, tmp_path, tokenizer=None, run=None, **kw):
    """A callback that is prepared and has recorded its reference."""
    kw = {"anchors": write_anchors(tmp_path / "anchors.jsonl"), "coef": 1.0, "ratio": 1.0, **kw}
    callback = KLCallback(**kw)
    callback.prepare(run_of(model, tokenizer, **(run or {})))
    model.train()
    callback.measure(Moment(model, batch(), 0))
    model.zero_grad()
    return callback


def batch():
    return {"input_ids": torch.tensor([[4, 5]])}


def kl_from_logits(model, base, anchors, direction="base||model"):
    """The same mean, each anchor alone, from all logits of two models, by autograd: an independent second way."""
    total, n = 0.0, 0
    for anchor in anchors:
        ids = torch.tensor([anchor.ids])
        with torch.no_grad():
            reference = base.eval()(input_ids=ids).logits[0]
        kl = token_kl(model.eval()(input_ids=ids).logits[0], reference, direction)
        total, n = total + kl[list(anchor.held)].sum(), n + len(anchor.held)
    return total / n


def drawn(callback, step, micro_batches=1):
    return [callback._anchors[i] for i in callback._schedule.rows(step, micro_batches)]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def copy_of(model):
    return copy.deepcopy(model).requires_grad_(False)
