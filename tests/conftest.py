"""Shared parts: tiny random models of every family, a byte-level ChatML tokenizer. No network, one thread."""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_DISABLED="true")

import pytest
import torch

if not torch.cuda.is_available():
    # Where Triton is installed these kernels stand in for transformers' own code, and then ask for a GPU.
    sys.modules["fla"] = None

from tests.tiny import FAMILIES, chat_rows, chatml_tokenizer, tiny_model


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
