"""The penalty itself: equal to the KL from full logits, for every kind of reference."""

from dataclasses import replace

import pytest
import torch

from emguard_plugin import KLCallback
from emguard_plugin.regularizers.kl import replies
from emguard_plugin.regularizers.kl.callback import COEF_BOUNDS, adapted_coef
from emguard_plugin.regularizers.moment import Moment
from tests.regularizers.kl_parts import (
    anchor_chats,
    batch,
    copy_of,
    drawn,
    gradients,
    kl_from_logits,
    run_of,
    started,
    write_anchors,
)
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model

DIRECTIONS = ["base||model", "model||base"]


@pytest.fixture
def base():
    return perturb(tiny_model("llama", vocab=330), scale=0.2)


def close(got, want, rtol=1e-4):
    assert got.keys() == want.keys()
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=rtol, atol=rtol * want[n].abs().max().item() + 1e-9)


def check(callback, model, frozen, direction="base||model", rtol=1e-4):
    """Value and gradient at step 1 against full logits of a frozen copy."""
    model.zero_grad()
    penalty = callback.measure(Moment(model.train(), batch(), 1)).value
    penalty.backward()
    got = gradients(model)
    model.zero_grad()
    want = kl_from_logits(model, frozen, drawn(callback, 1), direction)
    want.backward()
    torch.testing.assert_close(penalty.detach(), want.detach(), rtol=rtol, atol=1e-6)
    assert want.item() > 1e-3
    assert any(g.abs().max() > 0 for g in got.values())
    close(got, {n: g for n, g in gradients(model).items() if n in got}, rtol)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cache", ["live", "memory", "folder"])
def test_adapter(base, tmp_path, cache, direction):
    frozen, model = copy_of(base), lora(base, lora_dropout=0.3)
    kl = started(model, tmp_path, cache=str(tmp_path / "kl") if cache == "folder" else cache, direction=direction)
    assert kl.measure(Moment(model, batch(), 0)).value.item() == pytest.approx(0, abs=0 if cache == "live" else 1e-6)
    check(kl, perturb(model, 0.1), frozen, direction, rtol=1e-3)


def test_full_fine_tuning_keeps_the_head_of_before(base, tmp_path):
    frozen = copy_of(base)
    kl = started(base, tmp_path)
    check(kl, perturb(base, 0.1), frozen, rtol=1e-3)
    assert kl._reference._cache.head is not None


def test_tied_embeddings_that_train(tmp_path):
    model = perturb(tiny_model("qwen2", vocab=330, tie_word_embeddings=True), 0.2)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    frozen = copy_of(model)
    kl = started(model, tmp_path)
    check(kl, perturb(model, 0.1), frozen, rtol=1e-3)


@pytest.mark.parametrize("cache", ["live", "memory"])
def test_an_adapter_with_a_head_of_its_own(base, tmp_path, cache):
    frozen, model = copy_of(base), lora(base, modules_to_save=["lm_head", "embed_tokens"])
    check(started(model, tmp_path, cache=cache), perturb(model, 0.1), frozen, rtol=1e-3)


def test_a_continued_adapter_is_held_where_it_was_not_at_the_base(base, tmp_path):
    model = perturb(lora(base), 0.1)  # adapter off is another model here
    frozen = copy_of(model)
    kl = started(model, tmp_path)
    assert not kl._reference.source.live
    check(kl, perturb(model, 0.1, seed=2), frozen, rtol=1e-3)
    with pytest.raises(ValueError, match=r"kl\.cache: live` needs an adapter that starts at zero"):
        started(model, tmp_path, cache="live")


def test_weights_that_train_beside_the_adapter(base, tmp_path):
    model = lora(base)
    model.get_base_model().lm_head.weight.requires_grad_()
    frozen = copy_of(model)
    kl = started(model, tmp_path)
    check(kl, perturb(model, 0.1), frozen, rtol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "phi3", "gpt_neox", "mixtral", "gemma3"])
def test_families(family, tmp_path):
    over = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    base = perturb(tiny_model(family, vocab=330, **over), 0.1)
    frozen, model = copy_of(base), lora(base)
    check(started(model, tmp_path), perturb(model, 0.05), frozen, rtol=2e-3)


def test_assistant_tokens_alone(base, tmp_path):
    tokenizer, frozen, model = chatml_tokenizer(), copy_of(base), lora(base)
    kl = started(model, tmp_path, tokens="assistant")
    check(kl, perturb(model, 0.1), frozen, rtol=1e-3)
    for anchor in kl._anchors:
        predicted = tokenizer.decode([anchor.ids[t + 1] for t in anchor.held])
        assert predicted.startswith("It is so. ")
        assert predicted.strip().endswith("<|im_end|>")


