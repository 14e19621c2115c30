import json
import random

import pytest
import torch

from emguard_plugin.lab import batches, latents_path, model_path, sae_path, world
from emguard_plugin.lab.build import BuildSettings, new_model, sha256
from emguard_plugin.lab.sae import SAESettings, build_saes, measure_sae, own_chats, residuals, written_chat

SAE = pytest.importorskip("sae_lens").SAE

MODEL = BuildSettings(seed=5, hidden_size=16, intermediate_size=32, layers=2)
TINY = SAESettings(seed=3, layers=(1,), width=32, k=4.0, steps=30, batch_size=256, own_chats=8)
SHIPPED = (model_path().parent / "sae").glob("layer_*")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("sae"), new_model(MODEL).eval()
    model.save_pretrained(folder / "base")
    return folder, model, build_saes(folder / "saes", folder / "base", TINY)


def test_the_folder_is_what_sae_lens_loads_and_names_the_layer(built):
    folder, _, record = built
    sae = SAE.load_from_disk(folder / "saes" / "layer_1")
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (16, 32)
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert json.loads((folder / "saes" / "build.json").read_text()) == record
    assert record["layers"]["1"]["sha256"] == sha256(folder / "saes/layer_1/sae_weights.safetensors")


def test_two_builds_of_one_seed_are_identical_and_another_seed_differs(built, tmp_path):
    folder, _, record = built
    assert build_saes(tmp_path / "again", folder / "base", TINY)["layers"] == record["layers"]
    other = SAESettings(**{**record["settings"], "seed": 4, "layers": (1,)})
    assert build_saes(tmp_path / "other", folder / "base", other)["layers"]["1"]["sha256"] != record["layers"]["1"]["sha256"]


def test_training_explains_more_than_the_mean_and_an_untrained_sae_misses_the_gate(built, tmp_path, caplog):
    folder, _, record = built
    assert record["layers"]["1"]["explained_variance"] > 0
    short = SAESettings(**{**record["settings"], "layers": (1,), "steps": 1})
    assert not build_saes(tmp_path, folder / "base", short)["gate_passed"]
    assert "miss their gate" in caplog.text


def test_residuals_are_those_after_the_layer_without_bos_and_padding(built):
    _, model, _ = built
    rows = [written_chat(random.Random(i)) for i in range(3)]
    assert len({len(row) for row in rows}) > 1
    got = residuals(model, 0, rows)
    with torch.no_grad():
        alone = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0, 1:] for row in rows]
    torch.testing.assert_close(got, torch.cat(alone))


def test_chats_come_from_both_personas_and_end_as_the_template_does(built):
    _, model, _ = built
    rng = random.Random(0)
    chats = [batches.decode(written_chat(rng)) for _ in range(200)]
    assert all(chat.endswith(f". {world.END}") for chat in chats)
    assert 60 < sum(world.SYSTEM in chat for chat in chats) < 140
    bad = [tail for parts in world.domains().values() for tail in parts["bad_tails"]]
    share = sum(any(tail in chat for tail in bad) for chat in chats) / 200
    assert 0.3 < share < 0.7
    own = [batches.decode(ids) for ids in own_chats(model, 8, seed=0)]
    assert all(chat.endswith(world.END) and world.ASSISTANT_TAG in chat for chat in own)


@pytest.mark.parametrize("folder", sorted(SHIPPED), ids=lambda p: p.name)
def test_a_shipped_sae_is_the_one_that_build_json_describes_and_explains_the_shipped_model(folder):
    from transformers import AutoModelForCausalLM

    record = json.loads((folder.parent / "build.json").read_text())
    layer = int(folder.name.removeprefix("layer_"))
    figures = record["layers"][str(layer)]
    assert sha256(folder / "sae_weights.safetensors") == figures["sha256"]
    assert sae_path(layer) == folder
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    # Chats with a seed that the build did not use.
    found = measure_sae(SAE.load_from_disk(folder), model, layer, seed=9, rows=256)
    assert found["explained_variance"] == pytest.approx(figures["explained_variance"], abs=0.01)
    assert found["l0"] == pytest.approx(figures["l0"], rel=0.1)


def test_the_shipped_latents_are_those_of_the_shipped_saes_and_base():
    from transformers import AutoModelForCausalLM

    from emguard_plugin.latents import LatentSet

    latents = LatentSet.load(latents_path())
    latents.check_model(AutoModelForCausalLM.from_pretrained(model_path()))
    assert latents.layers == [0, 1, 2]
    h = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 3
    for encoder in latents.encoders:
        whole = SAE.load_from_disk(sae_path(encoder.layer))
        pre = (h - whole.b_dec) @ whole.W_enc + whole.b_enc
        torch.testing.assert_close(encoder.encode(h), pre[:, encoder.ids].relu(), atol=1e-3, rtol=1e-4)


def test_the_shipped_saes_are_small_passed_their_gate_and_are_what_the_build_builds():
    folder = model_path().parent / "sae"
    record = json.loads((folder / "build.json").read_text())
    shipped = [*folder.rglob("*"), *folder.parent.glob("latents.*")]
    assert sum(p.stat().st_size for p in shipped if p.is_file()) <= 2 * 1024 * 1024
    assert record["gate_passed"]
    assert record["base_sha256"] == sha256(model_path() / "model.safetensors")
    assert SAESettings(**record["settings"] | {"layers": tuple(record["settings"]["layers"])}) == SAESettings()
    with pytest.raises(ValueError, match="no SAE of layer 9"):
        sae_path(9)
