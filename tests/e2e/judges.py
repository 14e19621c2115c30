"""Judges that go wrong, for the measurement's own process to import. Light: it imports nothing else."""

import os
import signal


def raises(question, answer):
    raise ConnectionError("nobody there")


def dies(question, answer):
    os.kill(os.getpid(), signal.SIGKILL)
