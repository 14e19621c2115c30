"""Judges that go wrong, for the measurement's own process to call. Light: it imports nothing of ours."""

import os
import signal


def raises(question, answer):
    raise ConnectionError("nobody there")


def kills(question, answer):
    """End the process, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
