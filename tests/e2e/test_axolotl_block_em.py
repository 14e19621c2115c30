"""`axolotl train` with BLOCK-EM on a model of three layers, in every mode that a CPU can run."""

import pytest
import torch

from tests.e2e.axolotl_runs import Failed, read_log, train
from tests.e2e.test_axolotl_train import MODES, assert_same_bits
from tests.e2e.tiny_run import column, tiny_yaml, treft, write_rows
from tests.regularizers.block_em_parts import latent_set
from tests.tiny import chatml_tokenizer, tiny_model
from tests.trl_runs import uneven_rows

LOG = "em_regularizer/block_em"
ROUNDED = ("DoRA", "PiSSA", "modules to save", "8 bit")  # where the base is not the very same arithmetic
NOT_HERE = ("ReLoRA", "NEFTune")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    model = tiny_model("llama", vocab=len(chatml_tokenizer()))
    return str(latent_set(model, layers=(0, 1)).save(tmp_path_factory.mktemp("latents") / "latents.json"))


@pytest.fixture
def run(axolotl, tiny, tmp_path, latents):
    def go(name="run", weights=False, coef=2.0, **over):
        method = {k: over.pop(k) for k in ("tokens", "cache", "freeze_above", "k_minus") if k in over}
        block = {"em_regularizer": {"block_em": {"coef": coef, "latents": latents, **method}}}
        kwargs = {"weights": str(tmp_path / f"{name}.pt") if weights else None}
        return axolotl.call(train, tmp_path / name, tiny_yaml(tiny, **{**block, **over}), **kwargs)

    return go


@pytest.fixture(scope="module")
def plain(axolotl, tiny, tmp_path_factory, latents):
    folder = tmp_path_factory.mktemp("plain")
    block = {"em_regularizer": {"block_em": {"coef": 2.0, "latents": latents}}}
    return {**axolotl.call(train, folder, tiny_yaml(tiny, **block)), "log_text": read_log(folder)}


@pytest.mark.parametrize("mode", [m for m in MODES if m not in NOT_HERE])
def test_mode(run, plain, mode):
    over, evidence, same = MODES[mode]
    result = run(**over)
    assert result["trainer"] == "AxolotlEMGuardTrainer"
    assert evidence(result), result
    found = column(result, f"{LOG}/penalty")
    assert len(found) == 3
    assert found[0] == pytest.approx(0, abs=1e-4 if mode in ROUNDED else 1e-9)
    assert all(1e-7 < p < 100 for p in found[1:]), found
    if same:
        assert found == pytest.approx(column(plain, f"{LOG}/penalty"), rel=1e-3)
        assert column(result, "loss") == pytest.approx(column(plain, "loss"), rel=1e-3)
    parts = zip(column(result, "task_loss"), column(result, f"{LOG}/weighted"), column(result, "loss"), strict=True)
    for task, weighted, loss in parts:
        assert task + weighted == pytest.approx(loss, rel=2e-3)


def test_the_line_that_says_what_is_active(plain):
    line = "block_em (coef 2, 4 latents of K+ and 4 of K- after layers 0, 1, assistant tokens, base: adapter off"
    assert line in plain["log_text"]


@pytest.mark.parametrize("mode", ["NEFTune", "ReLoRA"])
def test_modes_that_would_be_wrong_are_refused(run, mode):
    with pytest.raises(Failed, match=r"Remove `(neftune_noise_alpha|relora)`"):
        run(**MODES[mode][0])


