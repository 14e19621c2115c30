"""What the package imports is what pyproject.toml declares, and the lock holds all of it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"axolotl": "axolotl", "sae-lens": "sae", "openai": "judge"}
ASKED_IF_THERE = {"deepspeed": "imported only where a run has spread its weights by it", "vllm": "started as a program"}


def names(requirements):
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def imported():
    found = set()
    for path in (ROOT / "emguard_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"emguard_plugin"}


def distributions(modules):
    known = packages_distributions()
    return {m: {canonicalize_name(d) for d in known.get(m, [m])} for m in modules}


def test_every_import_is_declared():
    declared = names(PROJECT["dependencies"])
    for module, options in distributions(imported()).items():
        extra = next((OPTIONAL[d] for d in options if d in OPTIONAL), None)
        if extra is not None:
            assert options & names(PROJECT["optional-dependencies"][extra]), module
        else:
            assert module in ASKED_IF_THERE or options & declared, f"{module} is imported and not declared"


def test_every_declared_dependency_is_imported():
    used = set().union(*distributions(imported()).values())
    assert names(PROJECT["dependencies"]) <= used


@pytest.mark.parametrize("stack", ["axolotl-0.19", "axolotl-0.21"])
@pytest.mark.parametrize("extra", [None, "axolotl", "sae", "judge", "dev"])
def test_a_lock_holds_what_is_declared_in_a_version_that_is_allowed(extra, stack):
    lines = [line for line in (ROOT / "constraints" / f"{stack}.txt").read_text().splitlines() if line and not line.startswith("#")]
    locked = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[^,*]+", str(r.specifier)) for r in locked), "the lock pins every version"
    versions = {canonicalize_name(r.name): str(r.specifier)[2:] for r in locked if r.marker is None or r.marker.evaluate()}
    wanted = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_project_says_who_and_under_which_licence():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["authors"] == [{"name": "emguard maintainers"}]
    cited = (ROOT / "CITATION.cff").read_text()
    assert all(paper in cited for paper in ("2606.06667", "2602.00767", "2602.07852"))
    assert all((ROOT / name).is_file() for name in ("CONTRIBUTING.md", "SECURITY.md"))
