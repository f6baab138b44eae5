"""cifar10 and cifar100 on tiny archives in the exact format: read right, or refused by name; no pickle, nothing extracted."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

from geomssl import data
from geomssl.data import cifar
from geomssl.data.cifar import CIFAR10, CIFAR100
from geomssl.data.releases import Pinned
from geomssl.errors import GeomsslError


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def flipped(content, place=-20):
    spoilt = bytearray(content)
    spoilt[place] ^= 1
    return bytes(spoilt)


def every(source):
    return source.images(torch.arange(len(source)))


def refused(call):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Photographs:
    """A tiny CIFAR: five batches and a test batch of records, names of classes, in a tar.gz of the release's member names."""

    def __init__(self, kind=CIFAR10, n=4, **changed):
        self.kind, self.n, official = kind, n, kind.release
        rng = np.random.default_rng(1)
        numbers = [number for _, number, _ in official.labels]
        names = [*official.train, *official.test]
        self.records = {}
        for k, name in enumerate(names):
            rows = rng.integers(0, 256, (n, official.record), dtype=np.uint8)
            for column, number in enumerate(numbers):
                rows[:, column] = (np.arange(n) + k) % number
            self.records[name] = rows
        self.members = {name: rows.tobytes() for name, rows in self.records.items()}
        for name, number, member in official.labels:
            self.members[member] = "".join(f"{name} {i}\n" for i in range(number)).encode() + b"\n"
        self.members |= changed.pop("members", {})
        self.archive = self.pack(**changed)

    def pack(self, without=(), extra=()):
        room = io.BytesIO()
        with tarfile.open(fileobj=room, mode="w:gz") as archive:
            for member, content in extra:
                archive.addfile(member, io.BytesIO(content))
            for name, content in self.members.items():
                if name not in without:
                    member = tarfile.TarInfo(f"{self.kind.release.folder}/{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        return room.getvalue()

    @property
    def release(self):
        official = self.kind.release
        pinned = Pinned(official.archive.url, len(self.archive), sha256(self.archive))
        return cifar.Release(
            pinned, official.folder, official.train, official.test, (self.n, self.n), official.labels, official.pickled
        )

    def load(self, root, split="train", **options):
        (root / self.release.archive.name).write_bytes(self.archive)
        return self.read(root, split, **options)

    def read(self, root, split="train", **options):
        return self.kind.load(self.kind.Config(root=str(root), download=False, **options), split, self.release)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_reads_what_is_in_the_records(tmp_path, kind):
    tiny = Photographs(kind)
    test = tiny.load(tmp_path, "test")
    rows = tiny.records[kind.release.test[0]]
    width = len(kind.release.labels)
    red, green, blue = (rows[0, width + 1024 * k : width + 1024 * (k + 1)].reshape(32, 32) for k in range(3))
    image = every(test)[0].numpy()
    assert np.array_equal(image, np.stack([red, green, blue]))
    assert test.labels.tolist() == rows[:, width - 1].tolist()
    train, val = tiny.read(tmp_path, "train", val=0.5), tiny.read(tmp_path, "val", val=0.5)
    assert len(train) + len(val) == 4 * len(kind.release.train)
    whole = np.concatenate([tiny.records[name] for name in kind.release.train])[:, width:]
    found = {image.numpy().tobytes() for image in torch.cat([every(train), every(val)])}
    assert found == {row.tobytes() for row in whole}


def test_cifar100_gives_fine_or_coarse_labels_and_the_other_as_a_factor(tmp_path):
    tiny = Photographs(CIFAR100, n=150)
    fine, coarse = (tiny.load(tmp_path, "train", labels=name) for name in ("fine", "coarse"))
    assert torch.equal(every(fine), every(coarse))
    assert torch.equal(fine.factors["coarse"].long(), coarse.labels)
    assert torch.equal(coarse.factors["fine"].long(), fine.labels)
    assert [len(fine.classes), len(coarse.classes)] == [100, 20]
    assert (fine.classes[7], coarse.classes[7]) == ("fine 7", "coarse 7")
    with pytest.raises(GeomsslError, match="'fine' or 'coarse'"):
        data.configure({"name": "cifar100", "labels": "rough"})


def test_unpacked_cifar_is_the_same(tmp_path):
    tiny = Photographs()
    packed = tiny.load(tmp_path)
    (tmp_path / tiny.release.archive.name).unlink()
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in tiny.members.items():
        (folder / name).write_bytes(content)
    assert tiny.read(tmp_path).fingerprint == tiny.read(folder).fingerprint == packed.fingerprint
    (folder / "data_batch_3.bin").write_bytes(tiny.members["data_batch_3.bin"][:-1])
    assert "data_batch_3.bin has 12,291 bytes; expected 12,292 bytes, as released" in refused(lambda: tiny.read(tmp_path))
    (folder / "data_batch_3.bin").unlink()
    assert "no " in (said := refused(lambda: tiny.read(tmp_path)))
    assert "data_batch_3.bin" in said


def link(name, target):
    member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member, b""


RECORD = 3073


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"members": {"data_batch_2.bin": bytes(4 * RECORD - 1)}}, "data_batch_2.bin in .* has 12,291 bytes; expected 12,292"),
        ({"members": {"data_batch_2.bin": bytes(5 * RECORD)}}, "data_batch_2.bin in .* has 15,365 bytes"),
        ({"members": {"data_batch_2.bin": bytes(2 * RECORD) + b"\x0a" + bytes(2 * RECORD - 1)}},
         "record 2 of cifar-10-batches-bin/data_batch_2.bin has the class label 10; expected 0 to 9"),
        ({"members": {"batches.meta.txt": b"cat\ndog\n"}}, "batches.meta.txt names 2 classes; expected 10"),
        ({"members": {"batches.meta.txt": bytes(10**6)}}, "batches.meta.txt in .* has 1,000,000 bytes; expected at most"),
        ({"without": ["data_batch_5.bin"]}, "has no member cifar-10-batches-bin/data_batch_5.bin"),
        ({"without": ["data_batch_1.bin"], "extra": [link("data_batch_1.bin", "/etc/passwd")]}, "is no plain file"),
    ],
)
def test_members_are_refused_by_what_is_wrong(tmp_path, changed, said):
    with pytest.raises(GeomsslError, match=said) as caught:
        Photographs(**changed).load(tmp_path)
    assert caught.value.reason == "damaged"


