"""Processes of one group on this machine, for tests."""

import multiprocessing
import os
import socket
from contextlib import contextmanager
from datetime import timedelta

import torch

IMPORTED_ONCE = ["emguard_plugin.training.trl_trainer", "emguard_plugin.regularizers.treft.callback", "datasets", "peft"]


def gloo(minutes=2):
    """Join the group that `started` has prepared."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=minutes))


@contextmanager
def started(work, *args, start="forkserver", ranks=2):
    """Yield the processes, by rank, that run `work(*args)` with a launcher's variables; in the end they are killed.

    Under DeepSpeed `start` is `spawn`: it is imported after its variables are set.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(IMPORTED_ONCE)
    processes = [context.Process(target=_rank, args=(number, ranks, port, work, args)) for number in range(ranks)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def together(work, *args, limit=400, **kw):
    """Run `work(*args)` on every rank to its end."""
    with started(work, *args, **kw) as processes:
        for process in processes:
            process.join(limit)
        assert [process.exitcode for process in processes] == [0] * len(processes)


def _rank(number, ranks, port, work, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    work(*args)
