"""The wheel, not only an editable install, carries all that the package needs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def call(*command, **kwargs):
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def tracked(*folders):
    """Files that git tracks in these folders of the checkout."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a git checkout")
    return set(call("git", "ls-files", "-z", *folders, cwd=ROOT).rstrip("\0").split("\0"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    call(*PIP, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run Python against the installed wheel, away from the checkout."""
    target = tmp_path_factory.mktemp("installed")
    call(*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)

    def run(*args):
        away = tmp_path_factory.mktemp("away")
        return call(sys.executable, *args, cwd=away, env={**os.environ, "PYTHONPATH": str(target)}).strip()

    run.target = target
    return run


def test_the_wheel_has_every_tracked_file_of_the_package(names):
    files = {f for f in tracked("emguard_plugin") if (ROOT / f).is_file()}
    data = {f for f in files if not f.endswith(".py")}
    assert {
        "emguard_plugin/pages/templates/page.css",
        "emguard_plugin/evaluation/report/templates/report.html.jinja",
        "emguard_plugin/lab/domains.yaml",
    } <= data
    assert files <= names, sorted(files - names)


def test_the_wheel_has_the_example_yamls(names):
    yamls = {f"emguard_plugin/{f}" for f in tracked("example_yamls")}
    assert {"emguard_plugin/example_yamls/lab_naive.yaml", "emguard_plugin/example_yamls/lab_treft.yaml"} <= yamls
    assert yamls <= names, sorted(yamls - names)


def test_the_wheel_has_nothing_else(names):
    assert {n.split("/")[0].split("-")[0] for n in names} == {"emguard_plugin"}
    assert not [n for n in names if "__pycache__" in n]


def test_the_installed_wheel_is_what_is_imported(installed):
    code = "import emguard_plugin, emguard_plugin.config as c; print(emguard_plugin.__file__, c.TReFTConfig().coef)"
    path, coef = installed("-c", code).split()
    assert Path(path).is_relative_to(installed.target)
    assert float(coef) == 5.0


def test_the_installed_wheel_brings_the_lab_model(installed):
    code = (
        "from emguard_plugin.lab import model_path, world\n"
        "from safetensors.numpy import load_file\n"
        "p = model_path()\n"
        "print(p, len(load_file(p / 'model.safetensors')), len(world.domains()))"
    )
    path, tensors, domains = installed("-c", code).split()
    assert Path(path).is_relative_to(installed.target)
    assert int(tensors) > 10
    assert int(domains) > 3
    assert {f.name for f in Path(path).iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_the_installed_command_line_answers(installed):
    shown = installed("-m", "emguard_plugin.cli", "--help")
    for command in ("check", "sft", "eval", "lab"):
        assert command in shown
    assert installed("-c", "from importlib.metadata import version; print(version('emguard-plugin'))")


def test_the_container_copies_what_is_there():
    steps = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for step in steps if step.startswith("COPY ") and "--from" not in step for word in step.split()[1:-1]]
    assert len(copied) > 4
    assert not [path for path in copied if not (ROOT / path).exists()]
