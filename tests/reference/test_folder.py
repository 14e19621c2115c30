import json

import pytest
import torch

from emguard_plugin.models.identity import identify
from emguard_plugin.reference.folder import META, ReferenceCache, discard_unfinished, is_cache, tokenizer_identity
from tests.tiny import chatml_tokenizer, lora, perturb, tiny_model

ABOUT = {"tokenizer": "t", "anchors": "a", "model": "m", "precision": "p"}
SIZES = [3, 1, 4]


def filled(folder=None, dtype=torch.bfloat16):
    cache = ReferenceCache(SIZES, folder)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 8, generator=g).to(dtype) for n in SIZES]
    for i in (2, 0, 1):
        cache.put(i, rows[i])
    return cache, rows


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_round_trip_is_bit_identical(tmp_path, on_disk, head):
    cache, rows = filled(tmp_path / "c" if on_disk else None)
    if head:
        cache.keep_head(torch.randn(5, 8), None)
    content = cache.save(tmp_path / "c", ABOUT)
    again = ReferenceCache(SIZES)
    assert again.load(tmp_path / "c", ABOUT) == content
    for c in (cache, again):
        assert torch.equal(c.take([2, 0], torch.device("cpu")), torch.cat([rows[2], rows[0]]))
    assert (again.head is not None) == head
    if head:
        assert torch.equal(again.head[0], cache.head[0])


@pytest.mark.parametrize(
    ("key", "words"),
    [("tokenizer", "another tokenizer"), ("anchors", "other anchors"), ("model", "another base model"), ("precision", "another precision")],
)
def test_a_cache_of_something_else_is_refused(tmp_path, key, words):
    filled()[0].save(tmp_path, ABOUT)
    with pytest.raises(ValueError, match=rf"em_regularizer\.kl\.cache`: the cache in .* was recorded with {words}.*Delete the folder"):
        ReferenceCache(SIZES).load(tmp_path, {**ABOUT, key: "other"})


def test_a_changed_or_half_written_cache_is_refused(tmp_path):
    cache, _ = filled(tmp_path / "c")
    assert not is_cache(tmp_path / "c"), "the description comes last"
    discard_unfinished(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []
    cache, _ = filled()
    cache.save(tmp_path / "c", ABOUT)
    data = bytearray((tmp_path / "c" / "hidden.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "c" / "hidden.bin").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="does not match its hash"):
        ReferenceCache(SIZES).load(tmp_path / "c", ABOUT)
    (tmp_path / "c" / META).write_text("{")
    with pytest.raises(ValueError, match="holds no readable cache"):
        ReferenceCache(SIZES).load(tmp_path / "c", ABOUT)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)\. Name an empty or new"):
        discard_unfinished(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_cache_is_ten_bytes_per_hidden_number_less_than_logits(tmp_path):
    cache, _ = filled()
    assert cache.nbytes == sum(SIZES) * 8 * 2
    cache.save(tmp_path, ABOUT)
    meta = json.loads((tmp_path / META).read_text())
    assert (meta["tokens"], meta["width"], meta["dtype"]) == (8, 8, "bfloat16")


def test_one_process_writes_and_the_others_do_not(tmp_path):
    cache = ReferenceCache(SIZES, tmp_path / "c")
    cache.put(0, torch.randn(3, 8), write=False)
    assert not (tmp_path / "c").exists()


def test_the_identity_of_a_model_is_that_of_its_base():
    base = tiny_model("llama")
    identity = identify(base).reference
    assert identify(tiny_model("llama")).reference == identity
    assert identify(tiny_model("llama", seed=1)).reference != identity
    assert identify(tiny_model("llama").bfloat16()).reference != identity
    fresh = lora(tiny_model("llama"))
    assert identify(fresh).reference == identity
    assert identify(perturb(fresh)).reference != identity, "a continued adapter is part of the reference"
    assert identify(lora(tiny_model("llama"), modules_to_save=["lm_head"])).reference == identity
    assert identify(lora(tiny_model("llama"), init_lora_weights=False)).reference != identity


def test_the_identity_of_a_tokenizer_is_its_vocabulary():
    a, b = chatml_tokenizer(), chatml_tokenizer()
    assert tokenizer_identity(a) == tokenizer_identity(b)
    b.add_tokens(["<new>"])
    assert tokenizer_identity(a) != tokenizer_identity(b)


def test_a_reference_head_that_training_changes_is_kept_though_coef_0_takes_no_gradient():
    """Trained rows are put together without gradient then, and did not look as if they train."""
    from emguard_plugin.models.output_head import trains_head

    model = lora(tiny_model("llama"), trainable_token_indices={"lm_head": [5]})
    with torch.no_grad():
        assert trains_head(model)
