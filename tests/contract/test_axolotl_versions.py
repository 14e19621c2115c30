"""What is taken from the installed Axolotl's version alone."""

from importlib.metadata import EntryPoint, entry_points

import pytest

from emguard_plugin.axolotl_plugin import hosts


def test_our_entry_point_is_installed_and_names_the_plugin():
    points = [point for point in entry_points(group=hosts.ENTRY_POINTS) if point.value == hosts.OURS]
    assert points, "the installed metadata is older than pyproject.toml; install the package again"
    assert points[0].value.replace(":", ".") == hosts.PLUGIN_NAMES[0], "one name, or Axolotl would load it twice"


@pytest.mark.parametrize(
    ("installed", "points", "finds", "skips"),
    [
        ("0.19.0", [hosts.OURS], False, True),
        ("0.21.0", [hosts.OURS], True, False),
        ("0.22.0.dev1", [hosts.OURS], True, False),
        ("1.0", [hosts.OURS], True, False),
        ("0.21.0", ["other:Plugin"], False, False),
        (None, [hosts.OURS], False, False),
        ("unknown", [hosts.OURS], False, False),
    ],
)
def test_who_finds_us_and_who_skips_what_is_missing(monkeypatch, installed, points, finds, skips):
    def version(name):
        if installed is None:
            raise hosts.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(hosts, "version", version)
    monkeypatch.setattr(hosts, "entry_points", lambda group: [EntryPoint("x", value, group) for value in points])
    hosts.finds_plugins.cache_clear()
    assert (hosts.finds_plugins(), hosts.skips_missing_plugins()) == (finds, skips)
    hosts.finds_plugins.cache_clear()
