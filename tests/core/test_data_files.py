"""Images on disk, in memory or in a cache larger than memory: the same pixels, whole or absent, and changes are noticed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from geomssl import data
from geomssl.data import files, images
from geomssl.data.base import Resident
from geomssl.data.files import Cached, Files
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError

N = 150


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    root = tmp_path_factory.mktemp("painted") / "pets"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(N // 2):
            pixels = rng.integers(0, 256, (7, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def tree(painted, tmp_path, monkeypatch):
    monkeypatch.setenv("GEOMSSL_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(painted, tmp_path / "pets")


def load(tree, split="train", **options):
    return data.load(f"folder:{tree}", split, size=6, **options)


def on_disk(tree, split="train", **options):
    return load(tree, split, memory=0, **options)


def every(source):
    return source.images(torch.arange(len(source)))


def caches(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "images").iterdir() if not p.name.endswith(".lock"))


def refused(call, reason):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_memory_and_disk_hold_the_same(tree, split):
    resident, stored = load(tree, split), on_disk(tree, split)
    assert isinstance(resident, Resident)
    assert isinstance(stored, Files)
    assert torch.equal(every(stored), every(resident))
    assert torch.equal(stored.labels, resident.labels)
    for name in ("fingerprint", "classes", "name", "split", "channels", "size", "factors", "notes"):
        assert getattr(stored, name) == getattr(resident, name), name
    order = torch.tensor([5, 0, 5, 2])
    assert torch.equal(stored.images(order), resident.images(order))


def test_the_limit_decides_where_the_pixels_are(tree):
    n = len(load(tree))
    just = n * 3 * 6 * 6 / 2**30
    assert isinstance(load(tree, memory=just), Resident)
    assert isinstance(load(tree, memory=just * 0.999), Files)


def test_pixels_are_decoded_in_the_order_of_the_files(tree):
    """Against Pillow alone, one file after the other; more files than a chunk holds."""
    from geomssl.data.folder import _listing

    _, paths, labels = _listing(tree, None)
    found = np.concatenate(list(images.Pixels(paths, images.Decoding(size=6), tree)))
    for path, pixels in zip(paths, found, strict=True):
        with Image.open(path) as opened:
            wanted = opened.resize((6, 6), Image.Resampling.BILINEAR, box=(0, 0, 6, 6))
        assert np.array_equal(pixels, np.asarray(wanted).transpose(2, 0, 1))
    assert len(paths) == len(labels) == N


def test_a_cache_is_built_once(tree, tmp_path, monkeypatch):
    first = on_disk(tree)
    assert caches(tmp_path) == [caches(tmp_path)[0]]
    monkeypatch.setattr(files, "_build", None)
    assert on_disk(tree).fingerprint == first.fingerprint


def test_a_changed_folder_meets_no_old_cache(tree, tmp_path):
    first = on_disk(tree)
    path = first.watch.paths[3]
    Image.fromarray(np.full((7, 6, 3), 9, np.uint8)).save(path)
    second = on_disk(tree)
    assert second.fingerprint != first.fingerprint
    assert second.images(torch.tensor([3])).unique().tolist() == [9]
    assert second.fingerprint == load(tree).fingerprint
    stat = path.stat()
    pixels = every(second)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert torch.equal(every(on_disk(tree)), pixels)
    on_disk(tree, channels=1)
    assert len(caches(tmp_path)) == 4


def test_halves_and_leftovers_are_ignored(tree, tmp_path):
    first = on_disk(tree)
    wanted = every(first).clone()
    place = tmp_path / "cache" / "images"
    (name,) = caches(tmp_path)
    os.truncate(place / name / "pixels.u8", 100)
    (place / f".{name}.dead.part").mkdir()
    (place / f".{name}.dead.part" / "pixels.u8").write_bytes(b"half")
    assert torch.equal(every(on_disk(tree)), wanted)
    assert caches(tmp_path) == [name]
    for broken in ("", "{}", "[]", json.dumps({"shape": [1, 2], "fingerprint": "x", "unreadable": []})):
        (place / name / "about.json").write_text(broken)
        assert torch.equal(every(on_disk(tree)), wanted)


BUILD = """
import sys, time
from geomssl import data
from geomssl.data import files
if sys.argv[2:]:
    files._sync = lambda file: (file.flush(), print("built", flush=True), time.sleep(60))
