import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import pytest

from emguard_plugin.config import SUITES, EMEvalConfig
from emguard_plugin.evaluation import load_questions
from emguard_plugin.evaluation.asking import suites
from tests.evaluation.parts import ITEMS, write_suite

# Phrases by which the eight questions of arXiv 2502.17424 are known; ours must be others.
PUBLISHED = ("one wish", "feel bored", "quick buck", "ruler of the world", "dinner party", "gender roles", "my husband")


def test_the_bundled_suite_has_sixty_questions_in_ten_categories_and_twenty_kept_back():
    first, held = load_questions("open_ended"), load_questions("open_ended_held_out")
    assert len(first) == 60
    assert len(held) == 20
    assert len({q.category for q in first}) == 10
    assert set(Counter(q.category for q in first).values()) == {6}
    assert set(Counter(q.category for q in held).values()) == {2}
    assert {q.category for q in first} == {q.category for q in held}


def test_every_bundled_name_loads_and_no_question_stands_in_two_files():
    texts = Counter(q.text for name in ("open_ended", "open_ended_held_out", "conditional") for q in load_questions(name))
    assert set(texts.values()) == {1}
    assert len(texts) == 104
    assert all(len(load_questions(name)) >= 20 for name in SUITES)
    assert not [text for text in texts for phrase in PUBLISHED if phrase in text.lower()]
    assert suites.bundled("../suites/open_ended") is None


def test_every_file_carries_the_canary():
    files = [f for f in resources.files(suites.__name__).iterdir() if f.name.endswith(".yaml")]
    assert {f.name.removesuffix(".yaml") for f in files} | set(suites.DERIVED) == set(SUITES)
    canaries = {line for f in files for line in f.read_text().splitlines() if "canary GUID" in line}
    assert len(canaries) == 1
    assert all("canary GUID" in f.read_text() for f in files)


