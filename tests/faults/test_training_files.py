"""state-garbage: every file of ours that training reads, faulty in every way: one sentence with its name, or no difference at all."""

import json
import shutil

import pytest
import torch

from emguard_plugin import BlockEMCallback, KLCallback, TReFTCallback
from emguard_plugin.latents import LatentSet
from emguard_plugin.regularizers.kl.reference import FOLDER
from tests.faults.training_files import MUTATIONS, cases
from tests.regularizers.block_em_parts import latent_set
from tests.regularizers.kl_parts import write_anchors
from tests.regularizers.test_block_em import measured, padded, rows, run_of
from tests.tiny import chatml_tokenizer, perturb, tiny_model

CHECKPOINT = "out/checkpoint-1"
FILES = [
    f"{CHECKPOINT}/emguard_treft.safetensors", f"{CHECKPOINT}/emguard_kl.json", f"{CHECKPOINT}/emguard_block_em.json",
    f"out/{FOLDER}/reference.json", f"out/{FOLDER}/hidden.bin", f"out/{FOLDER}/head.safetensors",
    "out/emguard_block_em/rows", "latents.json", "latents.safetensors",
]  # fmt: skip


class Fixture:
    """A full fine-tune with all three methods, one step old, and another run of the same shape on another model."""

    def __init__(self, folder):
        self.tokenizer, self.folder = chatml_tokenizer(), folder
        self.rows = rows(self.tokenizer)
        self.batch = padded(self.rows)
        self.anchors = write_anchors(folder / "anchors.jsonl")
        self.models = {name: self.model(name) for name in ("run", "other")}
        self.trained = {name: perturb(self.model(name), 0.05).train() for name in ("run", "other")}
        for name in ("run", "other"):
            path = folder / name
            path.mkdir()
            latent_set(self.models[name], seed=int(name == "other")).save(path / "latents.json")
            checkpoint = path / CHECKPOINT
            checkpoint.mkdir(parents=True)
            for c in self.callbacks(path):
                c.prepare(run_of(self.models[name], self.tokenizer, self.rows))
                measured(c, self.models[name].train(), self.batch, 0)
                c.save(checkpoint, True)
        self.want = self.resumed(folder / "run")
        assert min(self.want) > 1e-6

    def model(self, name):
        return perturb(tiny_model("llama", vocab=len(self.tokenizer), seed=int(name == "other")), 0.1)

    def callbacks(self, path):
        latents = LatentSet.load(path / "latents.json")
        return [
            TReFTCallback(coef=1.0), KLCallback(coef=1.0, ratio=1.0, anchors=self.anchors),
            BlockEMCallback(coef=1.0, latents=latents, tokens="all"),
        ]  # fmt: skip

    def resumed(self, path):
        """Resume the three of `path`; return their penalties for the trained model."""
        found = []
        for c in self.callbacks(path):
            c.prepare(run_of(self.models["run"], self.tokenizer, self.rows, resume_from=path / CHECKPOINT))
            found.append(measured(c, self.trained["run"], self.batch, 1).value.item())
        return found

    def path_of(self, run, file):
        path = self.folder / run / file
        return next(path.parent.glob("rows-*")) if file.endswith("/rows") else path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    return Fixture(tmp_path_factory.mktemp("faulty"))


ALL = list(cases(FILES))


def outcome(made, file, change):
    """Return what resuming says with one file changed: None where nothing differs."""
    path = made.path_of("run", file)
    data = path.read_bytes()
    others = {"same": made.path_of("other", file).read_bytes(), "kinds": [made.path_of("run", f).read_bytes() for f in FILES]}
    path.write_bytes(change(data, others))
    try:
        got = made.resumed(made.folder / "run")
    except (ValueError, RuntimeError, OSError) as exc:
        return exc
    finally:
        path.write_bytes(data)
    return None if got == made.want else AssertionError(f"other numbers: {got} instead of {made.want}")


@pytest.mark.parametrize("file", FILES)
def test_a_faulty_file_is_named_in_one_sentence_or_changes_nothing(made, file):
    assert len(ALL) == len(FILES) * len(MUTATIONS) >= 140
    refused, wrong = 0, []
    for name, kind, change in ALL:
        if name != file:
            continue
        found = outcome(made, file, change)
        if found is None:
            continue
        refused += 1
        said, path = str(found), made.path_of("run", file)
        plain = type(found) in (ValueError, RuntimeError, OSError) or type(found).__name__ in ("Damaged", "LatentsError")
        if not plain or "\n" in said or not (str(path) in said or str(path.parent) in said) or len(said) > 900:
            wrong.append(f"{kind}: {type(found).__name__}: {said[:600]}")
    assert wrong == []
    assert refused >= len(MUTATIONS) - 3, "hardly any of these can be harmless"


def test_a_faulty_checkpoint_is_not_repaired_behind_ones_back(made):
    """Nothing is deleted or rewritten by what was refused."""
    before = {p: p.read_bytes() for p in (made.folder / "run").rglob("*") if p.is_file()}
    path = made.path_of("run", FILES[1])
    path.write_text("{")
    with pytest.raises(ValueError, match=r"emguard_kl\.json cannot be read"):
        made.resumed(made.folder / "run")
    path.write_bytes(before[path])
    assert {p: p.read_bytes() for p in (made.folder / "run").rglob("*") if p.is_file()} == before


def test_numbers_come_from_the_files(made, tmp_path):
    """The other run's files, whole, on its own model: other numbers, so the comparison above can fail."""
    copy = tmp_path / "copy"
    shutil.copytree(made.folder / "run", copy)
    assert made.resumed(copy) == made.want
    state = json.loads((copy / CHECKPOINT / "emguard_kl.json").read_text())
    assert state["base"] != json.loads((made.folder / "other" / CHECKPOINT / "emguard_kl.json").read_text())["base"]
