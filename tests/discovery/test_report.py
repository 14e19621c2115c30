"""The report of discovery shows whatever a record says, and nothing of it acts."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emguard_plugin.discovery.report import write_report
from tests.discovery.test_run import discover
from tests.pages.html import outline, with_texts
from tests.pages.test_page import ACTIVE

WRITTEN_AS_NUMBERS = frozenset({"id", "layer"})


@pytest.fixture(scope="module")
def record(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    discover(tiny, folder / "k.json")
    return json.loads((folder / "k.discovery" / "discovery.json").read_text())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.text(st.characters(), max_size=12) | st.sampled_from(["<b>", '" onload="x', "</style>", "{{ 1 }}", "-->", "]]>"]))
def test_no_field_of_a_record_acts_on_its_page(record, tmp_path, before):
    def page(change):
        changed = with_texts(record, change, WRITTEN_AS_NUMBERS)
        for block, plain in zip(changed["blocks"], record["blocks"], strict=True):
            block["examples"] = {change(latent): hits for latent, hits in block["examples"].items()}
            assert plain["examples"], "there is something to attack with"
        return write_report(changed, tmp_path / "page.html").read_text()

    found = page(lambda text: before + text)
    assert outline(found) == outline(page(str))
    assert not re.search(ACTIVE, found)
