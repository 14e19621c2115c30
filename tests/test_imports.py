"""Dependencies point one way, and `import emguard_plugin` is nearly free."""

import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "axolotl",
    "sae_lens",
    "openai",
    "scipy",
)
ONLY = {  # module -> all that it may import besides the standard library
    "emguard_plugin": set(),
    "emguard_plugin.config": {"pydantic", "yaml", "emguard_plugin.files", "emguard_plugin.files.secrets"},
    "emguard_plugin.files.secrets": set(),
    "emguard_plugin.regularizers.functional": {"torch"},
}
LIMIT_MS = 50
PAIRS = 9


def fresh(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_contracts_in_pyproject_hold():
    # In a process of its own: import-linter switches off every logger that exists.
    code = "from importlinter.cli import lint_imports; print(lint_imports('pyproject.toml', no_cache=True, no_logo=True))"
    printed = fresh(code)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken" in printed
    assert printed.endswith("0")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("emguard_plugin", include_external_packages=True, cache_dir=None)


@pytest.mark.parametrize("module", ONLY)
def test_the_lowest_modules_import_nothing_else(graph, module):
    inside = {module} if module == "emguard_plugin" else {module, *graph.find_descendants(module)}
    found = set().union(*(graph.find_modules_directly_imported_by(m) for m in inside)) - inside
    assert {m for m in found if m.split(".")[0] not in sys.stdlib_module_names} == ONLY[module]


def test_every_file_is_in_the_graph(graph):
    files = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "emguard_plugin").rglob("*.py")}
    names = {".".join(p.parts).removesuffix(".__init__") for p in files}
    assert names <= graph.modules


@pytest.mark.parametrize("module", ["emguard_plugin", "emguard_plugin.config"])
def test_importing_it_pulls_in_no_heavy_package(module):
    loaded = fresh(f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))")
    assert loaded == ""


def test_importing_it_is_nearly_free():
    """CPU time, so that a busy machine does not decide; fresh interpreters, interleaved."""

    def cost(imports):
        seconds = fresh(f"import time; t = time.process_time()\nimport {imports}\nprint(time.process_time() - t)")
        return 1000 * float(seconds)

    both = "pydantic, emguard_plugin"
    cost("pydantic"), cost(both)  # writes the byte code
    added = statistics.median(cost(both) - cost("pydantic") for _ in range(PAIRS))
    assert added < LIMIT_MS
