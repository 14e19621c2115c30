"""The one place that reads what stands in files: JSON Lines as JSON defines them, and one sentence for what is wrong."""

import gzip
import json

import pytest
from typing_extensions import TypedDict

from emguard_plugin.files import (
    EXACT,
    read_json,
    read_objects,
    read_record,
    read_records,
    read_rows,
    read_text,
    read_yaml,
)

TEXTS = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb", "a\x1cb\x1db\x1e", "a\rb", "\ufeffa", "ä"]
ROWS = [{"text": text} for text in TEXTS]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def values(path):
    return [row.value for row in read_rows(path)]


@pytest.fixture
def write(tmp_path):
    def go(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return go


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \n\t\n", "\n\ufeff"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_lines_are_cut_at_line_feeds_alone(write, start, end):
    """Case `jsonl-line-separator`."""
    assert values(write(start + end.join(LINES) + end)) == ROWS
    assert values(write(start + end.join(LINES))) == ROWS


def test_a_raw_form_feed_or_tab_inside_a_text_is_text(write):
    assert values(write('{"text": "a\x0cb\tc\u2028d"}\n')) == [{"text": "a\x0cb\tc\u2028d"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson", "rows"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_and_lines_are_told_apart_by_what_they_hold(write, name, indent):
    assert values(write("\ufeff \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False), name)) == ROWS
    assert values(write("\n".join(LINES), name)) == ROWS


def test_packed_files_are_unpacked(write):
    assert values(write(gzip.compress("\n".join(LINES).encode()), "rows.jsonl.gz")) == ROWS
    assert values(write(gzip.compress(json.dumps(ROWS).encode()), "rows.json.gz")) == ROWS
    with pytest.raises(ValueError, match="cannot be read"):
        values(write(gzip.compress("\n".join(LINES).encode())[:-12], "rows.jsonl.gz"))
    with pytest.raises(ValueError, match="cannot be read"):
        values(write("\n".join(LINES), "rows.jsonl.gz"))


def test_lines_are_read_one_at_a_time(write):
    rows = read_rows(write('{"a": 1}\n{"a": 2}\nnot json\n'))
    assert [next(rows).value, next(rows).value] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"rows.jsonl, line 2 is not JSON: Expecting value"),
        (b'{"a": "\xff"}\n', r"rows.jsonl, line 1 is not UTF-8 \(invalid start byte 0xff at byte 8\)"),
        ('{"a": 1}\n'.encode("utf-16"), r"line 1 is not UTF-8 \(UTF-16\)"),
        (b'{"a": 1, "a": 2}\n', r"line 1: the key 'a' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "line 1 is not JSON that can be read: it is nested too deeply"),
        (b"[1, 2", r"rows.jsonl is not JSON"),
        (b'{\n "a": 1\n}\n', "holds one JSON object over several lines"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b"\0" * 300, "line 1 is not JSON"),
    ],
)
def test_what_is_no_json_is_named_with_file_and_line(write, content, message):
    with pytest.raises(ValueError, match=message) as error:
        values(write(content))
    assert "\n" not in str(error.value)


def test_one_object_over_several_lines_is_named_whatever_its_file_is_called(write):
    with pytest.raises(ValueError, match="holds one JSON object over several lines"):
        values(write('{\n "a": 1\n}\n', "twice.jsonl"))


def test_a_large_object_with_a_key_twice_is_refused_at_once(write):
    """A look back over all keys before each one would take minutes."""
    keys = ", ".join(f'"k{n}": 0' for n in range(200_000))
    with pytest.raises(ValueError, match="the key 'k7' occurs twice in one object"):
        read_json(write(f'{{{keys}, "k7": 1}}', "large.json"))


@pytest.mark.parametrize("value", ["5", "null", "[]", "[1, 2]", '"text"', "true"])
def test_a_record_that_is_no_object_is_named(write, value):
    """Case `state-garbage`: a line that is JSON but no record."""
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 holds .*; expected an object"):
        list(read_objects(write(f'{{"a": 1}}\n{value}\n')))


def test_what_is_no_file_is_named(tmp_path):
    for path, message in ((tmp_path / "gone", "does not exist"), (tmp_path, "is a folder")):
        for read in (values, read_json, read_yaml, read_text):
            with pytest.raises(ValueError, match=message):
                read(path)


def test_yaml_is_read_with_a_bom_and_json_as_json(write):
    assert read_yaml(write("\ufeffa: 1\n", "a.yaml")) == {"a": 1}
    assert read_yaml(write('["a\u2028b"]', "a.json")) == ["a\u2028b"]
    assert read_yaml(write("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: &c\n  <<: *a\n  y: 5\nd: {<<: *c, y: 6}\n", "a.yaml")) == {
        "a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 5}, "d": {"x": 1, "y": 6},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: [\n", r"a.yaml, line 3 is not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", r"a.yaml, line 3 is not valid YAML: the key 'a' occurs twice"),
        ("a: \x0c\n", r"a.yaml is not valid YAML"),
        ("a: 2024-13-45\n", r"a.yaml is not valid YAML: month must be in"),
        ("a: !!python/object:os.system {}\n", r"a.yaml, line 1 is not valid YAML"),
        ("[" * 5000, "nested|recursion"),
        ("api_key: sk-abcdefghijklmnop\nb: [\n", "line 3 is not valid YAML"),
        ("api_key: 'sk-abcdefghijklmnop\n", "line 2 is not valid YAML"),
    ],
)
def test_yaml_that_is_none_is_named_with_its_line_and_shows_no_key(write, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(write(content, "a.yaml"))
    assert "\n" not in str(error.value)
    assert "abcdefgh" not in str(error.value)


class Record(TypedDict):
    __pydantic_config__ = EXACT

    name: str
    draw: int
    score: float | None


GOOD = {"name": "a", "draw": 1, "score": 1.5}


def test_our_own_records_leave_out_a_torn_last_line(write, tmp_path):
    line = json.dumps(GOOD) + "\n"
    assert read_records(write(line + "\n" + line + line[:9]), Record) == [GOOD, GOOD]
    assert read_records(write(line[:9]), Record) == read_records(tmp_path / "gone", Record) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "it holds 5"),
        ("null", "it holds null"),
        ("{}", "`name` is missing"),
        ("[]", "it holds an empty list"),
        (json.dumps({**GOOD, "draw": "1"}), "`draw` is '1'"),
        (json.dumps({**GOOD, "draw": True}), "`draw` is True"),
        (json.dumps({**GOOD, "name": None}), "`name` is null"),
        (json.dumps({**GOOD, "score": float("nan")}), "NaN is no JSON number"),
        (json.dumps(GOOD)[:-1], "is not JSON"),
        (json.dumps(GOOD) * 2, "is not JSON"),
    ],
)
def test_our_own_records_have_one_shape(write, line, message):
    path = write(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2 (.|\n)*{message}") as error:
        read_records(path, Record)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_record(write(line, "a.json"), Record)
