import numpy as np
import pytest
import torch
from scipy import stats

from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.asking.sampler import AnswerKey, Request, TransformersSampler, inverse_cdf, uniforms
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model

QUESTIONS = [Question(f"q{n}", 0, f"What of {'very ' * n}apples?") for n in range(4)]


def requests(draws=4, temperature=1.0):
    return [Request("questions", question, draw, temperature) for question in QUESTIONS for draw in range(draws)]


def sampler(model, **over):
    return TransformersSampler(model, chatml_tokenizer(), **{"max_new_tokens": 12, "batch_size": 16, **over})


def texts(sampler, wanted, done=()):
    return {answer.request.key: answer.text for batch in sampler.sample(wanted, done) for answer in batch}


@pytest.fixture(scope="module")
def llama():
    # Larger weights than at initialisation: the distributions are peaked, as a trained model's are.
    return perturb(tiny_model("llama"), 0.15).eval()


def test_the_inverse_cdf_draws_from_the_softmax():
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0, -torch.inf, 0.0])
    draws, temperature = 20_000, 1.7
    uniform = torch.from_numpy(uniforms(0, AnswerKey("s", "q", 0, 0), draws))
    picked = inverse_cdf(logits.expand(draws, -1), uniform, torch.full((draws,), temperature, dtype=torch.float64))
    counts = np.bincount(picked.numpy(), minlength=6)
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * draws
    assert counts[4] == 0
    possible = expected > 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 0.001


def test_the_ends_of_the_unit_interval_pick_tokens_that_can_occur():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    picked = inverse_cdf(logits, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64), torch.ones(2))
    assert picked.tolist() == [1, 2]


def test_temperature_zero_is_the_argmax_whatever_the_random_number():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    uniform = torch.tensor([0.999, 0.999], dtype=torch.float64)
    assert inverse_cdf(logits, uniform, torch.tensor([0.0, 1e6])).tolist() == [1, 2]


def test_nan_logits_are_an_error_and_not_an_answer():
    with pytest.raises(RuntimeError, match="NaN logits"):
        inverse_cdf(torch.full((1, 3), torch.nan), torch.zeros(1, dtype=torch.float64), torch.ones(1))


def test_random_numbers_belong_to_the_draw():
    key = AnswerKey("questions", "q", 0, 0)
    assert np.array_equal(uniforms(0, key, 8), uniforms(0, key, 8))
    assert np.array_equal(uniforms(0, key, 8), uniforms(0, key, 16)[:8])
    others = [key._replace(suite="in_domain"), key._replace(question="r"), key._replace(paraphrase=1)]
    for other in [*others, key._replace(draw=1)]:
        assert not np.array_equal(uniforms(0, key, 8), uniforms(0, other, 8))
    assert not np.array_equal(uniforms(0, key, 8), uniforms(1, key, 8))


def test_first_tokens_follow_the_model():
    model = perturb(tiny_model("llama"), 0.15).eval()
    one = sampler(model, max_new_tokens=1, batch_size=500)
    with torch.no_grad():
        logits = model(torch.tensor([one.prompt_ids(QUESTIONS[0])])).logits[0, -1].double()
    expected = torch.softmax(logits, -1).numpy()
    wanted = [Request("questions", QUESTIONS[0], draw, 1.0) for draw in range(2000)]
    seen = {a.request.draw: a for batch in one.sample(wanted) for a in batch}
    picks = inverse_cdf(
        logits.expand(2000, -1),
        torch.tensor([uniforms(0, request.key, 1)[0] for request in wanted], dtype=torch.float64),
        torch.ones(2000),
    )
    tokenizer = one.tokenizer
    same = [seen[n].text == tokenizer.decode([token], skip_special_tokens=True) for n, token in enumerate(picks.tolist())]
    # A draw within rounding of a step of the CDF may fall on its other side.
    assert np.mean(same) > 0.999
    common = expected * 2000 > 5
    counts = np.bincount(picks.numpy(), minlength=len(expected))
    counts = np.append(counts[common], counts[~common].sum())
    assert stats.chisquare(counts, np.append(expected[common], expected[~common].sum()) * 2000).pvalue > 0.001


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "gpt_neox", "mixtral"])
def test_an_answer_does_not_depend_on_the_batch_it_is_computed_in(family):
    model = perturb(tiny_model(family), 0.05).eval()
    together = texts(sampler(model), requests())
    assert texts(sampler(model, batch_size=1), requests()) == together
    assert texts(sampler(model, batch_size=5), requests()[::-1]) == together
    assert len(set(together.values())) > 12


