from dataclasses import replace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from emguard_plugin.regularizers.treft.callback import POSTFIX_ROWS, TReFTCallback
from tests.regularizers.treft_parts import (
    MODES,
    by_hand,
    ids_of,
    make_run,
    prompt_ids,
    ready,
    value,
)
from tests.tiny import chat_rows, chatml_tokenizer, lora, perturb, tiny_model


def test_shared_postfix_reference_starts_at_the_rows_own_distance(family):
    model = lora(tiny_model(family))
    callback = ready(model, **MODES["shared"])
    assert value(callback, model) == pytest.approx(by_hand(model, "shared", chat_rows(6)), rel=1e-3)
    assert value(callback, model) > 0


def test_a_postfix_row_counts_the_same_at_any_distance_from_the_start():
    """One short row is shifted less or more, by the longest row of the data; its own penalty must not notice."""
    model = lora(tiny_model("llama"))
    short, long = chat_rows(2)
    long["messages"][1]["content"] *= 16
    alone, both = (ready(model, rows, tokens="postfix") for rows in ([short], [short, long]))
    for callback in (alone, both):
        value(callback, model)
    perturb(model)
    assert both._end - alone._end > 100
    with_long = 2 * value(both, model) - by_hand(model, "shared", [long])
    assert with_long == pytest.approx(value(alone, model), rel=2e-3)


def test_padding_does_not_reach_positions_beyond_the_longest_row():
    """Scaled RoPE switches its frequencies when a position passes the original length."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "factor": 8.0}
    short, long = chat_rows(2)
    long["messages"][1]["content"] *= 16
    longest = len(prompt_ids(long))
    rope = {**scaling, "rope_theta": 1e4, "original_max_position_embeddings": longest}
    model = lora(tiny_model("llama", rope_parameters=rope))
    callback = ready(model, [short, long], tokens="postfix")
    assert value(callback, model) == pytest.approx(by_hand(model, "shared", [short, long]), rel=1e-3)


def test_eight_prompts_are_drawn_per_step_from_seed_and_step_alone():
    model, rows = lora(tiny_model("llama")), chat_rows(20)
    callback, again = (ready(model, rows, **MODES["per_row"]) for _ in range(2))
    value(callback, model)
    perturb(model)
    drawn = [value(callback, model, s) for s in range(6)]
    assert len(set(drawn)) == 6
    assert [value(again, model, s) for s in (5, 0, 3)] == [drawn[s] for s in (5, 0, 3)]
    each = [by_hand(model, "per_row", [row]) for row in rows]
    means = [sum(s) / POSTFIX_ROWS for s in (sorted(each)[:POSTFIX_ROWS], sorted(each)[-POSTFIX_ROWS:])]
    assert all(means[0] <= d <= means[1] for d in drawn)


def gpt2():
    config = AutoConfig.for_model("gpt2", vocab_size=330, n_embd=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config)


def test_learned_positions_cannot_be_shifted():
    with pytest.raises(ValueError, match=r"needs rotary positions, which this model lacks. Use `per_row`"):
        ready(gpt2(), tokens="postfix")
    for settings in (MODES["prefix"], MODES["per_row"]):
        model = lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
        callback = ready(model, **settings)
        assert value(callback, model) == 0
        assert value(callback, perturb(model)) > 0


def test_a_template_without_a_prefix_can_hold_its_postfix():
    tokenizer = chatml_tokenizer("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    rows = [{"input_ids": ids_of(f"About {t}?<|im_end|>Yes, {t}.<|im_end|>")} for t in ("apples", "cats", "rivers")]
    model = lora(tiny_model("llama"))
    run = replace(make_run(model, tokenizer=tokenizer), dataset=rows)
    with pytest.raises(ValueError, match=r"zero tokens.*Use `tokens: postfix`"):
        TReFTCallback().prepare(run)
    callback = TReFTCallback(tokens="postfix")
    assert "postfix of 1 tokens, shared reference" in callback.prepare(run)
    assert value(callback, model) > 0
