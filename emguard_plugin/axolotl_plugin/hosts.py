"""What differs between the versions of Axolotl, each with the version that ends it. Needs no axolotl: `emguard check` asks too."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version

ENTRY_POINTS = "axolotl.plugins"
OURS = "emguard_plugin:EMGuardPlugin"
PLUGIN_NAMES = ("emguard_plugin.EMGuardPlugin", "emguard_plugin.axolotl_plugin.plugin.EMGuardPlugin")


def axolotl_version() -> tuple[int, int] | None:
    """Return the installed Axolotl's version, or None without one."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("axolotl"))
    except PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


@cache
def finds_plugins() -> bool:
    """Whether Axolotl loads us although no `plugins:` names us: from 0.21 on, by our entry point."""
    installed = axolotl_version()
    if installed is None or installed < (0, 21):
        return False
    return any(point.value.replace(" ", "") == OURS for point in entry_points(group=ENTRY_POINTS))


def skips_missing_plugins() -> bool:
    """Whether Axolotl goes on without a plugin that cannot be imported: before 0.21."""
    installed = axolotl_version()
    return installed is not None and installed < (0, 21)
