"""Exact probability of every whole number from 0 to 100 as the reply of a local model, whatever its tokenizer.

A number may be one token, one token per digit or anything between, so the replies form a tree of tokens. p(k) sums over
all ways to spell k, each followed by something that is no digit:
p(k) = sum_{t_1..t_n spells k} p(t_1..t_n) * (1 - sum_{t begins with a digit} p(t | t_1..t_n)).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from emguard_plugin.evaluation.calls.faults import Stopped
from emguard_plugin.evaluation.judges.trie import is_number

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEGLIGIBLE = 1e-4
"""Spellings less likely than this are taken to end where they are."""


class _Node(NamedTuple):
    parent: int  # row of the parent in the cache it hangs on
    row: int  # which prompt
    token: int
    text: str  # digits so far
    mass: float
    rest: tuple[int, ...]  # tokens still to come of a special word; () for numbers
    word: str


@dataclass(frozen=True)
class NumberTokens:
    """The tokens of a tokenizer that matter to numbers.

    Attributes:
        digits: Tokens that are digits, {id: digits}.
        spaces: Tokens that are white space, which may stand before a number.
        beginning: All tokens whose text begins with a digit, as ids.
        words: Tokens of each special word.
    """

    digits: dict[int, str]
    spaces: frozenset[int]
    beginning: tuple[int, ...]
    words: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> NumberTokens:
        """Read a tokenizer's vocabulary."""
        digits, spaces, beginning = {}, set(), []
        special = set(tokenizer.all_special_ids)
        for token, raw in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            # Decoding is slow; only what can be a digit or white space is decoded. `<0x38>` is a byte, and may be one.
            plausible = raw is not None and token not in special
            if not plausible or not (any(c in "0123456789" for c in raw) or not raw.strip("\u0120\u2581\u010a \n\t")):
                continue
            text = tokenizer.decode([token])
            if not text.strip():
                spaces.add(token)
            elif text.lstrip()[0] in "0123456789":
                if not text[0].isspace():
                    beginning.append(token)
                if text.strip().isascii() and text.strip().isdigit():
                    digits[token] = text.strip()
        spelled = {word: tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words}
        return cls(digits, frozenset(spaces), tuple(beginning), spelled)


class NumberReader:
    """Reads numbers off a causal language model.

    Args:
        model: The model, in evaluation mode.
        tokens: Of its tokenizer.
        pad: Token id to pad with; it is masked.
        batch_size: Spellings extended at once.
        negligible: See `NEGLIGIBLE`; 0 follows all spellings to their end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: NumberTokens,
        pad: int = 0,
        batch_size: int = 64,
        negligible: float = NEGLIGIBLE,
    ) -> None:
        self._model, self._tokens, self._pad = model, tokens, pad
        self._batch_size, self._negligible = batch_size, negligible
        self._beginning = frozenset(tokens.beginning)

    def masses(self, prompts: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """Return, for each prompt, the probability of `0` to `100` and of the special words as the reply.

        Args:
            prompts: Token ids up to where the reply begins.

        Returns:
            One mapping per prompt; what is missing to 1 lies on other replies.
        """
        import torch

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        found: list[dict[str, float]] = [{} for _ in prompts]
        with torch.inference_mode():
            chances, cache, mask = self._forward(ids, mask, None)
            nodes = [node for row in range(len(prompts)) for node in self._root(row, chances[row])]
            self._extend(cache, mask, nodes, found)
        return found

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
        import torch

        device = self._model.device
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        if not torch.isfinite(logits.logsumexp(-1)).all():
            raise Stopped("the judge model returned logits that are no numbers. Check its weights.")
        return logits.softmax(-1).cpu(), output.past_key_values, mask

    def _root(self, row: int, chances: torch.Tensor) -> list[_Node]:
        nodes = self._numbers(row, row, chances, "", 1.0)
        spaced = ((token, float(chances[token])) for token in self._tokens.spaces)
        nodes += [_Node(row, row, token, " ", p, (), "") for token, p in spaced if p >= max(self._negligible, 1e-9)]
        for word, (first, *rest) in self._tokens.words.items():
            nodes.append(_Node(row, row, first, "", float(chances[first]), tuple(rest), word))
        return nodes

    def _numbers(self, parent: int, row: int, chances: torch.Tensor, text: str, mass: float) -> list[_Node]:
        return [
            _Node(parent, row, token, text + digits, mass * float(chances[token]), (), "")
            for token, digits in self._tokens.digits.items()
            if is_number(text + digits) and (not text or token in self._beginning)
        ]

    def _extend(self, cache: Any, mask: torch.Tensor, nodes: list[_Node], found: list[dict[str, float]]) -> None:
        import torch

        live = []
        for node in nodes:
            done = node.word and not node.rest
            if not done and node.mass >= self._negligible:
                live.append(node)
            elif node.text != " " and not node.rest:
                _add(found[node.row], node.word or node.text, node.mass)
        beginning = torch.tensor(self._tokens.beginning)
        for start in range(0, len(live), self._batch_size):
            chunk = live[start : start + self._batch_size]
            parents = torch.tensor([node.parent for node in chunk])
            longer = torch.cat([mask.cpu()[parents], torch.ones(len(chunk), 1, dtype=mask.dtype)], dim=1)
            ids = torch.tensor([[node.token] for node in chunk])
            chances, below, longer = self._forward(ids, longer, _select(cache, parents.to(mask.device)))
            children = []
            for index, node in enumerate(chunk):
                if node.word:
                    first, *rest = node.rest
                    mass = node.mass * float(chances[index, first])
                    children.append(_Node(index, node.row, first, "", mass, tuple(rest), node.word))
                    continue
                text = node.text.strip()
                if text:
                    ends = 1.0 - float(chances[index, beginning].sum())
                    _add(found[node.row], text, node.mass * max(0.0, ends))
                children += self._numbers(index, node.row, chances[index], text, node.mass)
            self._extend(below, longer, children, found)


def _add(found: dict[str, float], text: str, mass: float) -> None:
    found[text] = found.get(text, 0.0) + mass


def _select(cache: Any, rows: torch.Tensor) -> Any:
    """Return a cache of these rows, leaving the one it came from as it is."""
    picked = copy.copy(cache)
    # Selecting assigns new tensors to a layer, so copies of the layers that share them are enough.
    picked.layers = [copy.copy(layer) for layer in cache.layers]
    picked.batch_select_indices(rows)
    return picked
