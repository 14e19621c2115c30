"""cache-shared, cache-header: caches that several runs use, that are read-only, that a full disk cut."""

import json
import os
import resource
import threading
import time
import traceback

import pytest
import torch

from emguard_plugin import KLCallback
from emguard_plugin.files.state import LOCK, locked
from emguard_plugin.lab.export import export
from emguard_plugin.reference.folder import HIDDEN, META, RECORDING, ReferenceCache, is_cache
from emguard_plugin.reference.rows import RowStore
from emguard_plugin.reference.stored import save_reference
from emguard_plugin.regularizers.kl.reference import KLReference
from emguard_plugin.regularizers.moment import Moment
from tests.regularizers.kl_parts import batch, started
from tests.tiny import perturb, tiny_model

ABOUT = {"tokenizer": "t", "anchors": "a", "model": "m", "precision": "p"}
SIZES = [3, 1, 4]
ROWS = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in SIZES]


def model():
    return perturb(tiny_model("llama"), 0.2)


def penalty_of(callback):
    moved = perturb(model(), 0.05)
    return [callback.measure(Moment(moved, batch(), step)).value.item() for step in (1, 2, 3)]


def in_child(do):
    """Run `do` in a fork; return what it raised, as text."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            do()
            said = "nothing"
        except BaseException as exc:
            said = f"{type(exc).__name__}: {exc}" if isinstance(exc, OSError | ValueError) else traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "the process was killed"
    return said


def slowly(monkeypatch, dies=False):
    """Make the first recording slow, and die in its middle if so wished."""
    record, entered, go_on, first = KLReference._record, threading.Event(), threading.Event(), []

    def slow(self, *args):
        if first:
            return record(self, *args)
        first.append(1)
        (self.source.folder / RECORDING).write_bytes(b"half of it")
        if dies:
            (self.source.folder / f".{META}.17.part").mkdir()
            (self.source.folder / f".{META}.17.part" / ".tmpbo7Vcn").write_bytes(b"")  # a library's own
        entered.set()
        assert go_on.wait(30)
        if dies:
            raise KeyboardInterrupt
        return record(self, *args)

    monkeypatch.setattr(KLReference, "_record", slow)
    return entered, go_on


@pytest.mark.parametrize("dies", [False, True], ids=["ends", "dies"])
def test_a_second_run_waits_for_the_first_and_shares_or_records_anew(tmp_path, monkeypatch, caplog, dies):
    want = penalty_of(started(model(), tmp_path))
    entered, go_on = slowly(monkeypatch, dies)
    folder, found = tmp_path / "shared", {}
    models = {name: model() for name in "ab"}  # threads share the seed that makes them

    def run(name):
        try:
            found[name] = started(models[name], tmp_path, cache=str(folder))
        except KeyboardInterrupt:
            found[name] = "killed"

    a = threading.Thread(target=run, args=("a",))
    a.start()
    assert entered.wait(30)
    b = threading.Thread(target=run, args=("b",))
    b.start()
    time.sleep(0.5)
    assert "b" not in found, "it waits"
    assert not is_cache(folder)
    go_on.set()
    a.join(30)
    b.join(30)
    assert "another run is writing" in caplog.text
    found = {name: c if c == "killed" else penalty_of(c) for name, c in found.items()}
    assert found == {"a": "killed" if dies else want, "b": want}
    assert penalty_of(started(model(), tmp_path, cache=str(folder))) == want
    assert sorted(p.name for p in folder.iterdir()) == sorted([LOCK, HIDDEN, "head.safetensors", META])


def test_two_runs_that_keep_rows_in_one_folder_lose_none(tmp_path):
    stores = [RowStore(tmp_path, {"model": "m"}) for _ in range(2)]
    for n in range(6):
        stores[n % 2].put(f"row {n}", torch.full((2, 3), float(n)))
        stores[n % 2].flush()
    assert {k: t[0, 0].item() for k, t in RowStore(tmp_path, {"model": "m"}).rows.items()} == {f"row {n}": float(n) for n in range(6)}
    assert not list(tmp_path.glob("*.part"))


def test_a_lock_is_free_when_its_holder_died(tmp_path):
    def die():
        with locked(tmp_path, "k"):
            os.kill(os.getpid(), 9)

    pid = os.fork()
    if not pid:
        die()
    assert os.waitpid(pid, 0)[1] == 9
    with locked(tmp_path, "k"):
        pass


@pytest.mark.parametrize(
    ("key", "value"), [("head", False), ("dtype", "bfloat16"), ("width", 16), ("tokens", 70), ("model", "x"), ("files", {})]
)
def test_every_field_of_the_description_is_under_its_hash(tmp_path, key, value):
    """`head: false` was outside it: a trained head stood in for the base's."""
    cache = ReferenceCache(SIZES)
    for i, row in enumerate(ROWS):
        cache.put(i, row)
    cache.keep_head(torch.randn(5, 8), None)
    cache.save(tmp_path, ABOUT)
    stated = json.loads((tmp_path / META).read_text())
    assert stated[key] != value
    (tmp_path / META).write_text(json.dumps({**stated, key: value}))
    with pytest.raises(ValueError, match=r"reference\.json does not match its hash"):
        ReferenceCache(SIZES).load(tmp_path, ABOUT)


