import pytest

from tests.e2e.axolotl_runs import shared_server
from tests.e2e.tiny_run import write_tiny


@pytest.fixture(scope="session")
def axolotl():
    return shared_server()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))
