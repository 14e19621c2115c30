"""Look at everything that an `em_eval:` block names before a model is trained, by the code that will use it."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from emguard_plugin.config import EMEvalConfig, misspelt_blocks, read_block
from emguard_plugin.config.settings_file import IMPORT_FROM, read_settings, search_beside
from emguard_plugin.evaluation.asking.as_trained import as_trained, saved_template
from emguard_plugin.evaluation.asking.asking import chat_of
from emguard_plugin.evaluation.asking.questions import Question, load_questions
from emguard_plugin.evaluation.asking.sampler import Request
from emguard_plugin.evaluation.judges import Judge, build_judges
from emguard_plugin.evaluation.plan import requests
from emguard_plugin.files.secrets import read_key, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What was found.

    Attributes:
        judges: Built, not opened.
        suites: The questions, by suite.
        requests: What will be asked.
        warnings: What may work later, and does not now, such as a server that is not up.
    """

    judges: list[Judge]
    suites: dict[str, list[Question]]
    requests: list[Request]
    warnings: list[str] = field(default_factory=list)


def get_ready(config: EMEvalConfig, output_dir: str | Path | None = None) -> Ready:
    """Import judges, read questions, look at variables, servers and the folder of the results. Nothing is written.

    A server that does not answer is a warning: it may be started while the model trains. What no server can have (a port
    of 99999), a variable that is not set, and everything on this machine is an error.

    Args:
        config: The block.
        output_dir: Where results will go; None where that is not known.

    Returns:
        What was read, and what a user should hear before the run.

    Raises:
        ValueError: naming the key, with `em_eval.` before it.
    """
    config.check_files()
    chat_of(config)
    judges = build_judges(config.judges)
    suites = {name: load_questions(source) for name, source in config.suites().items()}
    sampler = config.sampler
    if sampler.provider == "openai":
        read_key(sampler.api_key_env)
    if sampler.provider == "vllm" and shutil.which("vllm") is None:
        raise ValueError(
            "`em_eval.sampler: provider: vllm` needs the command `vllm`, which is not on the PATH. Install vLLM in an environment of its "
            "own and put that on the PATH, or set `provider: transformers`."
        )
    where = config.output_dir or output_dir
    if where is not None:
        check_writable(Path(where))
    urls = [judge.base_url for judge in config.judges if judge.provider == "openai"]
    urls += [sampler.base_url] if sampler.provider == "openai" else []
    warnings = [
        f"em_eval: {url} does not answer now ({reason}). Start the server before the model is saved, or the EM rate is not measured."
        for url in dict.fromkeys(urls)
        if (reason := unreachable(url))
    ]
    return Ready(judges, suites, requests(config, suites), warnings)


def read_eval_file(path: str | Path, over: Mapping[str, Any] | None = None, model: str | Path | None = None) -> EMEvalConfig:
    """Read the `em_eval:` block of a file, or a file that is the block, and let the modules beside it be imported.

    Args:
        path: YAML or JSON.
        over: Keys that win over the file's.
        model: Folder of the saved model. Where the file is the YAML of its training, what the block leaves out about
            rendering is taken from there.

    Returns:
        The validated block.

    Raises:
        ValueError: If it cannot be read, holds no such block, or one that resembles it, or a faulty one.
        SecretInConfigError: For a key of an API in it.
    """
    content = read_settings(path)
    for key, meant in misspelt_blocks(content).items() if {"questions", "judges"} - set(content) else ():
        raise ValueError(f"{path}: unknown key `{shown(str(key))}:`. Did you mean `{meant}:`?")
    if "em_eval" in content:
        block = content["em_eval"]
    elif {"questions", "judges"} & set(content):
        block = read_settings(path, whole=True)
    else:
        raise ValueError(f"{path} has no `em_eval:` block, and none of its keys. Add one with `questions:` and `judges:`.")
    search_beside(Path(path).parent, *(str(folder) for folder in content.get(IMPORT_FROM) or ()))
    if isinstance(block, dict):
        block = {**block, **(over or {})}
    config = read_block(EMEvalConfig, block, "em_eval")
    if model is None or "em_eval" not in content:
        return config
    config, notes = as_trained(config, content, saved_template(model))
    for note in notes:
        logger.warning("em_eval: %s", note)
    return config


def check_writable(folder: Path) -> None:
    """Raise if a folder cannot be made or written to; make nothing.

    Raises:
        ValueError: naming the key and what stands in the way.
    """
    try:
        there = folder.expanduser().absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise ValueError(f"`em_eval.output_dir: {folder}`: {there} is no folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"`em_eval.output_dir: {folder}`: {there} cannot be written.")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"`em_eval.output_dir: {folder}` cannot be used: {getattr(error, 'strerror', None) or error}.") from None


def unreachable(url: str, patience: float = 3.0) -> str | None:
    """Return why nothing listens at a URL; None where something does, or where a proxy stands between."""
    address = urlsplit(url)
    if address.scheme == "https" and any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    try:
        with closing(socket.create_connection((address.hostname, address.port or (443 if address.scheme == "https" else 80)), patience)):
            return None
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