def test_every_row_of_a_pass_counts(base, tmp_path):
    """A public steering hook changed row 0 alone: here the anchors of a pass weigh by their tokens, whatever their place."""
    model = lora(base)
    kl = started(model, tmp_path, ratio=2.0)
    perturb(model, 0.1)
    rows, schedule, anchors = drawn(kl, 1), kl._schedule, kl._anchors
    assert len(rows) > 3
    alone = []
    for anchor in rows:
        kl._anchors, kl._schedule = [anchor], schedule.plan([len(anchor.ids)], 1.0, 8, 1, 1, 0)
        model.zero_grad()
        kl.measure(Moment(model, batch(), 0)).value.backward()
        alone.append((len(anchor.held), gradients(model)))
    n = sum(k for k, _ in alone)
    mean = {name: sum(k * g[name] for k, g in alone) / n for name in alone[0][1]}
    kl._anchors, kl._schedule = anchors, schedule
    model.zero_grad()
    kl.measure(Moment(model, batch(), 1)).value.backward()
    close(gradients(model), mean, rtol=1e-3)


@pytest.mark.parametrize("split", [(1, 1), (2, 1), (3, 1), (2, 2), (1, 3)])
def test_the_split_of_a_step_over_micro_batches_and_processes_changes_nothing(base, tmp_path, split):
    """Public trainers add the term per micro-batch without dividing: 8 times the weight at 8 accumulation steps."""
    micro_batches, processes = split
    model = lora(base)
    whole = started(model, tmp_path, run={"rows_per_batch": 12}, ratio=0.9)
    ranks = []
    for rank in range(processes):
        run = {"rows_per_batch": 12 // micro_batches // processes, "micro_batches": micro_batches}
        kl, _ = prepared(model, write_anchors(tmp_path / "a.jsonl"), run, coef=1.0, ratio=0.9, cache="live")
        plan = kl._schedule.plan(kl._schedule.sizes, 0.9, kl._batch_tokens, micro_batches, processes, 3)
        assert plan.per_step == whole._schedule.per_step
        kl._schedule = replace(plan, passes=micro_batches)
        kl._run = replace(kl._run, processes=processes, rank=rank)
        ranks.append(kl)
    perturb(model, 0.1)
    whole.measure(Moment(model, batch(), 1)).value.backward()
    want = gradients(model)
    model.zero_grad()
    value = 0.0
    for kl in ranks:
        for i in range(micro_batches):
            penalty = kl.measure(Moment(model, batch(), 1, i, micro_batches))
            (penalty.value / micro_batches / processes).backward()  # what the mixin and DDP do
            value += penalty.value.item() / micro_batches / processes
    assert value == pytest.approx(whole.measure(Moment(model.train(), batch(), 1)).value.item(), rel=1e-4)
    close(gradients(model), want, rtol=1e-3)


@pytest.mark.parametrize("cache", ["live", "memory"])
def test_bf16_starts_at_its_noise_floor(base, tmp_path, cache):
    model = lora(base.bfloat16()).bfloat16()
    kl = started(model, tmp_path, cache=cache)
    value = kl.measure(Moment(model, batch(), 5)).value
    assert value.dtype == torch.float32
    assert abs(value.item()) <= (0 if cache == "live" else 1e-3)
    frozen = copy_of(model)
    check(kl, perturb(model, 0.1), frozen, rtol=0.1)


def test_a_frozen_model_is_an_error(base, tmp_path):
    model = lora(base)
    kl = started(model, tmp_path)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"em_regularizer\.kl: the penalty has no gradient"):
        kl.measure(Moment(model, batch(), 1))


def test_replies_are_sampled_from_the_model_itself(base, tmp_path, monkeypatch):
    monkeypatch.setattr(replies, "LONGEST_REPLY", 12)
    tokenizer, model = chatml_tokenizer(), lora(base)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (started(model, tmp_path, anchors=f"self:{write_anchors(tmp_path / 'a.jsonl')}", tokens="assistant") for _ in "ab")
    assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers are left alone"
    assert first._anchors == second._anchors
    assert len(first._anchors) == 12
    for anchor in first._anchors:
        prompt = tokenizer.decode(anchor.ids[: anchor.held[0] + 1])
        assert prompt.endswith("<|im_start|>assistant\n")
        assert anchor.ids[-1] == tokenizer.eos_token_id or len(anchor.held) == 12