def test_the_archive_is_refused_by_its_size_hash_and_stream(tmp_path):
    tiny = Photographs()
    tiny.load(tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(tiny.archive[:-1])
    assert "as published: it is cut off or another file" in refused(lambda: tiny.read(tmp_path))
    path.write_bytes(flipped(tiny.archive))
    assert "has SHA-256" in refused(lambda: tiny.read(tmp_path))
    tiny.archive = tiny.archive[: len(tiny.archive) // 2]
    assert "is damaged" in refused(lambda: tiny.load(tmp_path))
    tiny.archive = b"no archive at all"
    assert "is damaged" in refused(lambda: tiny.load(tmp_path))


def test_nothing_of_an_archive_is_extracted(tmp_path):
    outside = tarfile.TarInfo("../escaped.txt")
    outside.size = 5
    root = tmp_path / "root"
    root.mkdir()
    Photographs(extra=[(outside, b"hello")]).load(root)
    assert [path.name for path in root.iterdir()] == ["cifar-10-binary.tar.gz"]
    assert not (tmp_path / "escaped.txt").exists()


def test_pickles_are_not_read(tmp_path):
    tiny = Photographs()
    (tmp_path / "cifar-10-batches-py").mkdir()
    said = refused(lambda: tiny.read(tmp_path))
    assert "cifar-10-batches-py holds pickles, which can run code and are not read" in said
    assert "cifar-10-binary.tar.gz" in said


def test_an_archive_that_changes_under_way_is_noticed(tmp_path):
    source = Photographs().load(tmp_path)
    source.check()
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(GeomsslError, match="cifar-10-binary.tar.gz is gone since it was read"):
        source.check()


def test_presence_of_the_archive_and_of_what_was_unpacked(tmp_path, monkeypatch):
    tiny = Photographs()
    monkeypatch.setattr(CIFAR10, "release", tiny.release)
    root = str(tmp_path)
    assert not CIFAR10.presence(root).present
    tiny.load(tmp_path)
    found = CIFAR10.presence(root)
    assert (found.present, found.images) == (True, "24 (20 + 4)")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"cut")
    assert "has 3 bytes, not" in CIFAR10.presence(root).where
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    for name, content in tiny.members.items():
        (tmp_path / name).write_bytes(content)
    assert CIFAR10.presence(root).present
    (tmp_path / "test_batch.bin").unlink()
    assert not CIFAR10.presence(root).present
