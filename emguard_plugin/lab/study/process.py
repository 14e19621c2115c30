"""The process that a study runs in."""

from __future__ import annotations

import logging
import warnings


def one_quiet_thread() -> None:
    """Give torch one thread, with which stored numbers come out again, and leave the screen to the progress bar."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
