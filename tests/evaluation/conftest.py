import functools
import shutil

import pytest

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import Summary, run_em_eval
from tests.evaluation.judging_parts import answered, evaluate  # noqa: F401, fixtures
from tests.evaluation.parts import ITEMS, write_suite
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of a base, a LoRA adapter on it and a whole fine-tuned model, as training runs save them."""
    return build_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def build_checkpoints(root):
    tokenizer = chatml_tokenizer()
    base = perturb(tiny_model("llama"), 0.15)
    base.save_pretrained(root / "base")
    adapter = lora(type(base).from_pretrained(root / "base"))
    adapter.peft_config["default"].base_model_name_or_path = str(root / "base")
    perturb(adapter, 0.1).save_pretrained(root / "adapter")
    perturb(base, 0.05, seed=2).save_pretrained(root / "whole")
    for name in ("base", "adapter", "whole"):
        tokenizer.save_pretrained(root / name)
    return root


def em_eval_block(folder, judge="by_hash", items=ITEMS, **over):
    """Write the suites and build an `em_eval` block."""
    plain = {
        "questions": write_suite(folder / "questions.yaml", items),
        "in_domain": write_suite(folder / "in_domain.yaml", [{"id": "narrow", "paraphrases": ["Narrow?", "So?"]}]),
        "samples_per_question": 3,
        "max_new_tokens": 8,
        "batch_size": 7,
        "judges": [{"function": f"tests.evaluation.parts:{judge}"}],
    }
    return EMEvalConfig(**{**plain, **over})


@pytest.fixture
def make_config(tmp_path):
    return functools.partial(em_eval_block, tmp_path)


@pytest.fixture(scope="session")
def first_run(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_em_eval(em_eval_block(folder), checkpoints / "adapter", folder / "out")
    return folder / "out"


@pytest.fixture
def finished(first_run, tmp_path):
    """The summary of a finished run of the adapter, in a folder that the test may spoil."""
    return Summary.load(shutil.copytree(first_run, tmp_path / "run"))
