"""A method has one home: a fourth one is its folder, its block and one line in the table, with nothing else changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emguard_plugin.lab.export import export

ROOT = Path(__file__).parents[2]
CALLBACK = '''
"""Holds the size of the first trained weight."""

from emguard_plugin.regularizers.base import EMRegularizerCallback
from emguard_plugin.regularizers.penalty import Penalty


class ToyCallback(EMRegularizerCallback):
    name = "toy"

    def __init__(self, coef=0.5, size=1.0, cache="memory"):
        super().__init__(coef)
        self.size, self.cache = size, cache

    def prepare(self, run):
        self.prepared = True
        return f"toy (coef {self.coef:g}, size {self.size:g})"

    def penalty(self, moment):
        weight = next(p for p in moment.model.parameters() if p.requires_grad)
        return Penalty((weight.float().square().sum() - self.size).square())
'''
PREVIEW = '''
"""What the toy would hold."""

from emguard_plugin.regularizers.preview import Preview


class ToyPreview(Preview):
    def preview(self, block, facts):
        facts.findings.active.append(f"toy: size {block.size:g}, {facts.number_of_layers()} layers")

    def conflicts(self, block, cfg):
        return ["`flash_attention` and `toy` do not go together. Remove one."] if cfg.get("flash_attention") else []
'''
BLOCK = '''


class ToyConfig(MethodBlock):
    """`em_regularizer.toy`."""

    coef: float = Field(0.5, ge=0, allow_inf_nan=False, description="lambda.")
    size: float = Field(1.0, gt=0, description="Of the weight.")
    cache: str = Field("memory", description="A folder.")

    def folders(self) -> dict[str, str]:
        return {} if self.cache == "memory" else {"cache": self.cache}
'''
LINE = '        Method("toy", ToyConfig, "the size of a weight", "toy.callback:ToyCallback", "toy.preview:ToyPreview"),\n'


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The package with a fourth method: two new files, its block, one line."""
    folder = tmp_path_factory.mktemp("house")
    package = folder / "emguard_plugin"
    shutil.copytree(ROOT / "emguard_plugin", package, ignore=shutil.ignore_patterns("__pycache__"))
    toy = package / "regularizers" / "toy"
    toy.mkdir()
    for name, text in (("__init__", ""), ("callback", CALLBACK), ("preview", PREVIEW)):
        (toy / f"{name}.py").write_text(text)
    blocks, table = package / "config" / "regularizers.py", package / "config" / "methods.py"
    blocks.write_text(blocks.read_text() + BLOCK)
    text = table.read_text()
    text = text.replace(
        "import BlockEMConfig, KLConfig, MethodBlock, TReFTConfig", "import BlockEMConfig, KLConfig, MethodBlock, ToyConfig, TReFTConfig"
    )
    at = text.index("    )\n}\n")
    table.write_text(text[:at] + LINE + text[at:])
    export(folder / "lab")
    return folder


def call(house, *command, code=None):
    env = {**os.environ, "PYTHONPATH": str(house), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["-c", code] if code else ["-m", "emguard_plugin.cli", *command]
    return subprocess.run([sys.executable, *arguments], cwd=house, env=env, capture_output=True, text=True, timeout=600)


def check(house, block, **host):
    (house / "run.yaml").write_text(
        yaml.safe_dump(
            {"base_model": "lab/model", "adapter": "lora", "plugins": ["emguard_plugin.EMGuardPlugin"], "em_regularizer": block, **host}
        )
    )
    return call(house, "check", "run.yaml")


def test_its_block_is_validated_and_a_wrong_key_named(house):
    assert check(house, {"toy": {"size": 2}}).returncode == 0
    wrong = check(house, {"toy": {"sise": 2}})
    assert wrong.returncode == 4
    assert "em_regularizer.toy: unknown key 'sise'. Did you mean 'size'? Allowed here: coef, size, cache." in wrong.stderr
    near = check(house, {"toi": {}})
    assert "unknown key 'toi'. Did you mean 'toy'? Allowed here: treft, block_em, kl, toy." in near.stderr
    empty = check(house, {"toy": None})
    assert "`toy:` is empty; write `toy: {}`" in empty.stderr


def test_check_asks_it_and_reports_its_conflicts(house):
    done = check(house, {"toy": {"size": 2}})
    assert "active   toy: size 2, 4 layers" in done.stdout
    conflict = check(house, {"toy": {}}, flash_attention=True)
    assert conflict.returncode == 4
    assert "`flash_attention` and `toy` do not go together" in conflict.stderr


def test_it_may_not_share_a_folder_with_another_method(house):
    done = check(house, {"toy": {"cache": "./one"}, "kl": {"cache": "./one"}})
    assert done.returncode == 4
    assert "`kl.cache` and `toy.cache` are one folder, ./one. Give each method its own." in done.stderr


def test_axolotls_schema_takes_it(house):
    code = (
        "from emguard_plugin.axolotl_plugin.args import EMGuardArgs\n"
        "from emguard_plugin.regularizers import build_regularizers\n"
        "args = EMGuardArgs.model_validate({'em_regularizer': {'toy': {'size': 3}, 'treft': {}}})\n"
        "print([(type(c).__name__, getattr(c, 'size', None)) for c in build_regularizers(args.em_regularizer)])"
    )
    assert call(house, code=code).stdout.strip() == "[('TReFTCallback', None), ('ToyCallback', 3.0)]"


def test_the_trainer_trains_with_it(house):
    (house / "sft.yaml").write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": "lab/model", "dataset_name": "json", "datasets": [{"path": "json", "data_files": "lab/train.jsonl"}],
                "output_dir": "out", "max_steps": 3, "per_device_train_batch_size": 4, "use_peft": True, "bf16": False, "use_cpu": True,
                "report_to": "none", "logging_steps": 1, "gradient_checkpointing": False, "em_regularizer": {"toy": {"coef": 1e-3, "size": 2.0}},
            }
        )
    )  # fmt: skip
    done = call(house, "sft", "--config", "sft.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "em_regularizer active: toy (coef 0.001, size 2)" in done.stdout
    for name in ("penalty", "coef", "weighted"):
        assert f"em_regularizer/toy/{name}" in done.stdout


def test_no_room_but_its_own_names_a_method():
    """Outside the methods' folders, the table and the blocks, only errors and docstrings of what one method alone uses say its name."""
    import ast

    package = ROOT / "emguard_plugin"
    home = (
        "regularizers/treft/",
        "regularizers/block_em/",
        "regularizers/kl/",
        "config/",
        "lab/",
        "discovery/",
        "demo.py",
        "cli/discover.py",
    )
    found = set()
    for path in package.rglob("*.py"):
        place = str(path.relative_to(package))
        if place.startswith(home):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            literal = isinstance(node, ast.Constant) and node.value in ("treft", "block_em", "kl")
            attribute = isinstance(node, ast.Attribute) and node.attr in ("treft", "block_em", "kl")
            if literal or attribute:
                found.add(f"{place}:{node.lineno}")
    assert found == set()
