"""mnist on tiny files in the exact format, and how released files are found and fetched: read right, or refused by name."""

import gzip
import hashlib
import http.server
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomssl import data
from geomssl.cli import main
from geomssl.data import mnist
from geomssl.data.mnist import MNIST, FashionMNIST, parse_idx
from geomssl.data.places import DEBIAN
from geomssl.data.releases import Pinned, fetch, unpacked
from geomssl.data.splits import held_out
from geomssl.errors import GeomsslError
from geomssl.probes.load import from_checkpoint

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
SIZE, TRAIN, TEST = 4, 40, 10


@pytest.fixture(autouse=True)
def _nowhere_else(tmp_path, monkeypatch):
    """No data but what a test writes."""
    monkeypatch.setenv("GEOMSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEOMSSL_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def idx(array):
    """IDX as its format says: 0, 0, 8, number of dimensions, each big-endian, then the bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


class Digits:
    """A tiny MNIST: its arrays, its files packed and unpacked, and the release with their own hashes."""

    def __init__(self, base="http://127.0.0.1:9", content=False):
        rng = np.random.default_rng(0)
        self.pixels = {n: rng.integers(0, 256, (n, SIZE, SIZE), dtype=np.uint8) for n in (TRAIN, TEST)}
        self.labels = {n: (np.arange(n) % 2).astype(np.uint8) for n in (TRAIN, TEST)}
        self.raw = {
            IMAGES: idx(self.pixels[TRAIN]), LABELS: idx(self.labels[TRAIN]),
            "t10k-images-idx3-ubyte": idx(self.pixels[TEST]), "t10k-labels-idx1-ubyte": idx(self.labels[TEST]),
        }
        self.packed = {f"{name}.gz": gzip.compress(content, mtime=1) for name, content in self.raw.items()}
        pins = [
            Pinned(f"{base}/{name}", len(packed), sha256(packed), sha256(self.raw[name[:-3]]) if content else None)
            for name, packed in self.packed.items()
        ]
        self.release = mnist.Release((pins[0], pins[1]), (pins[2], pins[3]), (TRAIN, TEST), SIZE, ("even", "odd"))

    def write(self, folder, packed=True, **instead):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (self.packed if packed else self.raw).items():
            (folder / name).write_bytes(content)
        return folder

    def load(self, root, split="train", **options):
        return MNIST.load(MNIST.Config(root=None if root is None else str(root), **options), split, self.release)


def every(source):
    return source.images(torch.arange(len(source)))


def refused(call):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_reads_what_is_in_the_files(tmp_path, packed):
    tiny = Digits()
    tiny.write(tmp_path, packed)
    test = tiny.load(tmp_path, "test")
    assert torch.equal(every(test), torch.from_numpy(tiny.pixels[TEST])[:, None])
    assert test.labels.tolist() == [0, 1] * (TEST // 2)
    assert test.classes == ("even", "odd")
    assert (test.name, test.split, test.channels, test.size) == ("mnist", "test", 1, SIZE)


def test_train_and_val_are_the_released_train(tmp_path):
    tiny = Digits()
    tiny.write(tmp_path)
    train, val = tiny.load(tmp_path, "train"), tiny.load(tmp_path, "val")
    assert [len(train), len(val)] == [36, 4]
    assert val.labels.bincount().tolist() == [2, 2]
    rows = {image.tobytes() for image in tiny.pixels[TRAIN]}
    found = [image.numpy().tobytes() for image in torch.cat([every(train), every(val)])]
    assert len(found) == len(set(found)) == TRAIN
    assert set(found) == rows
    assert len(tiny.load(tmp_path, "train", val=0)) == TRAIN
    assert len(tiny.load(tmp_path, "val", val=0)) == 0
    assert not torch.equal(every(tiny.load(tmp_path, "val", seed=1)), every(val))


@given(st.integers(1, 6), st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_held_out_is_a_stratified_partition(classes, n, share, seed):
    labels = torch.arange(n) % classes
    train, val = held_out(labels, share, seed)
    assert torch.cat([train, val]).sort().values.tolist() == list(range(n))
    for label in range(min(classes, n)):
        members = int((labels == label).sum())
        assert int((labels[val] == label).sum()) == round(share * members)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_idx_is_read_back_and_no_other_header_is(shape, draw):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = idx(array)
    assert parse_idx(content, "f", tuple(shape)).tolist() == array.tolist()
    cut = draw.draw(st.integers(0, len(content) - 1))
    assert refused(lambda: parse_idx(content[:cut], "f", tuple(shape))).startswith("f ")
    assert "more than" in refused(lambda: parse_idx(content + b"\0", "f", tuple(shape)))
    place = draw.draw(st.integers(0, 3 + 4 * len(shape)))
    spoilt = bytearray(content)
    spoilt[place] ^= draw.draw(st.integers(1, 255))
    assert "magic" in (said := refused(lambda: parse_idx(bytes(spoilt), "f", tuple(shape)))) or "dimensions" in said


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        (IMAGES, lambda c: c[:3], "starts with 0x000008; expected the magic number 0x00000803"),
        (IMAGES, lambda c: b"", "starts with 0x\\(nothing\\)"),
        (IMAGES, lambda c: c[:9], "ends inside its header, at 9 bytes; expected 16"),
        (IMAGES, lambda c: b"\0\0\x08\x01" + c[4:], "starts with 0x00000801; expected the magic number 0x00000803"),
        (IMAGES, lambda c: gzip.compress(c), "starts with 0x1f8b0800"),
        (IMAGES, lambda c: c[:4] + struct.pack(">I", 41) + c[8:], "says 41 x 4 x 4; expected the dimensions 40 x 4 x 4"),
        (IMAGES, lambda c: c[:-1], "has 639 bytes after its header; expected 640 for 40 x 4 x 4"),
        (IMAGES, lambda c: c + b"x", "has more than 640 bytes after its header"),
        (LABELS, lambda c: c[:-3] + b"\x02" + c[-2:], "has the label 2 at image 37; expected 0 to 1"),
        (LABELS, lambda c: idx(np.zeros(TRAIN - 1, np.uint8)), "says 39; expected the dimensions 40"),
    ],
)
def test_unpacked_files_are_refused_by_what_is_wrong(tmp_path, name, spoil, said):
    tiny = Digits()
    tiny.write(tmp_path, packed=False)
    (tmp_path / name).write_bytes(spoil(tiny.raw[name]))
    with pytest.raises(GeomsslError, match=f"{name} {said}") as caught:
        tiny.load(tmp_path)
    assert caught.value.reason == "damaged"


def flipped(content, place=-20):
    spoilt = bytearray(content)
    spoilt[place] ^= 1
    return bytes(spoilt)


@pytest.mark.parametrize(
    ("content", "spoil", "said"),
    [
        (False, lambda c: c[: len(c) // 2], r"has \d+ bytes; expected \d+ bytes, as published: it is cut off"),
        (False, flipped, r"has SHA-256 [0-9a-f]{16}\.\.\.; expected [0-9a-f]{16}\.\.\., as published"),
        (False, lambda c: gzip.compress(gzip.decompress(c), mtime=2), "has SHA-256"),
        (True, lambda c: c[: len(c) // 2], r"is cut off .*; expected a whole gzip file"),
        (True, flipped, "is damaged"),
        (True, lambda c: b"PK" + c[2:], "is damaged .*Not a gzipped file"),
        (True, lambda c: gzip.compress(flipped(gzip.decompress(c))), "holds bytes with SHA-256"),
        (True, lambda c: gzip.compress(bytes(10**7)), "starts with 0x00000000"),
        (True, lambda c: gzip.compress(gzip.decompress(c) + bytes(10**7)), "has more than 640 bytes after its header"),
    ],
)
def test_packed_files_are_refused_by_what_is_wrong(tmp_path, content, spoil, said):
    tiny = Digits(content=content)
    tiny.write(tmp_path)
    (tmp_path / f"{IMAGES}.gz").write_bytes(spoil(tiny.packed[f"{IMAGES}.gz"]))
    with pytest.raises(GeomsslError, match=f"{IMAGES}.gz {said}"):
        tiny.load(tmp_path)


def test_other_packings_pass_where_the_hash_of_the_content_is_known(tmp_path):
    tiny = Digits(content=True)
    tiny.write(tmp_path)
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(tiny.raw[IMAGES], 1, mtime=5))
    assert len(tiny.load(tmp_path)) == 36
    (tmp_path / f"{IMAGES}.gz").unlink()
    (tmp_path / IMAGES).write_bytes(flipped(tiny.raw[IMAGES]))
    with pytest.raises(GeomsslError, match="holds bytes with SHA-256"):
        tiny.load(tmp_path)


def test_a_bomb_is_read_no_further_than_it_should_be(tmp_path):
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    content, known = unpacked(path, Pinned("x/f.gz", 10**6, "", "0" * 64), 1000)
    assert (len(content), known) == (1001, False)


def test_files_are_found_below_the_root_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    tiny = Digits()
    root = tmp_path / "data"
    tiny.write(root / "mnist")
    assert tiny.load(root).watch.paths[0].parent == root / "mnist"
    assert tiny.load(root / "mnist").watch.paths[0].parent == root / "mnist"
    with pytest.raises(GeomsslError, match="dataset.root = .*dat: no such folder; .*did you mean 'data'"):
        tiny.load(tmp_path / "dat")
    monkeypatch.setenv("GEOMSSL_DATA", str(root))
    assert tiny.load(None).watch.paths[0].parent == root / "mnist"
    monkeypatch.setenv("GEOMSSL_DATA", str(tmp_path / "nothing"))
    with pytest.raises(GeomsslError, match="GEOMSSL_DATA=.*nothing: no such folder"):
        tiny.load(None)
    monkeypatch.delenv("GEOMSSL_DATA")
    tiny.write(tmp_path / "cache" / "mnist")
    assert tiny.load(None).watch.paths[0].parent == tmp_path / "cache" / "mnist"


def test_what_is_missing_is_named_with_where_it_was_sought_and_where_to_put_it(tmp_path):
    tiny = Digits()
    tiny.write(tmp_path)
    (tmp_path / f"{LABELS}.gz").unlink()
    for download, why in ((False, ""), (True, "cannot be fetched")):
        said = refused(lambda d=download: tiny.load(tmp_path, download=d))
        for part in (f"no {LABELS}.gz of mnist in {tmp_path}/mnist or {tmp_path}", why, "--set dataset.root=DIR",
                     "GEOMSSL_DATA=DIR", f"http://127.0.0.1:9/{LABELS}.gz", f"{len(tiny.packed[LABELS + '.gz'])} bytes"):
            assert part in said


@contextmanager
def served(answer):
    """A web server on this machine that answers every request by `answer(handler)`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sends(content, says=None, code=200):
    def answer(handler):
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(content) if says is None else says))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_download_is_whole_or_absent(tmp_path):
    content = bytes(range(256)) * 1000
    target = tmp_path / "cache" / "mnist"
    for answer, said in (
        (sends(content[:-1], len(content)), "cannot be fetched"),
        (sends(content[:-1]), "was thrown away; expected 256,000 bytes with SHA-256"),
        (sends(flipped(content)), "was thrown away"),
        (sends(content * 3), "was thrown away"),
        (sends(b"not here", code=404), "cannot be fetched"),
    ):
        with served(answer) as base, pytest.raises(GeomsslError, match=said):
            fetch("mnist", Pinned(f"{base}/f.gz", len(content), sha256(content)), None, True)
        assert left(target) == []
    with served(sends(content)) as base:
        path = fetch("mnist", Pinned(f"{base}/f.gz", len(content), sha256(content)), None, True)
    assert path.read_bytes() == content
    assert left(target) == ["f.gz"]