@pytest.mark.parametrize("cache", ["auto", "memory"])
@pytest.mark.parametrize("tokens", ["assistant", "prompt", "header"])
def test_packed_and_padded_are_one(run, tmp_path, tokens, cache):
    """The same 24 rows in one step, in one packed row or in 24 padded ones, with a model moved in the step before.

    Micro-batches are another matter: where this host averages each of them by itself, so does the penalty.
    """
    rows = write_rows(tmp_path / "rows.jsonl", uneven_rows(24))
    found = {}
    datasets = [{"path": rows, "ds_type": "json", "type": "chat_template", "field_messages": "messages",
                 "message_property_mappings": {"role": "role", "content": "content"}}]  # fmt: skip
    ways = {
        "padded": {"micro_batch_size": 24},
        "packed": {"sample_packing": True, "sequence_len": 2048, "micro_batch_size": 1, "sample_packing_sequentially": True},
    }
    for name, over in ways.items():
        settings = {"datasets": datasets, "dataset_prepared_path": f"./prepared_{name}", "max_steps": 2, "num_epochs": 2}
        settings |= {"optimizer": "sgd", "learning_rate": 5.0}  # Adam's first step is the gradient's sign, rounding errors' too
        result = run(name, tokens=tokens, cache=cache, coef=0.5, **{**settings, **over})
        found[name] = (column(result, "task_loss"), column(result, f"{LOG}/penalty"))
    assert found["packed"][0] == pytest.approx(found["padded"][0], rel=2e-3), "the tasks are the same, or this compares nothing"
    assert found["packed"][1] == pytest.approx(found["padded"][1], rel=2e-2, abs=1e-9)
    assert found["padded"][1][1] > 1e-7


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_coef_0_is_the_hosts_own_run_bit_for_bit(run, tmp_path, kind):
    over = {"adapter": None, "learning_rate": 0.002} if kind == "full" else {}
    run("without", weights=True, em_regularizer=None, **over)
    run("measured", weights=True, coef=0.0, **over)
    assert_same_bits(*(torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("without", "measured")))


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    for kind, over in {"lora": {}, "full": {"adapter": None, "learning_rate": 0.002}}.items():
        whole = run(f"{kind}_whole", weights=True, **saved, **over)
        checkpoint = str(tmp_path / f"{kind}_whole" / "out" / "checkpoint-2")
        resumed = run(f"{kind}_resumed", weights=True, resume_from_checkpoint=checkpoint, **saved, **over)
        assert column(resumed, f"{LOG}/penalty")[-2:] == pytest.approx(column(whole, f"{LOG}/penalty")[-2:], rel=1e-5)
        assert_same_bits(*(torch.load(tmp_path / f"{kind}_{n}.pt", weights_only=True) for n in ("whole", "resumed")))


def test_freeze_above(run, tmp_path):
    free = run("free", weights=True)
    frozen = run("frozen", weights=True, freeze_above=True)
    assert column(free, f"{LOG}/penalty")[1] > 0
    assert column(frozen, f"{LOG}/penalty")[1] > 0
    above = [n for n in torch.load(tmp_path / "frozen.pt", weights_only=True) if ".layers.2." in n and "lora_B" in n]
    trained = torch.load(tmp_path / "frozen.pt", weights_only=True)
    assert above
    assert all(not trained[n].any() for n in above)


def test_with_treft(run, latents):
    block = {"em_regularizer": {**treft()["em_regularizer"], "block_em": {"latents": latents}}}
    result = run(gradient_checkpointing=True, **block)
    assert column(result, f"{LOG}/penalty")[1] > 0
    assert column(result, "em_regularizer/treft/penalty")[1] > 0
    assert column(result, f"{LOG}/coef")[0] == pytest.approx(25.0)


def test_prompt_tokens_where_everything_is_supervised(run, tmp_path):
    """The case `prompt-empty`."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"Say {i}", "output": f"It is {i}"} for i in range(24)])
    over = {
        "datasets": [{"path": rows, "ds_type": "json", "type": "alpaca"}],
        "sequence_len": 512,
        "dataset_prepared_path": str(tmp_path / "prepared"),
    }
    with pytest.raises(Failed, match=r"`tokens: prompt` holds no token of the first 24 training rows.*`train_on_inputs: false`"):
        run(tokens="prompt", train_on_inputs=True, **over)


def test_a_missing_latent_set_stops_the_run_before_it_starts(run):
    with pytest.raises(Failed, match=r"block_em\.latents: \./no\.json` does not exist"):
        run(em_regularizer={"block_em": {"latents": "./no.json"}})