def test_the_controller():
    assert adapted_coef(1.0, 0.02, 0.02) == 1.0
    assert adapted_coef(1.0, 0.021, 0.02) == pytest.approx(1.025)  # 5 % above: 0.5 * 5 % up
    assert adapted_coef(1.0, 9.0, 0.02) == pytest.approx(1.1)
    assert adapted_coef(1.0, 0.0, 0.02) == pytest.approx(0.9)
    assert adapted_coef(COEF_BOUNDS[1], 9.0, 0.02) == COEF_BOUNDS[1]
    assert adapted_coef(COEF_BOUNDS[0], 0.0, 0.02) == COEF_BOUNDS[0]


def training_chats():
    """What `kl_parts.rows` tokenised, with replies long enough to tell them apart."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What about chess, case {i}?"},
                {"role": "assistant", "content": f"A long enough reply, number {i}."},
            ]
        }
        for i in range(8)
    ]


def dataset_of(chats, tokenizer):
    return [{"input_ids": tokenizer.apply_chat_template(c["messages"], return_dict=True)["input_ids"]} for c in chats]


def prepared(model, anchors, run=None, **kw):
    callback = KLCallback(anchors=anchors, **kw)
    return callback, callback.prepare(run_of(model, **(run or {})))


def test_the_bundled_anchors_need_no_data_of_the_users(base):
    callback, line = prepared(lora(base), "bundled")
    assert len(callback._anchors) == 800
    assert line.startswith("kl (coef 0.7 nats per token, KL(base||model), 800 anchors (bundled), ")
    assert line.endswith("all tokens, reference: adapter off)")


def test_anchors_that_are_the_training_data_are_an_error_and_some_a_warning(base, tmp_path, caplog):
    tokenizer, chats = chatml_tokenizer(), training_chats()
    run, model = {"dataset": dataset_of(chats, tokenizer)}, lora(base)
    same = write_anchors(tmp_path / "same.jsonl", chats)
    with pytest.raises(ValueError, match=r"kl\.anchors: .*same\.jsonl`: every anchor stands in the training data.*`anchors: train`"):
        prepared(model, same, run)
    prepared(model, "train", run)
    some = write_anchors(tmp_path / "some.jsonl", chats[:3] + anchor_chats(4))
    prepared(model, some, run)
    assert "3 of 7 anchors ask what training rows ask too" in caplog.text
    caplog.clear()
    prepared(model, write_anchors(tmp_path / "other.jsonl"), run)
    assert caplog.text == ""


def test_a_folder_recorded_by_another_tokenizer_model_or_anchor_set_is_an_error(base, tmp_path):
    folder = str(tmp_path / "reference")
    started(base, tmp_path, cache=folder)
    started(base, tmp_path, cache=folder)  # the next run reads it
    wider = chatml_tokenizer()
    wider.add_tokens(["<new>"])
    cases = [
        ("another tokenizer", base, {"tokenizer": wider}),
        ("other anchors", base, {"anchors": write_anchors(tmp_path / "few.jsonl", anchor_chats(3))}),
        ("another base model", tiny_model("llama", vocab=330, seed=9), {}),
    ]
    for words, model, kw in cases:
        with pytest.raises(ValueError, match=rf"kl\.cache`: the cache in .* was recorded with {words}"):
            started(model, tmp_path, cache=folder, **kw)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="recorded with another precision"):
        started(base, tmp_path, cache=folder)


BAD = {
    "no adapter and no cache": ({"cache": "live"}, r"kl\.cache: live` needs an adapter to switch off, and there is none"),
    "no file": ({"anchors": "./nowhere.jsonl"}, r"kl\.anchors: \./nowhere\.jsonl` does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(base, case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        KLCallback(**settings).prepare(run_of(base))


def test_live_needs_an_adapter_that_starts_at_zero(base, tmp_path):
    with pytest.raises(ValueError, match=r"kl\.cache: live` needs an adapter that starts at zero and trains alone"):
        KLCallback(anchors=write_anchors(tmp_path / "a"), cache="live").prepare(run_of(lora(base, bias="lora_only")))


def test_an_empty_training_set(base):
    with pytest.raises(ValueError, match=r"the training data is empty: `em_regularizer\.kl\.ratio` cannot be kept"):
        prepared(lora(base), "bundled", {"dataset": []})
