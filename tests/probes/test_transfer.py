"""Transfer: images are brought to the encoder by the stated rule, each set is measured on its own splits, chance is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from geomssl import data
from geomssl.cli import main
from geomssl.data.base import Resident
from geomssl.data.derived import Fitted, fitted
from geomssl.errors import GeomsslError
from geomssl.probes import elsewhere
from geomssl.probes.linear import fit
from geomssl.probes.subject import Subject
from geomssl.probes.transfer import Options, probe


def resident(channels: int, size: int, n: int = 5, seed: int = 0) -> Resident:
    pixels = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Resident("noise", "test", pixels, torch.arange(n) % 2)


def test_colour_becomes_grey_as_in_pillow_and_grey_is_repeated() -> None:
    source = resident(3, 8)
    grey = Fitted(source, 1, 8).images(torch.arange(5))
    for image, found in zip(source.pixels, grey, strict=True):
        theirs = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).convert("L")))
        assert (found[0].long() - theirs.long()).abs().max() <= 1, "Pillow rounds in whole numbers"
    colour = Fitted(resident(1, 8), 3, 8).images(torch.arange(5))
    assert torch.equal(colour, resident(1, 8).pixels.expand(-1, 3, -1, -1))


def test_sides_are_brought_by_area_and_by_lines() -> None:
    """Halving by the antialiased filter keeps a mean and a constant; the ends of a ramp stay within it when enlarged."""
    flat = Resident("flat", "test", torch.full((1, 1, 8, 8), 77, dtype=torch.uint8), None)
    assert (Fitted(flat, 1, 4).images(torch.tensor([0])) == 77).all()
    checks = ((torch.arange(24)[:, None] + torch.arange(24)) % 2 * 255).to(torch.uint8)[None, None]
    board = Fitted(Resident("board", "test", checks, None), 1, 8).images(torch.tensor([0])).float()
    # the middles of 3x3 squares are pixels: without a prefilter they would show 0 or 255
    assert (board[..., 1:-1, 1:-1] - 127.5).abs().max() <= 4
    source = resident(3, 8)
    wanted = F.interpolate(source.pixels.double(), (12, 12), mode="bilinear")
    found = Fitted(source, 3, 12).images(torch.arange(5)).double()
    assert (found - wanted).abs().max() <= 0.5 + 1e-4, "rounded, without a prefilter where nothing shrinks"


def test_a_source_that_fits_is_itself_and_another_has_a_fingerprint_of_its_own() -> None:
    source = resident(3, 8)
    assert fitted(source, 3, 8) is source
    assert len({source.fingerprint, fitted(source, 1, 8).fingerprint, fitted(source, 3, 4).fingerprint}) == 3
    assert torch.equal(fitted(source, 3, 4).labels, source.labels)
    with pytest.raises(GeomsslError, match="2 channels"):
        fitted(resident(2, 8), 3, 8)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The small subject carried to a folder of bright and dark pictures, and to digits themselves."""
    root = tmp_path_factory.mktemp("birds")
    draw = torch.Generator().manual_seed(0)
    for split, each in (("train", 12), ("test", 6)):
        for c, name in enumerate(("dark", "bright")):
            (root / split / name).mkdir(parents=True)
            for k in range(each + c):
                pixels = torch.randint(150 * c, 150 * c + 100, (10, 14, 3), generator=draw).byte()
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{k}.png")
    return root


def test_each_set_is_measured_on_its_own_splits(make_subject, found) -> None:
    artifact = probe(make_subject(), Options(to=(f"folder:{found}", "digits"), train_n=150, n=100))
    rows = artifact.table("transfer").columns
    assert rows["features"] == ["encoder", "random encoder", "chance"] * 2
    name = rows["dataset"][0]
    assert rows["trained_on"] == [25] * 3 + [150] * 3
    assert rows["n"] == [13] * 3 + [100] * 3
    assert artifact.metric(f"linear_{name}").value == 1.0, "brightness is in every feature"
    assert artifact.metric(f"chance_{name}").value == pytest.approx(7 / 13), "the training images have one more bright one"
    both = [artifact.metric(f"linear_{n}").value for n in (name, "digits")]
    assert artifact.metric("linear_mean").value == pytest.approx(sum(both) / 2)
    gain = artifact.metric("linear_digits").value - artifact.metric("random_digits").value
    assert artifact.metric("gain_digits").value == pytest.approx(gain)
    assert rows["class_mean"][2] is None