def test_what_is_fetched_is_found_again():
    with served(lambda handler: sends(tiny.packed[handler.path[1:]])(handler)) as base:
        tiny = Digits(base)
        first = tiny.load(None)
    assert torch.equal(every(tiny.load(None)), every(first))


def test_a_killed_download_does_not_pass_for_a_whole_one(tmp_path):
    content, begun, stop = bytes(range(256)) * 2000, threading.Event(), threading.Event()

    def stalls(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:-100])
        handler.wfile.flush()
        begun.set()
        stop.wait(30)

    code = (
        "import sys; from geomssl.data.releases import Pinned, fetch; "
        "fetch('mnist', Pinned(sys.argv[1], int(sys.argv[2]), sys.argv[3]), None, True)"
    )
    target = tmp_path / "cache" / "mnist"
    with served(stalls) as base:
        child = subprocess.Popen([sys.executable, "-c", code, f"{base}/f.gz", str(len(content)), sha256(content)])
        assert begun.wait(60)
        while not any(path.stat().st_size for path in target.iterdir()):
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        stop.set()
    assert not (target / "f.gz").exists()
    with served(sends(content)) as base:
        assert fetch("mnist", Pinned(f"{base}/f.gz", len(content), sha256(content)), None, True).read_bytes() == content


def test_a_release_that_changes_under_way_is_noticed(tmp_path):
    tiny = Digits()
    source = tiny.load(tiny.write(tmp_path))
    source.check()
    (tmp_path / f"{LABELS}.gz").write_bytes(b"shorter")
    with pytest.raises(GeomsslError, match=f"{LABELS}.gz has 7 bytes and had") as caught:
        source.check()
    assert caught.value.reason == "changed-data"


