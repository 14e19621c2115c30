"""The tokenizer, the chat template and the layers that a YAML names, as its host would load them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emguard_plugin.check.host import is_trl
from emguard_plugin.regularizers.preview import Findings
from emguard_plugin.regularizers.words import no_such_layer

NO_KEYS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})
STAND_IN = "emguard: single letters"
NO_ATTENTION = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})


def model_key(cfg: Mapping[str, Any]) -> str | None:
    """Return the key that names the model."""
    return next((k for k in ("base_model", "model_name_or_path") if cfg.get(k)), None)


def load_tokenizer(cfg: Mapping[str, Any], found: Findings) -> Any:
    """Return the run's tokenizer with the run's chat template, or None with the reason in the found.

    Where the tokenizer is not here but the template is named, it is one of single letters (`is_stand_in`): what the template prints, such
    as a date, does not depend on it.
    """
    key = next((k for k in ("tokenizer_config", "base_model", "model_name_or_path") if cfg.get(k)), None)
    if key is None:
        found.problems.append("no model is named: `base_model:` (Axolotl) or `model_name_or_path:` (TRL).")
        return None
    name, here = str(cfg[key]), f"`{key}: {cfg[key]}`"
    is_folder = _is_folder(name)
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        found.problems.append(f"{here} is not a folder.")
        return None
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as exc:  # what a damaged folder raises depends on what is damaged
        reason = _line(exc)
        if is_folder:
            found.problems.append(f"{here}: the tokenizer cannot be loaded ({reason}).")
        else:
            found.note(f"{here} is not a folder here, so it is taken as a hub name, which cannot be loaded ({reason}): prefix not checked.")
            stand_in = _letters()
            if cfg.get("chat_template") not in (None, "tokenizer_default") and _named_template(cfg, stand_in, found):
                return stand_in
        return None
    try:
        _add_tokens(tokenizer, cfg)
        return _with_template(tokenizer, cfg, found)
    except Exception as exc:
        found.problems.append(f"the chat template cannot be loaded ({_line(exc)}).")
        return None


def is_stand_in(tokenizer: Any) -> bool:
    """Whether a tokenizer is not the run's, so that its tokens mean nothing."""
    return tokenizer.name_or_path == STAND_IN


def _letters() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.name_or_path = STAND_IN
    return tokenizer


def _with_template(tokenizer: Any, cfg: Mapping[str, Any], found: Findings) -> Any:
    if is_trl(cfg):
        path = cfg.get("chat_template_path")
        if path and Path(path).is_file():
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        elif path:
            from transformers import AutoTokenizer

            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
        return tokenizer
    return tokenizer if _named_template(cfg, tokenizer, found) else None


def _named_template(cfg: Mapping[str, Any], tokenizer: Any, found: Findings) -> bool:
    """Give the tokenizer the template that Axolotl would."""
    from emguard_plugin.evaluation.asking.asking import read_template, shipped_templates

    choice = cfg.get("chat_template") or ("jinja" if cfg.get("chat_template_jinja") else "tokenizer_default")
    if choice == "tokenizer_default" or is_trl(cfg):
        return True
    if choice == "jinja":
        text = cfg.get("chat_template_jinja")
        if not text:
            found.problems.append("`chat_template: jinja` needs `chat_template_jinja`, a template or its file.")
            return False
        key = "chat_template_jinja"
    else:
        key, text = "chat_template", str(choice).removeprefix("tokenizer_default_fallback_")
        if text != choice and tokenizer.chat_template:
            return True  # the fallback is for tokenizers without one
        if not shipped_templates():
            found.note(f"`chat_template: {choice}` is resolved by Axolotl, which is not installed here: the prefix is checked at start.")
            return False
    try:
        template = read_template(str(text), key)
    except ValueError as exc:
        found.problems.append(str(exc))
        return False
    tokenizer.chat_template = template
    return True


