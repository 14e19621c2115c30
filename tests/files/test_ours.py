"""Nothing is removed or replaced that emguard did not make."""

import ast
from pathlib import Path

import pytest

from emguard_plugin.files.ours import MARK, clear, is_ours, may_replace, our_folder

PACKAGE = Path(__file__).parents[2] / "emguard_plugin"
REMOVES = {
    "files/ours.py": "the one place for folders that a user names",
    "files/writing.py": "its own half-written files, in a folder that it has just made",
    "files/result_folder.py": "the file that tries a folder out",
    "reference/folder.py": "files of a cache by their own names",
    "regularizers/block_em/base_latents.py": "rows-*.safetensors in the folder that it writes beside checkpoints",
    "evaluation/post_train.py": "FAILED.txt of an earlier measurement",
    "demo.py": "what the run before told, in the demo's own folder",
}


def test_a_new_and_an_empty_folder_are_taken_and_found_again(tmp_path):
    for path in (tmp_path / "new" / "deep", tmp_path / "empty"):
        if path.name == "empty":
            path.mkdir()
        assert our_folder(path, "demo") == path
        assert is_ours(path, "demo")
        (path / "more").write_text("x")
        assert our_folder(path, "demo") == path
        assert not is_ours(path, "lab")


def test_a_strange_folder_is_refused_with_its_name_and_what_it_holds(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"{tmp_path} holds files that emguard did not make \(thesis.txt\); nothing of it was changed"):
        our_folder(tmp_path, "demo")
    with pytest.raises(ValueError, match="no folder that emguard made for its demo"):
        clear(tmp_path, "demo", ["thesis.txt"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


def test_clear_removes_names_and_never_follows_a_link(tmp_path):
    ours, theirs = our_folder(tmp_path / "ours", "demo"), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "kept").write_text("mine")
    (ours / "run").symlink_to(theirs)
    (ours / "lab").mkdir()
    (ours / "lab" / "inner").symlink_to(theirs)
    (ours / "stays").write_text("x")
    clear(ours, "demo", ["run", "lab", "absent"])
    assert sorted(p.name for p in ours.iterdir()) == [MARK, "stays"]
    assert (theirs / "kept").read_text() == "mine"


def test_a_file_is_replaced_only_where_it_is_ours(tmp_path):
    path = tmp_path / "report.html"
    assert may_replace(path, "by emguard", "report") == path
    path.write_text("<html>by emguard</html>")
    assert may_replace(path, "by emguard", "report") == path
    path.write_text("my thesis")
    with pytest.raises(ValueError, match=r"report\.html is there and is no report that emguard wrote; it was left as it is"):
        may_replace(path, "by emguard", "report")
    with pytest.raises(ValueError, match="is there and is no report"):
        may_replace(tmp_path, "by emguard", "report")


def test_no_other_file_of_the_package_removes_anything():
    """Each place that removes is listed with what it removes; a new one has to be."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("rmtree", "unlink", "rmdir", "removedirs"):
                found.add(str(path.relative_to(PACKAGE)))
    assert found == set(REMOVES)