def test_datasets_says_what_is_here(tmp_path, monkeypatch, capsys):
    tiny = Digits()
    monkeypatch.setattr(MNIST, "release", tiny.release)

    def line(name):
        assert main(["datasets", "--root", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        at = next(k for k, text in enumerate(lines) if text.split()[0] == name)
        return lines[at].split()[1] == "here", lines[at + 1]

    assert main(["datasets", "--root", str(tmp_path / "none")]) == 2
    assert not capsys.readouterr().out
    assert line("digits")[0]
    assert line("mnist") == (False, line("mnist")[1])
    assert "no train-images-idx3-ubyte.gz, train-labels" in line("mnist")[1]
    tiny.write(tmp_path)
    assert line("mnist") == (True, f"{'':<21}50 (40 + 10) images; {tmp_path}")
    (tmp_path / f"{IMAGES}.gz").write_bytes(b"cut")
    assert "has 3 bytes, not" in line("mnist")[1]
    assert not line("cifar10")[0]


def test_named_sets_work_in_the_commands_wherever_they_lie(tmp_path, monkeypatch, capsys):
    tiny = Digits()
    monkeypatch.setattr(MNIST, "release", tiny.release)
    here, there = tiny.write(tmp_path / "here"), tmp_path / "there"
    run = tmp_path / "run.pt"
    train = ["train", "--dataset", "mnist", "--set", f"dataset.root={here}", "--epochs", "2", "--batch-size", "16"]
    assert main([*train, "--encoder", "mlp", "--out", str(run), "--quiet", "--stop-after", "1"]) == 0
    here.rename(there)
    assert main(["rank", "--checkpoint", str(run), "--quiet"]) == 2
    assert f"dataset.root = {here}: no such folder" in capsys.readouterr().err
    assert main(["rank", "--checkpoint", str(run), "--quiet", "--dataset", f"mnist:{there}"]) == 0
    assert main(["train", "--resume", str(run), "--quiet", "--set", f"dataset.root={there}"]) == 0
    other = tmp_path / "other"
    shutil.copytree(there, other)
    (other / f"{IMAGES}.gz").unlink()
    (other / IMAGES).write_bytes(flipped(tiny.raw[IMAGES]))
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--quiet", "--set", f"dataset.root={other}"]) == 2
    assert "[changed-data]" in capsys.readouterr().err
    there.rename(here)
    subject = from_checkpoint(run, {"root": str(here)})
    assert torch.equal(every(subject.source), every(tiny.load(here, "test")))
    assert torch.equal(every(subject.train), every(tiny.load(here, "train")))


FASHION = DEBIAN / "fashion-mnist"


@pytest.mark.skipif(not FASHION.is_dir(), reason="no real Fashion-MNIST here (Debian's package dataset-fashion-mnist)")
def test_the_real_fashion_mnist():
    train, val, test = (data.load("fashion-mnist", split, download=False) for split in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [54000, 6000, 10000]
    assert [part.labels.bincount().unique().tolist() for part in (train, val, test)] == [[5400], [600], [1000]]
    pixels = torch.cat([train.pixels, val.pixels]).double() / 255
    # the mean and deviation that its users normalise by
    assert pixels.mean().item() == pytest.approx(0.2860, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3530, abs=5e-5)
    assert FashionMNIST.presence().present
