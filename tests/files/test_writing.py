"""The one way in which a file is written, and the one lock."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import emguard_plugin
from emguard_plugin.cli.frame import in_words
from emguard_plugin.files.writing import CannotWrite, locked, moved_into_place, write_text

SOURCES = Path(emguard_plugin.__file__).parent


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with moved_into_place(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"

    def interrupted():
        with moved_into_place(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "new"
    write_text(path, "new \ud800")
    assert path.read_text() == "new \\ud800"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".a[1].txt.{gone.pid}.part", f".a[1].txt.{os.getppid()}.part", f".b.txt.{gone.pid}.part", ".a[1].txt.part"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpXXXXXX").write_bytes(b"half")
    write_text(tmp_path / "a[1].txt", "whole")
    assert {one.name for one in tmp_path.iterdir()} == {*names[1:], "a[1].txt"}


def test_what_cannot_be_written_is_said_with_its_name_and_why(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotWrite) as error:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert error.value.filename == str(tmp_path / "file" / "a.txt")
    assert error.value.errno == errno.ENOTDIR
    assert in_words(error.value) == (
        f"{tmp_path}/file/a.txt cannot be written (Not a directory). Free space or permissions there, or name another folder.", 2,
    )  # fmt: skip


def test_a_folder_that_is_taken_is_refused_or_waited_for(tmp_path, caplog):
    code = (
        "import sys\nfrom pathlib import Path\nfrom emguard_plugin.files.writing import locked\n"
        "with locked(Path(sys.argv[1]), 'lock', 'key'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match="taken by another"), locked(tmp_path, "lock", "key", taken="taken by another"):
        pass
    other.kill()  # the system frees what a killed process held
    other.wait()
    with locked(tmp_path, "lock", "key"):
        assert not caplog.text


def test_nothing_else_moves_files_into_place_or_locks():
    """Who writes another way loses a file to a full disk or to Ctrl-C; see `files/writing.py`."""
    moves, locks = set(), set()
    for path in SOURCES.rglob("*.py"):
        name = str(path.relative_to(SOURCES))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                # `Path.replace` takes one argument, `str.replace` two.
                if node.func.attr == "replace" and len(node.args) == 1 and not node.keywords:
                    moves.add(name)
                if ast.unparse(node.func) in ("os.replace", "os.rename", "shutil.move"):
                    moves.add(name)
            if isinstance(node, ast.Import | ast.ImportFrom) and "fcntl" in ast.unparse(node):
                locks.add(name)
    assert locks == {"files/writing.py"}
    # The reference's recording becomes the file that it recorded; `JsonLines.replace` is ours, and writes by `write_text`.
    assert moves == {"files/writing.py", "reference/folder.py", "evaluation/judging.py"}
