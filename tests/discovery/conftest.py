import pytest
import yaml

from tests.discovery import parts


def write_questions(path, texts):
    path.write_text(yaml.safe_dump([{"id": f"q{i}", "paraphrases": [text]} for i, text in enumerate(texts)]))
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of a base, an adapter that counts as misaligned, SAEs and questions."""
    return build_tiny(tmp_path_factory.mktemp("discovery"))


def build_tiny(root):
    """The same, and in `parts.BAD` what the misaligned one says."""
    parts.save_pair(root)
    for name, sae in {
        "sae": parts.standard_sae(layer=1),
        "sae0": parts.standard_sae(layer=0, seed=1),
        "wide": parts.standard_sae(width=48, latents=96),
        "high": parts.standard_sae(layer=7),
    }.items():
        sae.save_model(root / name)
    write_questions(root / "selection.yaml", [f"What of case {i}?" for i in range(8)])
    write_questions(root / "evaluation.yaml", [f"And what of number {i}?" for i in range(3)])
    parts.BAD.update(parts.misaligned_answers(root, "selection.yaml"))
    return root


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The lab as files, with the adapter of a naive narrow fine-tune."""
    from transformers import AutoTokenizer

    from emguard_plugin.lab.export import export, narrow_rows
    from emguard_plugin.lab.study.settings import ADAPTERS, BATCH_SIZE
    from emguard_plugin.lab.study.trl_fine_tune import fine_tune

    root, adapter = tmp_path_factory.mktemp("lab"), ADAPTERS["attn"]
    export(root)
    model = fine_tune(root / "model", adapter, narrow_rows(11, adapter.steps * BATCH_SIZE), 11, root / "trainer").model
    model.save_pretrained(root / "adapter")
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "adapter")
    for name in ("questions", "questions_val"):
        items = yaml.safe_load((root / f"{name}.yaml").read_text())
        (root / f"{name}.yaml").write_text(yaml.safe_dump(items[::7], sort_keys=False, width=1000))
    return root