def test_a_folder_that_cannot_be_written_is_read(tmp_path):
    """As an unprivileged user would: on a read-only mount nothing is opened for writing."""
    folder = tmp_path / "cache"
    want = penalty_of(started(model(), tmp_path, cache=str(folder)))
    (folder / LOCK).unlink()
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    above = [p for p in folder.parents if p.stat().st_uid == os.geteuid() and str(p).startswith("/tmp/")]
    modes = [(p, p.stat().st_mode) for p in above]
    for p in above:
        p.chmod(p.stat().st_mode | 0o055)
    anchors = tmp_path / "anchors.jsonl"

    def read():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(PermissionError):
            (folder / "x").write_text("")
        with_it = penalty_of(started_again(anchors, folder))
        assert with_it == want

    try:
        assert in_child(read) == "nothing"
    finally:
        for p, mode in modes:
            p.chmod(mode)
        folder.chmod(0o755)


def started_again(anchors, folder):
    from tests.regularizers.kl_parts import run_of

    callback, fresh = KLCallback(anchors=str(anchors), coef=1.0, ratio=1.0, cache=str(folder)), model()
    callback.prepare(run_of(fresh))
    fresh.train()
    callback.measure(Moment(fresh, batch(), 0))
    return callback


def recorded(folder):
    cache = ReferenceCache([2000], folder)
    cache.put(0, torch.zeros(2000, 8))
    cache.save(folder, ABOUT)


def saved_from_memory(folder):
    cache = ReferenceCache([2000])
    cache.put(0, torch.zeros(2000, 8))
    cache.save(folder, ABOUT)


def rows_flushed(folder):
    store = RowStore(folder, {})
    store.put("x", torch.zeros(2000, 8))
    store.flush()


WRITERS = {
    "recording": recorded, "memory": saved_from_memory, "rows": rows_flushed,
    "reference": lambda folder: save_reference(folder / "r.safetensors", {"x": torch.zeros(2000, 8)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_is_full_is_one_sentence_with_the_path(tmp_path, what):
    """It was a SIGBUS. A limit on the size of files stands in for the disk: the system refuses the write in the same way."""
    folder = tmp_path / "full"
    folder.mkdir()

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        WRITERS[what](folder)

    said = in_child(write)
    assert said.startswith(f"CannotWrite: {folder}/")
    assert "cannot be written (" in said
    assert "\n" not in said
    assert not is_cache(folder)
    assert not list(folder.glob("rows-*"))
    assert not list(folder.glob("*.part"))


def test_files_that_are_not_ours_stay(tmp_path):
    folder = tmp_path / "cache"
    want = penalty_of(started(model(), tmp_path, cache=str(folder)))
    (folder / "notes.txt").write_text("mine")
    assert penalty_of(started(model(), tmp_path, cache=str(folder))) == want
    (folder / META).unlink()
    with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\)"):
        started(model(), tmp_path, cache=str(folder))
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / HIDDEN).exists()


# Folders that cannot be caches, before a model is loaded


def unusable(tmp_path):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "a_file")
    return {
        str(tmp_path / "a_file"): "it is a file",
        str(tmp_path / "link"): "it is a file",
        str(tmp_path / "a_file/deeper/down"): "a_file is a file",
        "~nobody-of-this-name/cache": "no such home folder",
    }


@pytest.mark.parametrize("method", ["kl", "block_em"])
def test_what_is_no_folder_is_found_by_check_by_the_hook_and_by_the_callback(tmp_path, method):
    import yaml

    from emguard_plugin.check import check_config
    from emguard_plugin.config import EMRegularizerConfig
    from emguard_plugin.regularizers.preview import check_inputs
    from tests.regularizers.block_em_parts import block_em
    from tests.regularizers.kl_parts import run_of

    lab = export(tmp_path / "lab", rows=4, anchors=2)
    for cache, why in unusable(tmp_path).items():
        block = {"cache": cache} if method == "kl" else {"cache": cache, "latents": str(lab["latents"])}
        said = f"`em_regularizer.{method}.cache: {cache}`.*{why}"
        with pytest.raises(ValueError, match=said):
            check_inputs(EMRegularizerConfig(**{method: block}))
        callback = KLCallback(cache=cache) if method == "kl" else block_em(tiny_model("llama"), cache=cache)
        with pytest.raises(ValueError, match=said):
            callback.prepare(run_of(tiny_model("llama")))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(lab["model"]), "em_regularizer": {method: block}}))
        assert [p for p in check_config(tmp_path / "run.yaml").problems if why in p]


def test_a_folder_of_somebody_elses_files_is_found_before_a_model_is_loaded(tmp_path):
    from emguard_plugin.config import EMRegularizerConfig
    from emguard_plugin.regularizers.preview import check_inputs

    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"holds other files \(mine.txt\)"):
        check_inputs(EMRegularizerConfig(kl={"cache": str(tmp_path)}))
    (tmp_path / "mine.txt").unlink()
    (tmp_path / RECORDING).write_bytes(b"half")
    check_inputs(EMRegularizerConfig(kl={"cache": str(tmp_path)}))
    assert (tmp_path / RECORDING).exists(), "looking removes nothing"


def test_a_damaged_file_of_rows_comes_with_one_piece_of_advice(tmp_path):
    save_reference(tmp_path / "rows-0-00000-a.safetensors", {"a": torch.zeros(3)}, {"model": "m"})
    (tmp_path / "rows-0-00000-a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="was cut") as error:
        RowStore(tmp_path, {"model": "m"})
    assert "Restore" not in str(error.value)
    assert str(error.value).endswith("Delete the folder, or name another one.")