def test_its_own_data_set_gives_the_accuracy_of_the_classifier_itself(make_subject) -> None:
    subject = make_subject(source=data.load("digits", "test"), train=data.load("digits", "train"))
    artifact = probe(subject, Options(to=("digits",), beside=False))
    known = subject.features(torch.arange(len(subject.train)), "h", "train")
    classifier = fit(known, subject.train.labels, 0)
    said = classifier.predict(subject.features(torch.arange(len(subject.source))))
    assert artifact.metric("linear_digits").value == float((said == subject.source.labels).double().mean())


def test_the_encoder_sees_images_of_its_own_size_and_channels(make_subject) -> None:
    """views are in colour and of any size; the encoder was made for 8x8 grey ones."""
    seen = []
    subject = make_subject()
    forward = subject.encoder.forward
    subject.encoder.forward = lambda images: seen.append(tuple(images.shape[1:])) or forward(images)
    probe(subject, Options(to=("views",), n=20, train_n=20, beside=False))
    assert set(seen) == {(1, 8, 8)}


@pytest.mark.parametrize(("to", "said"), [((), "--to NAME"), (("fields",), "no labels"), (("digit",), "digits")])
def test_what_cannot_be_carried_to_is_one_line(make_subject, to, said) -> None:
    with pytest.raises(GeomsslError) as caught:
        probe(make_subject(), Options(to=to))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_carried_set_takes_its_own_settings(make_subject, found) -> None:
    """Another seed, other objects; the side stays the encoder's, whatever is said."""
    chosen = ("views.n=20", "views.seed=1", "views.classes=2")
    artifact = probe(make_subject(), Options(to=("views",), to_set=chosen, beside=False))
    wanted = fitted(data.load("views", "test", n=20, seed=1, classes=2, size=8), 1, 8)
    assert artifact.table("transfer").columns["images_sha256"][0] == wanted.fingerprint
    assert artifact.table("transfer").columns["classes"][0] == 2
    folder = f"folder:{found}"
    sizes = [elsewhere.source(folder, "test", 1, 8, chosen=elsewhere.settings((folder,), [f"folder.{key}"])).size
             for key in ("seed=1", "size=5")]
    assert sizes == [8, 8]


@pytest.mark.parametrize(("to_set", "said"), [
    ("dtd.partition=2", "digits"), ("views=2", "views.KEY=VALUE"), ("views.sed=1", "seed"), ("views.seed", "views.seed=1"),
    ("views.seed=-1.5", "seed"),
])
def test_a_wrong_setting_of_a_carried_set_is_one_line(make_subject, to_set, said) -> None:
    with pytest.raises(GeomsslError) as caught:
        probe(make_subject(), Options(to=("views", "digits"), to_set=(to_set,)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_fetched_unless_it_is_asked_for(make_subject, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GEOMSSL_CACHE", str(tmp_path))
    monkeypatch.delenv("GEOMSSL_DATA", raising=False)
    asked: list[str] = []
    monkeypatch.setattr("pooch.retrieve", lambda *given, **how: asked.append("net"))
    with pytest.raises(GeomsslError, match="cifar-10-binary"):
        probe(make_subject(), Options(to=("cifar10",)))
    assert not asked


def test_an_encoder_in_training_mode_is_refused(make_subject) -> None:
    subject: Subject = make_subject()
    subject.encoder.train()
    with pytest.raises(GeomsslError) as caught:
        probe(subject, Options(to=("digits",)))
    assert caught.value.reason == "not-frozen"


def test_the_command_names_the_missing_set_in_one_line(tmp_path, capsys) -> None:
    given = ["transfer", "--encoder", "cnn", "--to", f"dtd:{tmp_path}", "--out", str(tmp_path / "a"), "--device", "cpu"]
    assert main([*given, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "dtd" in said
    assert said.count("\n") == 1