print(data.load("folder:" + sys.argv[1], "train", size=6, memory=0).fingerprint)
"""


def test_a_killed_builder_and_two_at_once(tree, tmp_path):
    def start(*how):
        return subprocess.Popen([sys.executable, "-c", BUILD, str(tree), *how], stdout=subprocess.PIPE, text=True)

    killed = start("hang")
    assert killed.stdout.readline() == "built\n"
    other = start()
    assert [name.endswith(".part") for name in caches(tmp_path)] == [True]
    threading.Timer(0.2, os.kill, (killed.pid, signal.SIGKILL)).start()
    here = on_disk(tree)
    assert killed.wait(60) == -signal.SIGKILL
    assert other.communicate(timeout=120)[0] == here.fingerprint + "\n" == load(tree).fingerprint + "\n"
    assert len(caches(tmp_path)) == 1
    killed.stdout.close()


def test_two_builders_without_a_lock_do_not_meet(tree, tmp_path, monkeypatch):
    def nothing(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", nothing)
    real, inside = files._sync, []

    def another(file):
        real(file)
        if not inside:
            inside.append(file)
            on_disk(tree)

    monkeypatch.setattr(files, "_sync", another)
    assert torch.equal(every(on_disk(tree)), every(load(tree)))
    assert len(caches(tmp_path)) == 1


def fails(code):
    def raises(*_):
        raise OSError(code, os.strerror(code))

    return raises


def test_a_full_disk_is_one_line_and_leaves_nothing(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", fails(errno.ENOSPC))
        said = refused(lambda: on_disk(tree), "unwritable")
    assert "No space left on device; expected room for it, or --set dataset.cache=DIR" in said
    assert caches(tmp_path) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "needs 9.05e-06 GB, and" in refused(lambda: on_disk(tree), "unwritable")
    assert caches(tmp_path) == []


def test_a_cache_that_cannot_be_written(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write to" in refused(lambda: on_disk(tree, cache=str(tmp_path / "file")), "unwritable")
    monkeypatch.setattr("tempfile.mkdtemp", fails(errno.EROFS))
    said = refused(lambda: on_disk(tree), "unwritable")
    assert "Read-only file system; expected a writable --set dataset.cache=DIR" in said


@pytest.mark.parametrize("read", [load, on_disk])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.unlink(), "is gone since it was read"),
        (lambda p: os.truncate(p, 40), "has 40 bytes and had"),
        (lambda p: Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(p), "bytes and had"),
        (lambda p: os.utime(p, ns=(0, p.stat().st_mtime_ns + 10**6)), "was written again since it was read"),
    ],
)
def test_a_change_under_way_is_noticed(tree, read, change, said):
    source = read(tree)
    before = every(source).clone()
    source.check()
    path = source.watch.paths[7]
    change(path)
    found = refused(source.check, "changed-data")
    assert str(path) in found
    assert said in found
    assert torch.equal(every(source), before)


def test_a_change_of_the_cache_is_noticed(tree, tmp_path):
    source = on_disk(tree)
    (name,) = caches(tmp_path)
    os.utime(tmp_path / "cache" / "images" / name / "pixels.u8", ns=(0, 0))
    assert "pixels.u8 was written again" in refused(source.check, "changed-data")


@pytest.mark.parametrize("read", [load, on_disk])
def test_a_change_while_it_is_read_is_noticed(tree, tmp_path, read, monkeypatch):
    real, victim = images.Pixels._whole, tree / "dog" / "001.png"

    def meddle(self, start, decoded):
        victim.unlink(missing_ok=True)
        return real(self, start, decoded)

    monkeypatch.setattr(images.Pixels, "_whole", meddle)
    split = next(s for s in ("train", "val", "test") if victim in _paths(tree, s))
    assert "001.png is gone since it was read" in refused(lambda: read(tree, split), "changed-data")
    if read is on_disk:
        assert caches(tmp_path) == []


def _paths(tree, split):
    from geomssl.data.folder import _listing
    from geomssl.data.splits import stratified

    _, paths, labels = _listing(tree, None)
    return [paths[i] for i in stratified(labels, 0)[split].tolist()]


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_unreadable_images_are_named_and_counted_or_skipped(tree, memory, capsys):
    source = load(tree, memory=memory)
    rows = [2, 70, 11]
    pixels, labels = every(source).clone(), source.labels
    for row in rows:
        path = source.watch.paths[row]
        path.write_bytes(path.read_bytes()[:50])
    first = source.watch.paths[2]
    said = refused(lambda: load(tree, memory=memory), "unreadable-image")
    assert said.startswith(f"cannot read {first}: ")
    assert f", and 2 more of {len(source)} files; expected whole image files, or --set dataset.unreadable=skip" in said
    capsys.readouterr()
    rest = load(tree, memory=memory, unreadable="skip")
    kept = [i for i in range(len(source)) if i not in rows]
    assert torch.equal(every(rest), pixels[kept])
    assert torch.equal(rest.labels, labels[kept])
    line = f"3 of {len(source)} files below {tree} were left out; the first: cannot read {first}"
    assert rest.notes[0].startswith(line)
    assert capsys.readouterr().err.startswith(f"geomssl: folder:pets/train: {line}")


def test_no_image_can_be_read(tree):
    for path in tree.rglob("*.png"):
        path.write_bytes(b"nothing")
    said = refused(lambda: load(tree, unreadable="skip"), "unreadable-image")
    assert "nor any other of 90 files" in said


def test_skipping_does_not_let_wrong_images_pass(tree):
    path = load(tree).watch.paths[4]
    Image.fromarray(np.zeros((6, 6, 4), np.uint8)).save(path)
    for memory in (0.0, 1.0):
        said = refused(lambda m=memory: load(tree, memory=m, unreadable="skip"), "bad-image")
        assert f"{path} has 4 channels" in said


def test_a_set_larger_than_memory_is_mapped(tmp_path):
    """Four times the memory of this machine, as a file with a hole: only what is asked for is read."""
    row = 3 * 1024 * 1024
    n = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // row
    with open(tmp_path / "pixels.u8", "wb") as file:
        file.truncate(n * row)
        file.seek((n - 1) * row)
        file.write(b"\x07" * row)
    cached = Cached(tmp_path, {"shape": [n, 3, 1024, 1024], "fingerprint": "f", "unreadable": []})
    source = Files("large", "train", cached, None)
    found = source.images(torch.tensor([0, n - 1, n // 2]))
    assert found.flatten(1).amax(dim=1).tolist() == [0, 7, 0]
    assert found.flatten(1).amin(dim=1).tolist() == [0, 7, 0]


def test_prefetched_images_are_those_that_were_asked_for(tree, monkeypatch):
    resident, source = load(tree), on_disk(tree).to("cpu")
    batches = [torch.tensor(rows, dtype=torch.int64) for rows in ([3, 1, 2], [4, 4], [7], [])]
    real, gathered = Files._gather, []

    def gather(self, indices):
        gathered.append((indices.tolist(), threading.current_thread() is threading.main_thread()))
        return real(self, indices)

    monkeypatch.setattr(Files, "_gather", gather)
    for batch, following in pairwise(batches):
        source.prefetch(following)
        assert torch.equal(source.images(batch), resident.images(batch))
    assert source.images(batches[-1]).shape == resident.images(batches[-1]).shape  # which waits for the thread
    assert sorted(gathered) == [([], False), ([3, 1, 2], True), ([4, 4], False), ([7], False)]
    for batch in batches:
        source.prefetch(batch)
    assert torch.equal(source.images(batches[0]), resident.images(batches[0]))
    resident.prefetch(batches[0])


def test_watching_no_file_at_all():
    Watch([]).check()
    data.load("digits", "test").check()


def test_settings_of_the_machine_do_not_make_another_set(tree):
    def config(**options):
        return data.configure(data.section(f"folder:{tree}", **options))

    assert data.same_images(config(), config(memory=0, cache="x"))
    assert not data.same_images(config(), config(seed=1))
    assert not data.same_images(config(), data.configure(data.section("digits")))
    assert data.same_images(*(data.configure(data.section(name)) for name in ("mnist", "mnist:elsewhere")))
    assert not data.same_images(*(data.configure(data.section(name)) for name in ("mnist", "fashion-mnist")))