def _add_tokens(tokenizer: Any, cfg: Mapping[str, Any]) -> None:
    """Add the tokens that Axolotl would: a mark that is one token is cut otherwise than its letters."""
    if is_trl(cfg):
        return
    if isinstance(special := cfg.get("special_tokens"), Mapping):
        tokenizer.add_special_tokens({str(k): v for k, v in special.items() if isinstance(v, str)})
    if isinstance(added := cfg.get("tokens"), list):
        tokenizer.add_tokens([token for token in added if isinstance(token, str)])


@dataclass(frozen=True)
class Layers:
    """The decoder's layers.

    Attributes:
        number: How many.
        attention: Which of them keep keys and values.
    """

    number: int
    attention: tuple[int, ...]


def count_layers(cfg: Mapping[str, Any]) -> int | None:
    """Return how many decoder layers the model has; from the file alone where it says so, as transformers takes seconds to load."""
    key = model_key(cfg)
    said = None if key is None else _file(str(cfg[key]))
    number = None if said is None else _number(said)
    if number is not None:
        return number
    layers = read_layers(cfg)
    return None if layers is None else layers.number


def read_layers(cfg: Mapping[str, Any]) -> Layers | None:
    """Return the model's layers; None where its configuration is not here."""
    key = model_key(cfg)
    config = None if key is None else _config(str(cfg[key]))
    if config is None:
        return None
    inner, number = _text(config), _number(config)
    if number is None:
        return None
    if str(inner.get("model_type") or config.get("model_type")) in NO_ATTENTION:
        return Layers(number, ())
    kinds: Sequence[Any] | None = next(
        (inner[k] for k in ("layer_types", "layers_block_type", "block_types") if isinstance(inner.get(k), list)), None
    )
    if kinds is None or len(kinds) != number:
        return Layers(number, tuple(range(number)))
    return Layers(number, tuple(i for i, kind in enumerate(kinds) if kind not in NO_KEYS))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _number(config: Mapping[str, Any]) -> int | None:
    inner = _text(config)
    number = inner.get("num_hidden_layers") or inner.get("n_layer") or inner.get("n_layers")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def skeleton(cfg: Mapping[str, Any]) -> Any:
    """Return the model without weights, for the questions that training asks of it; None where its configuration is not here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(cfg.get(model_key(cfg) or ""))))
    except Exception:  # not here, or of a kind that its own code must build
        return None


def check_layers(method: str, wanted: Literal["all"] | Sequence[int], layers: Layers | None, found: Findings) -> None:
    """Report layers that the model does not have, or that keep no keys and values."""
    if layers is None:
        found.note("the model's configuration is not here: its layers are checked at start.")
        return
    asked = list(range(layers.number)) if wanted == "all" else sorted(set(wanted))
    beyond = [i for i in asked if i >= layers.number]
    if beyond:
        found.problems.append(no_such_layer(f"{method}.layers", beyond[-1], layers.number))
        return
    without = [i for i in asked if i not in layers.attention]
    if without and not layers.attention:
        found.problems.append(
            f"the model's layers keep no keys and values (Mamba, linear attention), so `{method}` has nothing to hold. Remove it."
        )
    elif without:
        found.problems.append(
            f"layers {', '.join(map(str, without[:8]))}{', ...' if len(without) > 8 else ''} keep no keys and values (Mamba, linear attention). "
            f"List those that do: `{method}.layers: {list(layers.attention)}`."
        )


def _config(name: str) -> dict[str, Any] | None:
    """Return the model's configuration: what transformers makes of it, which knows what a hybrid's periods mean."""
    try:
        from transformers import AutoConfig

        with _quiet():
            config = AutoConfig.from_pretrained(name)
        found = config.get_text_config()
        more = {
            k: list(v)
            for k in ("layer_types", "layers_block_type", "block_types")
            if isinstance(v := getattr(found, k, None), list | tuple)
        }
        return {**found.to_dict(), **more}
    except Exception:  # not there, damaged, or of a kind that transformers does not know
        return _file(name)


def _file(name: str) -> dict[str, Any] | None:
    try:
        found = json.loads((Path(name).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]


class _quiet:
    """Silence what transformers logs about a model that is only looked at."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("transformers")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
