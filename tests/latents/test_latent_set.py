"""The file: round trip, hash, and the models that it is not for."""

import json
import subprocess
import sys

import pytest
import torch

from emguard_plugin.latents import LatentsError, LatentSet
from emguard_plugin.latents.sae import subset
from tests.latents.parts import random_sae, small_set
from tests.tiny import lora, tiny_model

CALIBRATION = {"penalty": {"assistant": 0.5, "all": 2.0, "prompt": 1.5, "header": 0.25}, "task_loss_gap": 1.25}


@pytest.fixture
def saved(llama, tmp_path):
    latents = small_set(
        llama, layers=(0, 1), calibration=CALIBRATION, provenance={"judge": "exact"}, scores=[{"layer": 0, "id": 3, "sign": 1}]
    )
    return latents, latents.save(tmp_path / "out" / "latents.json")


@pytest.mark.parametrize(("kind", "mode"), [("standard", "relu_pre"), ("jumprelu", "sae"), ("gated", "sae"), ("topk", "sae")])
def test_round_trip(kind, mode, llama, tmp_path):
    latents = small_set(llama, layers=(0, 2), kind=kind, mode=mode)
    loaded = LatentSet.load(latents.save(tmp_path / "latents.json"))
    h = torch.randn(40, 32)
    for a, b in zip(latents.encoders, loaded.encoders, strict=True):
        assert all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())
        # The same numbers at another place in memory: some BLAS take another path there, and round otherwise.
        torch.testing.assert_close(a.encode(h), b.encode(h))
        assert (a.settings(), a.layer) == (b.settings(), b.layer)
        assert torch.equal(a.directions, b.directions)
    assert loaded.layers == [0, 2]
    assert len(loaded) == 6
    assert loaded.digest == latents.digest


def test_everything_else_survives(saved):
    latents, path = saved
    loaded = LatentSet.load(path)
    for name in ("calibration", "provenance", "scores", "width", "shape", "fingerprint", "model"):
        assert getattr(loaded, name) == getattr(latents, name)


def test_loading_imports_no_sae_lens(saved):
    code = (
        "import sys; from emguard_plugin.latents import LatentSet; import torch; s = LatentSet.load(sys.argv[1]);"
        "s.encoders[0].encode(torch.ones(2, 32)); assert not {'sae_lens', 'transformer_lens'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(saved[1])], check=True, timeout=240)


def test_a_changed_description_is_refused(saved):
    path = saved[1]
    stated = json.loads(path.read_text())
    stated["layers"][0]["signs"][0] *= -1
    path.write_text(json.dumps(stated))
    with pytest.raises(LatentsError, match="it was changed"):
        LatentSet.load(path)


def test_changed_columns_are_refused(saved):
    columns = saved[1].with_suffix(".safetensors")
    data = bytearray(columns.read_bytes())
    data[-3] ^= 1
    columns.write_bytes(bytes(data))
    with pytest.raises(LatentsError, match="does not match its hash"):
        LatentSet.load(saved[1])
    columns.unlink()
    with pytest.raises(LatentsError, match="belong beside the JSON"):
        LatentSet.load(saved[1])


@pytest.mark.parametrize(
    ("text", "message"), [(None, "there is no latent set"), ("{", "is not JSON"), ("5", "no latent set"), ('{"a": 1}', "no latent set")]
)
def test_no_such_file_or_another(text, message, tmp_path):
    path = tmp_path / "latents.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LatentsError, match=message):
        LatentSet.load(path)


def test_the_model_it_was_found_on(saved, llama):
    latents = LatentSet.load(saved[1])
    latents.check_model(llama)
    latents.check_model(lora(llama))
    latents.check_model(tiny_model("llama", vocab=llama.config.vocab_size).bfloat16())
    resized = tiny_model("llama", vocab=llama.config.vocab_size)
    resized.resize_token_embeddings(llama.config.vocab_size + 7)
    latents.check_model(resized)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, "hidden size is 64"),
        ({"num_hidden_layers": 1}, "layers 0 to 0"),
        ({"num_hidden_layers": 5}, "num_hidden_layers 3 there, 5 here"),
        ({"family": "qwen2"}, "model_type llama there, qwen2 here"),
        ({"seed": 4}, "another checkpoint of the same shape"),
    ],
)
def test_other_models(other, message, saved, llama):
    with pytest.raises(LatentsError, match=message):
        LatentSet.load(saved[1]).check_model(tiny_model(vocab=llama.config.vocab_size, **other))


def test_layers_and_widths_must_fit(llama):
    a, b = (subset(random_sae(width=w, seed=w), [1], [1]) for w in (32, 16))
    with pytest.raises(LatentsError, match="one encoder per layer"):
        LatentSet.for_model(llama, [a, a])
    with pytest.raises(LatentsError, match="width 16"):
        LatentSet.for_model(llama, [b])
    with pytest.raises(LatentsError, match="empty"):
        LatentSet.for_model(llama, [])
    with pytest.raises(LatentsError, match=r"`\.json` file"):
        LatentSet.for_model(llama, [a]).save("latents.txt")