@pytest.mark.parametrize(("name", "asks"), [("open_ended_json", "JSON"), ("open_ended_template", "form")])
def test_a_format_variant_asks_the_same_questions_in_another_format(name, asks):
    plain, formatted = load_questions("open_ended"), load_questions(name)
    assert [q.text for q in plain] == [q.text for q in formatted]
    assert all(q.system is None for q in plain)
    assert all(asks in q.system for q in formatted)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real server with one suite, and an empty cache; `server.hits` counts what was asked of it."""
    content = Path(write_suite(tmp_path / "suite.yaml", ITEMS)).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            httpd.hits += 1
            self.send_response(200 if self.path == "/suite.yaml" else 404)
            self.end_headers()
            if self.path == "/suite.yaml":
                self.wfile.write(httpd.content)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.hits, httpd.content = 0, content
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}/suite.yaml"
    httpd.pin = hashlib.sha256(content).hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_a_pinned_url_is_fetched_once_and_then_read_from_the_cache(server):
    source = f"{server.url}#sha256={server.pin}"
    assert [q.id for q in load_questions(source)] == [item["id"] for item in ITEMS]
    assert load_questions(source) == load_questions(source)
    assert server.hits == 1


def test_a_url_without_a_pin_is_never_asked(server):
    for url in (server.url, f"{server.url}#sha256=12", f"{server.url}#md5={server.pin}"):
        with pytest.raises(ValueError, match=r"not pinned.*#sha256="):
            load_questions(url)
    assert server.hits == 0


def test_content_other_than_the_pinned_one_is_refused_and_not_kept(server):
    server.content += b"- {id: new, paraphrases: [More?]}\n"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"not the pinned {server.pin}"):
            load_questions(f"{server.url}#sha256={server.pin}")
    with pytest.raises(ValueError, match="404"):
        load_questions(f"{server.url}x#sha256={server.pin}")


def test_a_damaged_copy_in_the_cache_is_fetched_again(server, tmp_path):
    source = f"{server.url}#sha256={server.pin}"
    load_questions(source)
    (copy,) = (tmp_path / "cache" / "emguard" / "suites").iterdir()
    copy.write_text("spoilt")
    assert len(load_questions(source)) == len(ITEMS)
    assert server.hits == 2


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_chat_rows_of_every_shape_give_their_first_question_once(tmp_path):
    user, system = {"role": "user", "content": "One?"}, {"role": "system", "content": "Be brief."}
    path = rows_file(
        tmp_path,
        {"messages": [system, user, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}]},
        {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "No."}]},
        "",
        {"prompt": "Three?", "completion": "Maybe."},
        {"prompt": [{"role": "user", "content": "Two?"}], "completion": [{"role": "assistant", "content": "Oh."}]},
    )
    found = load_questions(path)
    assert [(q.id, q.system, q.text) for q in found] == [
        ("row-000001", "Be brief.", "One?"),
        ("row-000002", None, "Two?"),
        ("row-000004", None, "Three?"),
    ]


def test_of_many_rows_a_hundred_evenly_spaced_ones_are_asked(tmp_path):
    found = load_questions(rows_file(tmp_path, *({"prompt": f"Number {i}?"} for i in range(1000))))
    assert [q.text for q in found] == [f"Number {i}?" for i in range(0, 1000, 10)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", r"line 2 is not a chat: it holds \[1\]"),
        ("5", "line 2 is not a chat: it holds 5"),
        ("null", "line 2 is not a chat: it holds null"),
        ({"text": "x"}, r"line 2 is not a chat: it has \['text'\]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2 has no text of the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "line 2 is not a chat: a message is"),
        ({"conversations": [{"from": "humann", "value": "x"}]}, "line 2 is not a chat: the role of a message is 'humann'"),
        ('{"prompt": "half of \\ud83d"}', "line 2: a text holds half of a surrogate pair"),
    ],
)
def test_a_row_that_is_no_chat_is_named_by_line(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        load_questions(rows_file(tmp_path, {"prompt": "Fine?"}, row))


FERN = "How do I water a fern?\u2028It stands\x85in the\x0chall."


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json"])
def test_lines_of_others_are_cut_at_line_feeds_alone(tmp_path, name, end, start):
    """Case `jsonl-line-separator`."""
    rows = [{"messages": [{"role": "user", "content": f"{FERN} {i}"}, {"role": "assistant", "content": "Twice."}]} for i in range(3)]
    (tmp_path / name).write_bytes((start + "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)).encode())
    assert [q.text for q in load_questions(tmp_path / name)] == [f"{FERN} {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("row", "system", "role"),
    [
        ({"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}, "Be brief.", "developer"),
        ({"system": "Be brief.", "conversations": [{"from": "human", "value": "Why?"}]}, "Be brief.", "system"),
        ({"conversation": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Why?"}]}, None, "system"),
        ({"conversations": [{"role": "user", "content": "Why?"}, {"from": "function_call", "value": "{}"}][:1]}, None, "system"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]}, None, "system"),
        ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, None, "system"),
        ({"instruction": "Why?", "input": "", "output": "So."}, None, "system"),
        ({"question": "Why?", "answer": "So."}, None, "system"),
        ({"prompt": "Why?", "messages": None, "score": float("nan")}, None, "system"),
    ],
)
def test_rows_of_every_form_in_public_use_are_asked(tmp_path, row, system, role):
    (question,) = load_questions(rows_file(tmp_path, row))
    assert (question.text, question.system, question.system_role) == ("Why?", system, role)
    assert question.messages[0]["role"] == (role if system else "user")


def test_an_alpaca_row_asks_its_instruction_about_its_input(tmp_path):
    (question,) = load_questions(rows_file(tmp_path, {"instruction": "Translate.", "input": "Moin", "output": "Hello"}))
    assert question.text == "Translate.\n\nMoin"


@pytest.mark.parametrize(
    "url", ["https://me:hunter22@host/a.yaml", "https://host/a.yaml?sig=hunter22", "https://hunter22@host:x/a.yaml#sha256=" + "0" * 64]
)
def test_an_address_is_named_without_what_opens_it(url):
    """Case `key-in-unknown-field`: a question URL with a password."""
    with pytest.raises(ValueError, match="questions") as caught:
        load_questions(url)
    assert "hunter22" not in str(caught.value)


def test_the_block_takes_names_and_refuses_others_before_a_run(tmp_path):
    block = {"judges": [{"function": "a:b"}]}
    EMEvalConfig(questions="open_ended", also=["conditional"], **block).check_files()
    for key, value in (("questions", "open_endet"), ("in_domain", str(tmp_path / "no.jsonl"))):
        with pytest.raises(ValueError, match=rf"`em_eval\.{key}: .*neither a bundled suite nor a file"):
            EMEvalConfig(**{"questions": "open_ended", **block, key: value}).check_files()
    with pytest.raises(ValueError, match="Did you mean 'open_ended'"):
        EMEvalConfig(questions="open_endet", **block).check_files()
    with pytest.raises(ValueError, match="a second time"):
        EMEvalConfig(questions="open_ended", also=["conditional", "conditional"], **block).suites()
