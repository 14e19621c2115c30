import json
import os
import subprocess
import sys

import pytest

from emguard_plugin.files import result_folder as store
from emguard_plugin.files import writing
from emguard_plugin.files.result_folder import JsonLines, claim, locked, prepare_folder


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_write(tmp_path):
    file = JsonLines(tmp_path / "a.jsonl")
    file.append([{"n": 1}, {"n": 2, "text": "é\n\u2028"}])
    with file.path.open("ab") as stream:
        stream.write(b'{"n": 3, "te')
    assert [row["n"] for row in file.read()] == [1, 2]
    file.append([{"n": 4}])
    assert [row["n"] for row in file.read()] == [1, 2, 4]


def test_a_file_that_is_nothing_but_a_torn_line_is_empty(tmp_path):
    file = JsonLines(tmp_path / "a.jsonl")
    file.path.write_bytes(b'{"n"')
    assert file.read() == []
    file.append([{"n": 1}])
    assert file.path.read_bytes() == b'{"n": 1}\n'


def test_text_that_has_no_utf8_is_stored_and_read_back(tmp_path):
    file = JsonLines(tmp_path / "a.jsonl")
    file.append([{"text": "\ud800 \x1b[31m"}])
    assert file.read() == [{"text": "\ud800 \x1b[31m"}]


def test_damage_in_the_middle_is_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\nxx\n{"n": 2}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 is damaged"):
        JsonLines(tmp_path / "a.jsonl").read()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the result folder .*em_eval.output_dir"):
        prepare_folder(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="cannot write to the result folder"):
        prepare_folder("/proc/em_eval")


def test_a_full_disk_is_refused_before_any_work():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(ValueError, match="cannot write to the result folder"):
        prepare_folder("/dev/full")


def test_two_processes_cannot_share_a_folder_and_a_killed_one_frees_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from emguard_plugin.files.result_folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another process"), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path):
        pass


def test_a_folder_keeps_to_one_protocol(tmp_path):
    first = {"created": "then", "protocol": {"decoding": {"seed": 0, "top": (1, 2)}}}
    assert claim(tmp_path, first, ("protocol",))["created"] == "then"
    assert claim(tmp_path, {**first, "created": "now"}, ("protocol",))["created"] == "then"
    other = {"created": "now", "protocol": {"decoding": {"seed": 1, "top": (1, 2)}}}
    with pytest.raises(ValueError, match=r"protocol.decoding.seed: stored 0, now 1"):
        claim(tmp_path, other, ("protocol",))
    assert json.loads((tmp_path / store.PROTOCOL).read_text())["protocol"]["decoding"]["seed"] == 0


def test_answers_of_unknown_origin_are_not_used(tmp_path):
    (tmp_path / "responses.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"responses.jsonl without protocol.json"):
        claim(tmp_path, {"protocol": {}}, ("protocol",))


def test_a_full_disk_names_the_file_and_leaves_no_draft(tmp_path):
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom emguard_plugin.files import result_folder as store\nfrom emguard_plugin.cli.frame import in_words\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "folder = Path(sys.argv[1])\n"
        "for write in (lambda: store.JsonLines(folder / 'a.jsonl').append([{'x': 'y' * 9000}]), lambda: store.write_json(folder / 'a.json', 'y' * 9000)):\n"
        "    try:\n        write()\n    except OSError as error:\n        print(*in_words(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert said == [
        f"{tmp_path / name} cannot be written (File too large). Free space or permissions there, or name another folder. 2"
        for name in ("a.jsonl", "a.json")
    ], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "page").mkdir()
    with pytest.raises(OSError, match="directory") as error:
        writing.write_text(tmp_path / "page", "x")
    assert error.value.filename == str(tmp_path / "page")
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