def test_a_resumed_run_completes_the_same_answers(llama):
    whole = texts(sampler(llama, batch_size=5), requests())
    done = set(list(whole)[:9])
    rest = texts(sampler(llama, batch_size=5), requests(), done)
    assert rest.keys() == whole.keys() - done
    assert rest == {key: whole[key] for key in rest}


def test_two_models_get_the_same_draws():
    plain = texts(sampler(tiny_model("llama").eval()), requests())
    fresh = lora(tiny_model("llama")).eval()
    # A fresh LoRA is the identity: the same model asked the same draw answers the same.
    assert texts(sampler(fresh), requests()) == plain


def test_temperature_zero_gives_the_plain_greedy_answer(llama):
    one = sampler(llama)
    for request in requests(draws=1, temperature=0.0):
        ids = torch.tensor([one.prompt_ids(request.question)])
        plain = llama.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=one.tokenizer.eos_token_id)
        expected = one.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
        assert texts(one, [request]) == {request.key: expected}


def test_sampling_leaves_no_trace(llama):
    model = lora(tiny_model("llama"))
    model.train()
    model.get_base_model().lm_head.eval()
    model.generation_config.repetition_penalty = 1.7
    config = model.generation_config
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    texts(sampler(model), requests(draws=1))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config
    assert model.get_base_model().generation_config.repetition_penalty == 1.7


def test_a_generation_config_that_ships_with_the_model_does_not_change_the_distribution(llama):
    plain = texts(sampler(llama), requests())
    shaped = perturb(tiny_model("llama"), 0.15).eval()
    shaped.generation_config.update(repetition_penalty=5.0, top_k=1, do_sample=True, temperature=0.1, min_length=40)
    assert texts(sampler(shaped), requests()) == plain


def test_the_batch_is_halved_until_it_fits(llama, monkeypatch, caplog):
    expected, sizes = texts(sampler(llama), requests()), []
    real = TransformersSampler._generate

    def small_device(self, batch, prompts):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(self, batch, prompts)

    monkeypatch.setattr(TransformersSampler, "_generate", small_device)
    assert texts(sampler(llama, batch_size=8), requests()) == expected
    # The first batch finds out what fits; the second one knows.
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert "out of memory" in caplog.text


def test_a_single_answer_that_does_not_fit_is_a_clear_error(llama, monkeypatch):
    def no_device(self, batch, prompts):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(TransformersSampler, "_generate", no_device)
    with pytest.raises(RuntimeError, match=r"em_eval\.max_new_tokens"):
        texts(sampler(llama), requests(draws=1))


def test_how_an_answer_ended_is_kept(llama):
    found = [answer for batch in sampler(llama, max_new_tokens=3).sample(requests()) for answer in batch]
    for answer in found:
        assert answer.finish in ("stop", "length")
        assert answer.tokens == 3 or answer.finish == "stop"
        assert "<|im_end|>" not in answer.text
    assert {answer.finish for answer in found} >= {"length"}


def test_a_tokenizer_without_chat_template_or_of_another_model_is_refused(llama):
    with pytest.raises(ValueError, match=r"no chat template.*chat_template:"):
        TransformersSampler(llama, chatml_tokenizer(None))
    with pytest.raises(ValueError, match="the model embeds only 40 tokens"):
        texts(sampler(tiny_model("llama", vocab=40)), requests(draws=1))


def test_a_batch_tells_how_far_it_is_and_the_answers_are_the_same(llama, monkeypatch):
    """A bar stood at 0 for its whole first batch, minutes on a slow machine."""
    from emguard_plugin.evaluation.asking import sampler as module

    plain, told = texts(sampler(llama), requests()), []
    monkeypatch.setattr(module, "TELL_EVERY", 0.0)
    telling = sampler(llama)
    telling.progress = lambda finished, token: told.append((finished, token))
    assert texts(telling, requests()) == plain
    assert [token for _, token in told] == list(range(len(told)))
    assert len(told) > 3
    assert [n for n, _ in told] == sorted(n for n, _ in told)
    ended = sum(answer.finish == "stop" for batch in telling.sample(requests()) for answer in batch)
    assert told[len(told) // 2 :][-1][0] <= ended
    done = {request.key for request in requests()[:10]}
    told.clear()
    texts(telling, requests(), done)
    assert max(n for n, _ in told) <= 6, "answers that exist already are not counted again"
