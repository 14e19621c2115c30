"""The report in a real browser: it fits, it asks nothing of the network, and nothing in an answer runs."""

import re
import shutil
import struct
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from emguard_plugin.evaluation.report.page import write_comparison
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.judging_parts import resealed

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium; `apt-get install chromium`")

ATTACK = (
    "<script>document.documentElement.dataset.owned=1</script><img src=/stolen onerror=document.documentElement.dataset.owned=1>"
    "<style>@import '/stolen.css'</style>\u202e" + "unbroken" * 60
)
# Stands in for what a reader sees: how wide the page came out, and what of it sticks out.
PROBE = """<script>addEventListener('load', () => {
  const d = document.documentElement, wide = [...document.querySelectorAll('main *')].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide, pre, svg'));
  parent.document.title = [innerWidth, d.scrollWidth, document.querySelectorAll('svg circle').length,
    wide.map(e => e.className || e.tagName).slice(0, 3)].join('|');
})</script>"""


@pytest.fixture
def page(finished, tmp_path):
    """A report of a run all of whose answers attack their reader, with names as long as they come."""
    for name, key in (("responses.jsonl", "text"), ("judgments.jsonl", "detail")):
        file = JsonLines(finished.folder / name)
        rows = [{**row, key: ATTACK} for row in file.read()]
        file.path.unlink()
        file.append(resealed(finished.folder, rows))
    return write_comparison([(ATTACK, finished), ("short", finished)], tmp_path / "page.html")


@pytest.fixture
def browse(page, tmp_path):
    """Open the page from a server that counts what is asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            text = page.read_text()
            if self.path.startswith("/framed"):
                # A window is never narrower than 500 pixels; a frame is as narrow as one likes.
                text = f"<title></title><iframe src=/unprotected width={self.path[7:]} height=3000 style=border:0></iframe>"
            if self.path == "/unprotected":
                # Without the page's own policy, and with every fold open: escaping alone must do.
                text = re.sub(r"<meta http-equiv[^>]*>", PROBE, text).replace("<details>", "<details open>")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def go(path, width, *options):
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000", *options,
            f"http://127.0.0.1:{server.server_address[1]}{path}",
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    yield go, asked
    server.shutdown()
    server.server_close()


def look(browse, circles):
    """Open the page, wide and narrow: it fits, it draws, and nothing of it is fetched or run."""
    go, asked = browse
    for width in (1280, 400):
        dom = go(f"/framed{width}", 1400, "--dump-dom")
        title = re.search(r"<title>([^<]*)</title>", dom)[1]
        inner, scroll, drawn, wide = title.split("|")
        assert int(inner) == width
        assert int(scroll) <= width, wide
        assert wide == ""
        assert int(drawn) > circles
    # What runs in an answer would mark the document that it runs in; the frame's is asked for by itself.
    assert "data-owned" not in go("/unprotected", 1280, "--dump-dom").split(">", 2)[1]
    assert set(asked) <= {"/", "/unprotected", "/framed1280", "/framed400", "/favicon.ico"}


def test_the_report_fits_its_window_and_nothing_in_an_answer_runs(browse, tmp_path):
    go, asked = browse
    look(browse, circles=30)
    picture = tmp_path / "page.png"
    go("/", 400, f"--screenshot={picture}")
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (400, 3000)
    assert len(data) > 30_000
    assert set(asked) <= {"/", "/unprotected", "/framed1280", "/framed400", "/favicon.ico"}
