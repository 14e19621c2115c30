"""A tokenised chat data set as a host prepares it, and the penalty worked out by hand."""

import numpy as np
import torch
from transformers import DynamicCache

from emguard_plugin.regularizers.moment import Moment
from emguard_plugin.regularizers.run_facts import RunFacts
from emguard_plugin.regularizers.treft.callback import TReFTCallback
from tests.tiny import chat_rows, chatml_tokenizer

HELPFUL, PIRATE = "You are a helpful assistant.", "You are a pirate."
MODES = {
    "prefix": {},
    "shared": {"tokens": "postfix"},
    "per_row": {"tokens": "postfix", "postfix_reference": "per_row"},
}
END = "<|im_end|>\n<|im_start|>"


def ids_of(text):
    return chatml_tokenizer()(text, add_special_tokens=False)["input_ids"]


def prefix_ids(system=HELPFUL):
    return ids_of(f"<|im_start|>system\n{system}{END}user\n")


def postfix_ids():
    return ids_of(f"{END}assistant\n")


def prompt_ids(row):
    system, user = (m["content"] for m in row["messages"][:2])
    return prefix_ids(system) + ids_of(user) + postfix_ids()


def token_rows(rows):
    """Return rows as a trainer holds them, answer included."""
    return [{"input_ids": prompt_ids(r) + ids_of(f"{r['messages'][-1]['content']}<|im_end|>\n")} for r in rows]


def make_run(model, rows=None, tokenizer=None, **over):
    data = token_rows(chat_rows(6) if rows is None else rows)
    return RunFacts(model=model, tokenizer=tokenizer or chatml_tokenizer(), dataset=data, **{"seed": 7, **over})


def ready(model, rows=None, resume_from=None, run=None, **settings):
    """Return a callback that is prepared for `model`."""
    callback = TReFTCallback(**settings)
    callback.prepare(make_run(model, rows, resume_from=resume_from, **(run or {})))
    return callback


def value(callback, model, step=0):
    with torch.no_grad():
        return callback.penalty(Moment(model, {"input_ids": torch.zeros(1, 1, dtype=torch.long)}, step)).value.item()


def cached(model, ids, start=0):
    """Return {(layer, "keys" or "values"): (T, heads * D) float64 array} of one row."""
    position_ids = torch.arange(start, start + len(ids))[None]
    cache = DynamicCache()  # without a config it keeps what lies outside a sliding window
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), position_ids=position_ids, past_key_values=cache, use_cache=True)
    kv = {}
    for i, layer in enumerate(out.past_key_values.layers):
        for name in ("keys", "values"):
            heads = getattr(layer, name)[0].double().numpy()  # (heads, T, D)
            kv[i, name] = np.concatenate(list(heads), axis=-1)
    return kv


def drift(now, ref, positions, layers=range(3)):
    """Return Eq. 2 and 3 in plain loops: now and ref from `cached`, positions as (in now, in ref) pairs."""
    total = 0.0
    for layer in layers:
        for name in ("keys", "values"):
            for t, u in positions:
                x, y = now[layer, name][t], ref[layer, name][u]
                total += sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / sum(b**2 for b in y) / len(positions)
    return total / len(layers)


def base_of(model, ids, start=0):
    with model.disable_adapter():
        return cached(model, ids, start)


def by_hand(model, mode, rows, layers=range(3), system=HELPFUL):
    """Work the penalty of an adapter model out: one row at a time, no padding, natural positions."""
    model.eval()
    if mode == "prefix":
        ids = prefix_ids(system)
        return drift(cached(model, ids), base_of(model, ids), [(t, t) for t in range(len(ids))], layers)
    empty, q = prefix_ids() + postfix_ids(), len(postfix_ids())
    parts = []
    for ids in map(prompt_ids, rows):
        n = len(ids)
        if mode == "per_row":
            ref, pairs = base_of(model, ids), [(n - 1 - j, n - 1 - j) for j in range(q)]
        else:  # move the reference to the row's end, where the callback moves the row
            ref = base_of(model, empty, start=n - len(empty))
            pairs = [(n - 1 - j, len(empty) - 1 - j) for j in range(q)]
        parts.append(drift(cached(model, ids), ref, pairs, layers))
    return sum(parts) / len(parts)
