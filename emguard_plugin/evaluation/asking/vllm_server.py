"""Serve a model with vLLM in a process of its own: its pins differ from a trainer's, so it is never imported."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from emguard_plugin.evaluation.asking.sources import ModelSource
from emguard_plugin.files import read_record
from emguard_plugin.files.secrets import redact

PATIENCE = 1800.0
"""Seconds in which a large model must be loaded."""


def command(source: ModelSource, role: str, port: int, args: Sequence[str], executable: str, template: Path | None = None) -> list[str]:
    """Return the command that serves one role of a model.

    An adapter is served beside its base, so that one server answers for both, as `base` and `tuned`.

    Args:
        source: The models.
        role: `base` or `tuned`; the same for an adapter.
        port: Where to listen, on this machine only.
        args: `em_eval.sampler.args`.
        executable: Path of `vllm`.
        template: File with the chat template; None for the tokenizer's own.
    """
    common = ["--host", "127.0.0.1", "--port", str(port)]
    # What a checkpoint's generation_config.json asks for would change the distribution that is measured.
    common += ["--generation-config", "vllm"]
    common += [] if template is None else ["--chat-template", str(template)]
    if source.adapter:
        lora = ["--enable-lora", "--lora-modules", f"tuned={source.path}", "--max-lora-rank", str(_rank(source.path))]
        tokenizer = ["--tokenizer", str(source.path)] if (source.path / "tokenizer_config.json").is_file() else []
        return [executable, "serve", str(source.base), "--served-model-name", "base", *lora, *tokenizer, *common, *args]
    model = str(source.base if role == "base" else source.path)
    return [executable, "serve", model, "--served-model-name", role, *common, *args]


@contextlib.contextmanager
def serve(
    source: ModelSource, role: str, args: Sequence[str] = (), patience: float = PATIENCE, template: str | None = None
) -> Iterator[str]:
    """Start vLLM, wait until it answers, yield its URL, and stop it with all its children.

    `template` is the Jinja text of another chat template than the tokenizer's own.

    Yields:
        The URL, up to and including `/v1`.

    Raises:
        ValueError: If there is no `vllm`.
        RuntimeError: If it ends, or does not answer in time; holds the end of its output.
    """
    executable = shutil.which("vllm")
    if executable is None:
        raise ValueError(
            "`em_eval.sampler: provider: vllm` needs the command `vllm`, which is not on the PATH. Install vLLM in an "
            "environment of its own and put that on the PATH, or set `provider: transformers`."
        )
    port = _free_port()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as folder:
        file = None if template is None else Path(folder) / "chat_template.jinja"
        if file is not None and template is not None:
            file.write_text(template, encoding="utf-8")
        process = subprocess.Popen(
            command(source, role, port, args, executable, file),
            stdout=output,
            stderr=subprocess.STDOUT,
            # A key that vLLM would ask for is nobody's here: the server is ours, on this machine.
            env={name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"},
            start_new_session=True,  # its workers are stopped with it
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", patience, output)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, patience: float, output: IO[bytes]) -> None:
    until = time.monotonic() + patience
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit code {process.returncode}:\n{_tail(output)}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError), opener.open(url, timeout=2):
            return
        time.sleep(0.2)
    raise RuntimeError(f"vLLM did not answer within {patience:g} s:\n{_tail(output)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for kind, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived its parent


def _tail(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - 2000))
    return redact(output.read().decode("utf-8", "replace"))


def _rank(adapter: Path) -> int:

    config = read_record(adapter / "adapter_config.json", dict[str, Any])
    rank = max([config.get("r") or 8, *(config.get("rank_pattern") or {}).values()])
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)  # what vLLM allows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
