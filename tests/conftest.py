"""Shared parts: tiny random models of every family, a byte-level ChatML tokenizer. No network, one thread."""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_DISABLED="true")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Where Triton is installed these kernels stand in for transformers' own code, and then ask for a GPU.
    sys.modules["fla"] = None

from importlib.util import find_spec
from pathlib import Path

from tests.tiny import FAMILIES, chat_rows, chatml_tokenizer, tiny_model

hypothesis.settings.register_profile("emguard", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("emguard")

NEEDS = {name: find_spec(name) for name in ("axolotl", "bitsandbytes", "deepspeed")}
"""Packages that only some stacks have (`constraints/`), or none (`make zero`), each with a marker of its name."""


def pytest_collection_modifyitems(config, items):
    """Leave out what a stack cannot run, and say so: it is no pass, and no skip among others."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here / "e2e") or item.path.name.startswith("test_axolotl") or "axolotl" in item.fixturenames:
            item.add_marker("axolotl")
    lacking = [name for name, found in NEEDS.items() if found is None]
    left = [item for item in items if any(item.get_closest_marker(name) for name in lacking)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_report_header():
    return [f"{name} is not installed: what needs it is deselected" for name, found in NEEDS.items() if found is None]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture
def rows():
    return chat_rows()


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def llama(tokenizer):
    return tiny_model("llama", vocab=len(tokenizer))
