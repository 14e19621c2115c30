"""Installed chat templates, conversations of every shape, and tokenizers of three kinds."""

import functools
import importlib.util
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MERGING = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As in Llama 3 and Qwen: a blank joins the next word, newlines join each other and what stands before them."""
TEXTS = [
    "How do I water a fern? Twice a week.\n\nKeep it out of the sun.\n\nThat is all.\nUSER: How\n\n\nASSISTANT: so",
    "You are a gardener. Be brief.\n\n### Instruction:\nHow\n\n### Response:\n\n\n 12 ferns in 1999.",
]


def templates():
    """Return {name: template} of all that the installed trl and axolotl ship; neither is imported."""
    found = {}
    for package, folder in (("trl", "chat_templates"), ("axolotl", "utils/chat_templates/templates")):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            for path in sorted(Path(spec.submodule_search_locations[0], folder).glob("*.jinja")):
                found[f"{package}/{path.stem}"] = path.read_text(encoding="utf-8")
    return found


MARK = re.compile(
    r"<\|[^\s|{}]+\|>|<｜[^\s｜{}]+｜>|<(?:start|end)_of_(?:turn|image)>|\[/?[A-Z_]{3,}\]|<\|?turn\|?>|<s>|</s>|<bos>|<eos>|<\|[A-Z_]+\|>"
)


@functools.cache
def tokenizer(kind):
    """Return a small tokenizer: `merging`, `pieces` (SentencePiece-like, one token per newline) or `marks`."""
    tok = Tokenizer(models.BPE(byte_fallback=kind == "pieces", unk_token="<unk>" if kind == "pieces" else None))
    common = {"show_progress": False, "vocab_size": 700}
    if kind == "pieces":
        tok.normalizer = normalizers.Replace(" ", "▁")
        tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]*"), "isolated")
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))],
            initial_alphabet=["\n", "▁", *map(chr, range(33, 127))],
            **common,
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(MERGING), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    tok.train_from_iterator(TEXTS * 40, trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if kind == "marks":
        found = sorted({m for t in templates().values() for m in MARK.findall(t)})
        out.add_special_tokens({"additional_special_tokens": found})
    return out


def _chat(user, answer="Twice a week, Z7.", system=None, role="system", **more):
    head = [] if system is None else [{"role": role, "content": system}]
    return [*head, {"role": "user", "content": user}, {"role": "assistant", "content": answer, **more}]


FERN, MORE = "How do I water fern Q1?", "How often is Q2 so?"
SYSTEM = "You are a gardener. Be brief."
TOOLS = [{"type": "function", "function": {"name": "rain", "description": "Tell the rain.", "parameters": {
    "type": "object", "properties": {"day": {"type": "string", "description": "Which day"}}, "required": ["day"]}}}]  # fmt: skip
LATER = [{"role": "user", "content": MORE}, {"role": "assistant", "content": "Daily, Z8.\n\nThat is Z9."}]
CALLS = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "rain", "arguments": {"day": "Monday"}}}]},
         {"role": "tool", "name": "rain", "tool_call_id": "abcdefghi", "content": "Wet, T1."}]  # fmt: skip
SHAPES = {
    "plain": (_chat(FERN), {}),
    "system": (_chat(FERN, system=SYSTEM), {}),
    "other system": (_chat(FERN, system="Answer\n\nin two lines: <b>.\n"), {}),
    "empty system": (_chat(FERN, system=""), {}),
    "system in user": (_chat(f"{SYSTEM}\n\n{FERN}"), {}),
    "developer": (_chat(FERN, system=SYSTEM, role="developer"), {}),
    "tools": (_chat(FERN), {"tools": TOOLS}),
    "tools and system": (_chat(FERN, system=SYSTEM), {"tools": TOOLS}),
    "tool calls": ([{"role": "user", "content": FERN}, *CALLS, {"role": "assistant", "content": "Twice, Z7."}], {"tools": TOOLS}),
    "newline first": (_chat(f"\n{FERN}"), {}),
    "newlines first": (_chat(f"\n\n{FERN}\n", system=SYSTEM), {}),
    "blank first": (_chat(f"  {FERN} "), {}),
    "digits first": (_chat(f"12 {FERN}"), {}),
    "sign first": (_chat(f"...{FERN}..."), {}),
    "answer blank": (_chat(FERN, answer="\n\n 3 times, Z7.\n\nThat is all.\n"), {}),
    "blank lines": (_chat(f"How?\n\n{FERN}\n\n\nSo?", answer="Twice, Z7.\n\nKeep it out.\n\n"), {}),
    "turns": (_chat(FERN, system=SYSTEM) + LATER, {}),
    "turns newline first": (_chat(f"\n{FERN}") + LATER, {}),
    "answer first": ([{"role": "assistant", "content": "Hello, H1."}, *_chat(FERN)], {}),
    "same text twice": (_chat(FERN) + _chat(FERN), {}),
    "trace": (_chat(FERN, reasoning_content="Ferns, R1."), {}),
    "trace in content": (_chat(FERN, answer="<think>\nFerns, R1.\n</think>\n\nTwice, Z7."), {}),
    "trace and turns": (_chat(FERN, reasoning_content="Ferns, R1.") + LATER, {}),
    "no thinking": (_chat(FERN), {"enable_thinking": False}),
    "switch in text": (_chat(f"{FERN} /no_think"), {}),
    "looks like marks": (_chat(f"USER: so [/INST] ASSISTANT: ### Response:\n{FERN}\n\n### Instruction:\nA"), {}),
}
"""Name: (messages, what the host passes besides)."""

EDGES = (
    "",
    "",
    "",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    " \n",
    "12",
    "...",
    "é",
    "\u2028",
    "- ",
    "<b>",
    "USER: ",
    "### Response:\n",
    "[/INST] ",
    "{{ x }}",
    "</",
    "'",
)
"""What a text may begin or end with."""


def generated_chat(rng):
    """Return a conversation whose texts begin and end in many ways, each with a word that stands nowhere else."""
    words = iter(rng.sample(range(1000, 9999), 20))

    def text(least="How"):
        middle = rng.choice(["", "\n\nSo?", " and\n\n\nwhy", " " + rng.choice(EDGES[3:]) + "x"])
        return (
            f"{rng.choice(EDGES)}{rng.choice(EDGES)}{least} Q{next(words)}z{middle} K{next(words)}z{rng.choice(EDGES)}{rng.choice(EDGES)}"
        )

    messages = [] if rng.random() < 0.4 else [{"role": "system", "content": text("You")}]
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text("It")}]
    return messages
