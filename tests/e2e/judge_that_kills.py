"""A judge whose import ends the measurement's process, as the kernel does when memory runs out."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
