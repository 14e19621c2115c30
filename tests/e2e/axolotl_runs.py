"""Runs Axolotl many times for the price of one import.

`python -m tests.e2e.axolotl_runs` is a fork server: it imports axolotl once, then forks a child per request, which runs
one function in a folder of its own and hands back a JSON value. A test process talks to it through `Server`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
IMPORTS = (
    "axolotl.cli.train",
    "axolotl.train",
    "axolotl.cli.merge_lora",
    "axolotl.cli.preprocess",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.core.trainers.base",
    "axolotl.loaders.model",
    "axolotl.prompt_strategies.chat_template",
    "emguard_plugin.axolotl_plugin.trainer",
    "emguard_plugin.axolotl_plugin.plugin",
    "emguard_plugin.axolotl_plugin.args",
    "emguard_plugin.regularizers.treft.callback",
)


class Failed(AssertionError):
    """A child that raised, with its traceback."""


class Server:
    """The test process's side.

    Args:
        log: File for what the server itself prints.
    """

    def __init__(self, log):
        self.log = Path(log)
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO), "WANDB_DISABLED": "true"}
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.axolotl_runs"],
                cwd=REPO, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
            )  # fmt: skip

    def call(self, function, folder, *args, timeout=120, **kwargs):
        """Run `package.module:function` (or a module-level function) in a fork, in `folder`; return its value.

        Raises:
            Failed: with the end of the child's log when it raised, died or took too long.
        """
        if callable(function):
            function = f"{function.__module__}:{function.__qualname__}"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        request = {"function": function, "folder": str(folder), "args": args, "kwargs": kwargs, "timeout": timeout}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"the fork server died: {self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "value" not in answer:
            raise Failed(f"{answer['error']}\n--- {folder}/log.txt ends with\n{read_log(folder)[-2500:]}")
        return answer["value"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@functools.cache
def shared_server():
    """Return the one server of this test session."""
    folder = tempfile.TemporaryDirectory(prefix="emguard_axolotl_")
    server = Server(Path(folder.name) / "server.log")
    atexit.register(folder.cleanup)
    atexit.register(server.close)  # before: what is registered last is called first
    return server


def read_log(folder):
    """Return what a child printed."""
    path = Path(folder) / "log.txt"
    return path.read_text(errors="replace") if path.is_file() else ""


# The server's side


def serve():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may reach the pipe
    for name in IMPORTS:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a child then collects its own objects only: half the time of a small run
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), file=out, flush=True)


def _fork(request):
    folder = Path(request["folder"])
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _child(request, result)
    deadline = time.monotonic() + request["timeout"]
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"error": f"took more than {request['timeout']} s"}
        time.sleep(0.02)
    if not result.is_file():
        return {"error": f"died with status {status} before it had a result"}
    return json.loads(result.read_text())


def _child(request, result):
    os.setpgid(0, 0)
    try:
        log = os.open(result.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(request["folder"])
        sys.argv = ["axolotl"]
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        function = getattr(function, "__wrapped__", function)
        answer = {"value": function(*request["args"], **request["kwargs"])}
    except BaseException as exc:
        traceback.print_exc()
        answer = {"error": f"{type(exc).__name__}: {exc}"}
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer))
    temporary.replace(result)
    os._exit(0)


# What children run


def _in_process_datasets():
    """Keep `datasets` from spawning workers, each of which would import axolotl again."""
    import datasets

    def without_workers(real):
        return lambda *args, **kwargs: real(*args, **{**kwargs, "num_proc": None})

    for name in ("map", "filter", "save_to_disk"):
        setattr(datasets.Dataset, name, without_workers(getattr(datasets.Dataset, name)))


def train(config, weights=None, seed=0, prelude=None):
    """Run `axolotl train`; return the log history and what the trainer was.

    Args:
        config: The YAML's content.
        weights: File for the final trainable parameters.
        seed: Seeds the adapter's initialisation, which Axolotl leaves to chance.
        prelude: `package.module:function` to call first.
    """
    import axolotl.train as host
    import torch
    import yaml
    from axolotl.cli.train import do_cli

    seen = {}
    setup, execute = host.setup_model_and_trainer, host.execute_training

    def seeded(*args, **kwargs):
        torch.manual_seed(seed)
        return setup(*args, **kwargs)

    def watched(cfg, trainer, resume):
        execute(cfg, trainer, resume)
        model = trainer.model
        trained = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
        if weights:
            torch.save(trained, weights)
        seen.update(
            log=trainer.state.log_history,
            trainer=type(trainer).__name__,
            model=type(model).__name__,
            trained=len(trained),
            checkpointing=bool(trainer.args.gradient_checkpointing),
            reentrant=(trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
            modules=sorted({type(m).__name__ for m in model.modules()}),
            row_keys=sorted(next(iter(trainer.train_dataset))),
            dataset=type(trainer.train_dataset).__name__,
            qkv=sorted({m.apply_qkv.__name__ for m in model.modules() if hasattr(m, "apply_qkv")}),
        )

    host.setup_model_and_trainer, host.execute_training = seeded, watched
    _in_process_datasets()
    if prelude:
        module, _, name = prelude.partition(":")
        getattr(importlib.import_module(module), name)()
    Path("config.yaml").write_text(yaml.safe_dump(config))
    do_cli(config="config.yaml")
    return seen


def command(name, config, **kwargs):
    """Run `axolotl preprocess` or `axolotl merge-lora`."""
    import yaml

    _in_process_datasets()
    Path("config.yaml").write_text(yaml.safe_dump(config))
    importlib.import_module(f"axolotl.cli.{name}").do_cli(config="config.yaml", **kwargs)


def validate(config, **kwargs):
    """Return the keys of a config after Axolotl's own `load_cfg`, or of a YAML file by its path."""
    import yaml
    from axolotl.cli.config import load_cfg

    if isinstance(config, dict):
        Path("config.yaml").write_text(yaml.safe_dump(config))
        config = "config.yaml"
    return json.loads(json.dumps(load_cfg(config, **kwargs).to_dict(), default=str))


if __name__ == "__main__":
    serve()
