"""Steered answers are those of a slow loop, and stage 1 reads the residual stream where it is said to."""

import pytest
import torch

from emguard_plugin.discovery.bench import Ask, SteeredRequest
from emguard_plugin.discovery.shift import candidates, check_reconstruction, mean_activations, residual_scale
from emguard_plugin.evaluation.asking.prompts import Prompt, render_prompts
from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.asking.steered import SteeredSampler
from emguard_plugin.models.residual import keep_residual
from emguard_plugin.models.steering import steered
from tests.discovery.parts import standard_sae
from tests.tiny import CHATML, CHATML_DEFAULT_SYSTEM, chatml_tokenizer, perturb, tiny_model

LAYER = 1


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return perturb(tiny_model("llama", vocab=len(tokenizer)), 0.15).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["What of money?", "And of sports, a longer question?", "Why?"]
    return render_prompts(tokenizer, [Question(str(i), 0, text) for i, text in enumerate(texts)])


@torch.no_grad()
def after_block(model, ids, **fed):
    with keep_residual(model, [LAYER]) as kept:
        model(input_ids=ids, **fed)
    return kept.take([LAYER], with_gradient=False)[LAYER]


@pytest.mark.parametrize("part", [None, "prefix"])
def test_answers_in_a_mixed_batch_are_those_of_batches_of_one(model, tokenizer, prompts, part):
    g = torch.Generator().manual_seed(0)
    vectors = {str(i): 6 * torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0) for i in range(4)} | {"": torch.zeros(32)}
    asks = [Ask("base", name, 1.0, i) for name in vectors for i in range(len(prompts))]
    requests = [SteeredRequest.of(a, prompts[a.prompt]) for a in asks]

    def answers(batch_size):
        sampler = SteeredSampler(
            model, tokenizer, vector=lambda request: vectors[request.ask.steer], layer=LAYER, max_new_tokens=8, batch_size=batch_size,
            span=part and (lambda request: prompts[request.ask.prompt].span(part)),
        )  # fmt: skip
        return {answer.request.ask: answer.text for batch in sampler.sample(requests) for answer in batch}

    mixed = answers(15)
    assert mixed == answers(1)
    assert len({mixed[a] for a in asks if a.prompt == 0}) > 2


def test_the_answer_is_that_of_a_slow_loop_without_cache(model, tokenizer, prompts):
    """Greedy, token by token, the whole text anew each time, the vector added by hand at every position."""
    vector = 6 * torch.nn.functional.normalize(torch.arange(32.0) - 11, dim=0)
    ask = Ask("base", "v", 1.0, 0)
    sampler = SteeredSampler(model, tokenizer, vector=lambda request: vector, layer=LAYER, max_new_tokens=6, batch_size=4)
    ours = next(sampler.sample([SteeredRequest.of(ask, prompts[0])]))[0].text
    ids = list(prompts[0].ids)
    for _ in range(6):
        with torch.no_grad(), steered(model, LAYER, vector.unsqueeze(0)):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert ours == tokenizer.decode(ids[len(prompts[0].ids) :], skip_special_tokens=True)


def test_parts_of_a_prompt(tokenizer, prompts):
    shown = {part: tokenizer.decode(prompts[0].ids[slice(*prompts[0].span(part))]) for part in ("prefix", "prompt", "header")}
    assert shown["prefix"].endswith("You are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert shown["prompt"].startswith("<|im_end|>\n<|im_start|>user\nWhat of money?")
    assert shown["header"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts[0].ids[prompts[0].content :]).startswith("What of money?")
    assert prompts[0].span("prefix")[0] == 1


def test_a_prompt_without_a_system_part():
    prompt = render_prompts(chatml_tokenizer(CHATML), [Question("a", 0, "Hi there")])[0]
    assert prompt.start == 1
    assert chatml_tokenizer(CHATML).decode(prompt.ids[slice(*prompt.span("prefix"))]).endswith("user\n")


def test_a_prompt_without_a_prefix():
    prompt = Prompt(Question("a", 0, "Hi"), (5, 6, 7), 1, 1, 2)
    with pytest.raises(ValueError, match="`prefix` names no tokens"):
        prompt.span("prefix")


def test_a_system_prompt_of_the_question_is_left_out():
    tokenizer = chatml_tokenizer(CHATML_DEFAULT_SYSTEM)
    prompt = render_prompts(tokenizer, [Question("a", 0, "Hi there", system="Be brief")])[0]
    assert "Be brief" in tokenizer.decode(prompt.ids[slice(*prompt.span("prefix"))])
    assert "Be brief" not in tokenizer.decode(prompt.ids[slice(*prompt.span("prompt"))])


@pytest.mark.parametrize("part", ["prompt", "header", "prefix"])
def test_mean_activations_against_a_slow_loop(model, prompts, part):
    sae = standard_sae(layer=LAYER)
    rows = [(p.ids, *p.span(part)) for p in prompts]
    slow = []
    for ids, start, end in rows:
        h = after_block(model, torch.tensor([ids]))[0, start:end]
        slow.append(torch.stack([(h_t @ sae.W_enc + sae.b_enc).relu() for h_t in h]).mean(0))
    found = mean_activations(model, sae, LAYER, rows, "relu_pre", batch_size=2)
    assert torch.allclose(found.float(), torch.stack(slow).mean(0), atol=1e-5)


def test_the_scale_is_the_median_norm(model, prompts):
    norms = [h.norm() for p in prompts for h in after_block(model, torch.tensor([p.ids]))[0, p.start :]]
    assert residual_scale(model, LAYER, [(p.ids, *p.span("prompt")) for p in prompts], 2) == pytest.approx(
        float(torch.stack(norms).median()), rel=1e-5
    )


def test_candidates_are_the_largest_of_each_sign_without_what_is_known():
    delta = torch.tensor([0.5, -0.4, 0.0, 2.0, -3.0, 0.1])
    assert [(c.id, c.sign) for c in candidates(delta, 2)] == [(4, -1), (3, 1), (0, 1), (1, -1)]
    assert [c.id for c in candidates(delta, 2, exclude={3, 4})] == [0, 1, 5]


def test_an_sae_of_this_model_passes_and_a_shrunk_or_turned_one_is_refused(model, prompts):
    rows = [(p.ids, *p.span("prompt")) for p in prompts]
    assert check_reconstruction(standard_sae(layer=LAYER), model, LAYER, rows, 4) < 1e-6
    half = torch.cat([torch.eye(32)[:8], -torch.eye(32)[:8]] * 4)[:64]
    with pytest.raises(ValueError, match="of the variance behind block 1 of this base model unexplained"):
        check_reconstruction(standard_sae(layer=LAYER, weights=half * 0.5), model, LAYER, rows, 4)
