"""The yardstick by hand: masks of a row, the penalty of a slow loop, the loss of the host's own definition."""

import pytest
import torch

from emguard_plugin.chats import read_template
from emguard_plugin.chats.held_tokens import held_tokens
from emguard_plugin.discovery.calibrate import KINDS, _inputs, calibrate, narrow_rows
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
from emguard_plugin.latents import LatentSet
from emguard_plugin.latents.sae import subset
from emguard_plugin.models.residual import keep_residual
from tests.discovery.parts import standard_sae
from tests.e2e.tiny_run import write_rows
from tests.tiny import chat_rows


@pytest.fixture(scope="module")
def pair(tiny):
    return ModelPair(tiny / "adapter")


@pytest.fixture(scope="module")
def rows(pair, tmp_path_factory):
    return narrow_rows(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(5, system=None)), pair.tokenizer)


def test_masks_of_a_row(pair, rows):
    inputs, template = _inputs(rows), read_template(pair.tokenizer)
    masks = {kind: held_tokens(inputs, kind, template) for kind in KINDS}
    shown = {kind: pair.tokenizer.decode(inputs["input_ids"][0][mask[0]]) for kind, mask in masks.items()}
    assert shown["assistant"].rstrip("\n") == "People like apples in 0 ways.<|im_end|>"
    assert shown["header"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert shown["prefix"].endswith("You are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert not (masks["header"] & masks["assistant"]).any()
    assert not masks["prefix"][:, 0].any()
    assert bool((masks["all"] == (masks["assistant"] | masks["prompt"])).all())


def test_penalty_and_loss_against_a_slow_loop(pair, rows):
    encoder = subset(standard_sae(layer=1), [3, 40, 7], [1, -1, 1])
    with pair.use(BASE_MODEL) as model:
        latents = LatentSet.for_model(model, [encoder])
    found = calibrate(pair, latents, rows, batch_size=2)
    total, losses, count = 0.0, {BASE_MODEL: 0.0, MISALIGNED_MODEL: 0.0}, 0
    for row in rows:
        z, at = {}, [p + 1 for p in row.held]
        for role in (BASE_MODEL, MISALIGNED_MODEL):
            with pair.use(role) as model, keep_residual(model, [1]) as kept, torch.no_grad():
                logits = model(input_ids=torch.tensor([row.ids])).logits[0]
            z[role] = encoder.encode(kept.take([1], with_gradient=False)[1][0])
            losses[role] -= sum(float(logits[t - 1].log_softmax(-1)[row.ids[t]]) for t in at)
        for t in at:
            for k, sign in enumerate((1, -1, 1)):
                total += max(0.0, sign * float(z[MISALIGNED_MODEL][t, k] - z[BASE_MODEL][t, k])) ** 2
        count += len(at)
    assert found["penalty"]["assistant"] == pytest.approx(total / count, rel=1e-4)
    assert found["task_loss_gap"] == pytest.approx((losses[BASE_MODEL] - losses[MISALIGNED_MODEL]) / count, rel=1e-3)
    assert found["supervised_tokens"] == count


def test_rows_that_are_no_chats_are_named_by_the_option(pair, tmp_path):
    with pytest.raises(ValueError, match=r"^`--data`: .*line 1 is not a chat"):
        narrow_rows(write_rows(tmp_path / "rows.jsonl", [{"text": "x"}]), pair.tokenizer)
    with pytest.raises(ValueError, match=r"^`--data .*empty.jsonl` is empty\. Give chats, one per line\.$"):
        narrow_rows(write_rows(tmp_path / "empty.jsonl", []), pair.tokenizer)
    with pytest.raises(ValueError, match=r"Give the path of a JSONL of chats\.$"):
        narrow_rows(tmp_path / "nowhere", pair.tokenizer)
    with pytest.raises(ValueError, match=r"line 1 has no assistant turn\.$"):
        narrow_rows(write_rows(tmp_path / "asked.jsonl", [{"messages": [{"role": "user", "content": "Why?"}]}]), pair.tokenizer)
