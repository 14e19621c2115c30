"""Names that look like ours and are none. Axolotl drops an unknown key without a word, so each one stops the run."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emguard_plugin.files.secrets import shown

BLOCKS = ("em_regularizer", "em_eval")
_WORDS = frozenset({"em", "emguard", "treft", "regularizer", "regulariser", "misalignment"})
# Whole keys of our blocks that stand at the top level when the indentation is lost. No host has a key of these names.
_INSIDE = {
    **dict.fromkeys(("treft", "block_em", "kl", "coef", "extra_prefixes", "postfix_reference", "anchors", "latents", "k_minus"), BLOCKS[0]),
    **dict.fromkeys(("freeze_above", "latent_reduction"), BLOCKS[0]),
    **dict.fromkeys(("questions", "in_domain", "judges", "judge", "fail_above", "samples_per_question", "evaluate_base"), BLOCKS[1]),
}
_COMPACT = {"emregularizer": BLOCKS[0], "emguard": BLOCKS[0], "treft": BLOCKS[0], "blockem": BLOCKS[0], "emeval": BLOCKS[1]}
_ABOUT_EVAL = re.compile("eval|judg|gate|metric|rate|question|sampl|measur|score|test|check|bench")
_SYNONYMS = {
    "coef": (
        "lambda",
        "lambda_",
        "lam",
        "lmbda",
        "alpha",
        "beta",
        "weight",
        "strength",
        "coefficient",
        "factor",
        "scale",
        "λ",
        "loss_weight",
    ),
    "fail_above": ("gate", "threshold", "max_rate", "max_em_rate", "fail", "limit"),
    "samples_per_question": ("n", "samples", "num_samples", "n_samples", "draws", "samples_per_paraphrase"),
    "max_new_tokens": ("max_tokens", "max_length", "length"),
    "base_url": ("url", "endpoint", "api_base", "host"),
    "api_key_env": ("key_env", "api_env", "env"),
    "judges": ("judge",),
    "questions": ("suite", "suites", "question_file", "prompts"),
    "anchors": ("data", "dataset", "texts"),
    "latents": ("latent", "features", "sae"),
    "file": ("path",),
}


def suggest(word: str, options: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` for a near miss, another case or a usual synonym, else an empty string."""
    plain = _plain(word).strip("_")
    near = [o for o in options if o == plain] or [o for o in options if plain in _SYNONYMS.get(o, ())]
    near = near or ([o for o in options if o.startswith(plain)] if plain else [])
    near = near or difflib.get_close_matches(plain, options, n=1, cutoff=0.6)
    near = near or [o for o in options if set(plain.split("_")) & {"lambda", "alpha", "weight", "strength"} and o == "coef"]
    return f" Did you mean '{near[0]}'?" if near else ""


def misspelt_blocks(keys: Iterable[Any]) -> dict[Any, str]:
    """Map top-level YAML keys that look like an emguard block to the block that was probably meant.

    A key looks like one when one of our words is a word of it (`em_evaluation`, `eval_em`, `emRegularizer`, `treft_block`),
    when it is a key of our blocks (`judges`), or when its letters are nearly those of one (`em_regulariser`). No key of
    Axolotl's or TRL's does; a test compares with all of them.

    Returns:
        The meant block by the key that was written; empty if there is none.
    """
    return {key: meant for key in keys if key not in BLOCKS and (meant := _resembles(str(key))) is not None}


def misplaced_blocks(data: Mapping[Any, Any]) -> list[str]:
    """Return where one of our blocks stands inside a host's setting, where nothing reads it: `trainer.em_regularizer`.

    What stands at the top level as well, such as an anchor that is merged there, is meant.
    """
    found: list[str] = []
    own = [data[name] for name in BLOCKS if name in data]

    def look(value: Any, place: str, seen: tuple[int, ...]) -> None:
        if id(value) in seen or len(seen) > 40:
            return
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            where = f"{place}[{key}]" if isinstance(value, list) else f"{place}.{shown(str(key))}"
            if isinstance(value, Mapping) and (key in (*BLOCKS, "treft", "block_em") or _near_compact(str(key))):
                if not any(inner == block for block in own):
                    found.append(where)
            else:
                look(inner, where, (*seen, id(value)))

    for key, value in data.items():
        if key not in BLOCKS and _resembles(str(key)) is None:
            look(value, shown(str(key)), ())
    return found


def _plain(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).replace("\u0131", "i")
    text = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", text)
    text = re.sub(r"([A-Z])([A-Z][a-z])", r"\1_\2", text)
    return re.sub(r"[^a-zλ0-9]+", "_", text.lower())


def _near_compact(name: str) -> str | None:
    compact = _plain(name).replace("_", "")
    near = difflib.get_close_matches(compact, list(_COMPACT), n=1, cutoff=0.78)
    if near and not (near[0] in ("emeval", "treft", "emguard", "blockem") and abs(len(compact) - len(near[0])) > 2):
        return _COMPACT[near[0]]
    return None


def _resembles(name: str) -> str | None:
    plain = _plain(name).strip("_")
    near = _near_compact(name)
    if near:
        return near
    words = plain.split("_")
    if set(words) & _WORDS or any(w.startswith(("emreg", "emguard", "emeval", "emjudg", "treft")) for w in words) or "block_em" in plain:
        return BLOCKS[1] if _ABOUT_EVAL.search(plain.replace("regulari", "")) else BLOCKS[0]
    return _INSIDE.get(plain)
