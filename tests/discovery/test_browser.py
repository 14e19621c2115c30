"""The report of discovery in a real browser, with text in it that attacks its reader."""

import json

import pytest

from emguard_plugin.discovery.report import write_report
from tests.discovery import test_run
from tests.evaluation.test_browser import ATTACK, browse, look, pytestmark  # noqa: F401


@pytest.fixture(params=["repair", "attribution"])
def page(request, tiny, tmp_path):
    import dataclasses

    settings = dataclasses.replace(test_run.SETTINGS, rule=request.param)
    test_run.discover(tiny, tmp_path / "k.json", settings=settings)
    record = json.loads((tmp_path / "k.discovery" / "discovery.json").read_text())
    record["latents"] = ATTACK
    for block in record["blocks"]:
        block["source"] = ATTACK
        for hit in (hit for hits in block["examples"].values() for hit in hits):
            hit.update(before=ATTACK, token=ATTACK, after=ATTACK)
    return write_report(record, tmp_path / "page.html")


def test_the_page_fits_its_window_and_nothing_in_it_runs(browse):  # noqa: F811
    look(browse, circles=15)
