"""Parts of the discovery tests: benches whose answers are a formula, tiny models and SAEs."""

import hashlib

import torch

from emguard_plugin.discovery.bench import UNSTEERED
from emguard_plugin.discovery.shift import Candidate
from emguard_plugin.evaluation.asking.pair import BASE_MODEL, MISALIGNED_MODEL, ModelPair
from emguard_plugin.evaluation.asking.questions import load_questions
from emguard_plugin.evaluation.asking.sampler import Request, TransformersSampler
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model

SMALL_SEARCH = [
    "--pool", "12", "--shortlist", "5", "--size", "4", "--rule", "repair", "--strengths", "0.2,0.4,0.8,1.6", "--induce", "0.8",
    "--repair", "0.8", "--max-new-tokens", "6",
]  # fmt: skip
"""Options of a search on the tiny models that finds something in seconds."""


def save_pair(root):
    """Save a base and an adapter that counts as misaligned, each with its tokenizer."""
    tokenizer = chatml_tokenizer()
    base = perturb(tiny_model("llama", vocab=len(tokenizer)), 0.15)
    base.save_pretrained(root / "base")
    adapter = lora(type(base).from_pretrained(root / "base"))
    adapter.peft_config["default"].base_model_name_or_path = str(root / "base")
    perturb(adapter, 0.1).save_pretrained(root / "adapter")
    for name in ("base", "adapter"):
        tokenizer.save_pretrained(root / name)


def misaligned_answers(root, suite, lengths=(6,)):
    """Return what the misaligned model says unsteered: the judge of these tests calls that bad."""
    pair = ModelPair(root / "adapter")
    asked = [Request("s", question, 0, 0.0) for question in load_questions(root / suite)]
    with pair.use(MISALIGNED_MODEL) as model:
        samplers = [TransformersSampler(model, pair.tokenizer, max_new_tokens=length) for length in lengths]
        return {answer.text for sampler in samplers for batch in sampler.sample(asked) for answer in batch}


def hashed(*parts):
    """A number from 0 to 1 that looks random and is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") / 2**32


class ToyBench:
    """Latents with a hidden power and a hidden breaking point; each prompt has thresholds of its own."""

    def __init__(self, latents=40, causal=6, noise=0):
        self.power = {str(i): (0.9 - 0.08 * i if i < causal else 0.02) for i in range(latents)}
        self.bears = {str(i): 0.25 + 0.5 * hashed("bears", i) for i in range(latents)}
        self.sign = {str(i): 1 if i % 2 else -1 for i in range(latents)}
        self.noise, self.asked = noise, {}

    def pool(self):
        return [Candidate(int(i), self.sign[i] * (1 + hashed("delta", i)), self.sign[i]) for i in self.power]

    def ask(self, asks):
        asks = list(asks)
        self.asked.update((ask, self._outcome(ask)) for ask in asks if ask not in self.asked)
        return {ask: self.asked[ask] for ask in asks}

    def _outcome(self, ask):
        easy = hashed("prompt", ask.prompt)
        if ask.steer == UNSTEERED:
            return "aligned" if ask.role == BASE_MODEL else "misaligned"
        size, way = abs(ask.alpha), (1 if ask.alpha > 0 else -1) * self.sign[ask.steer]
        if size > self.bears[ask.steer] * (1 + 0.5 * hashed("break", ask.steer, ask.prompt, self.noise * size)):
            return "incoherent"
        pushed = size * 2 * self.power[ask.steer] * (way if ask.role == BASE_MODEL else -way) > easy
        return {True: "misaligned", False: "aligned"}[pushed if ask.role == BASE_MODEL else not pushed]


def standard_sae(width=32, latents=64, layer=1, seed=0, weights=None):
    """A sae-lens SAE; by default one that reconstructs exactly: rows +-identity, ReLU, no bias."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    about = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name="tiny")
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=latents, apply_b_dec_to_input=False, metadata=about))
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
    both = torch.cat([turn, -turn]) if weights is None else weights
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


BAD = set()
"""Answers that `says_what_the_misaligned_says` calls misaligned; the fixture `tiny` fills it."""


def says_what_the_misaligned_says(question, answer):
    return {"aligned": 0 if answer in BAD else 100, "coherent": 0 if hashed(answer) < 0.05 else 100}


def never_coherent(question, answer):
    return {"aligned": None, "coherent": 0}


def never_misaligned(question, answer):
    return {"aligned": 100, "coherent": 100}


def nobody_there(question, answer):
    raise ConnectionError("nobody there")


def not_a_number(question, answer):
    return {"aligned": float("nan"), "coherent": 100}


def out_of_range(question, answer):
    return {"aligned": -5, "coherent": 100}


def true_and_text(question, answer):
    return {"aligned": True, "coherent": "100"}
