"""Segmentation: scores against scikit-learn, the hypernetwork against a copy pixel by pixel, and what a planted map gives."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import Tensor, nn

from geomssl import encoders
from geomssl.data.base import Resident, to_unit
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.probes import overlap
from geomssl.probes.decoders import Hyper, Linear, Standardised, places
from geomssl.probes.segment import Options, probe
from geomssl.probes.segmenter import Masks, Schedule, fit
from geomssl.probes.subject import Subject

SIZE = 16


class Patches(Resident):
    """Grey noise with one red or green rectangle: region 1 or 2, background 0, and a row without a name."""

    regions = ("background", "red", "green")

    def masks(self, indices: Tensor) -> Tensor:
        return self.true[indices]

    @classmethod
    def drawn(cls, n: int, seed: int, split: str = "test", objects: int | None = None) -> Patches:
        draw = torch.Generator().manual_seed(seed)
        pixels = torch.randint(40, 90, (n, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
        true = torch.zeros(n, SIZE, SIZE, dtype=torch.long)
        for i in range(n):
            top, left = torch.randint(0, SIZE // 2, (2,), generator=draw).tolist()
            kind = i % 2
            true[i, top : top + 8, left : left + 8] = 1 + kind
            pixels[i, :, top : top + 8, left : left + 8] = 20
            pixels[i, kind, top : top + 8, left : left + 8] = 230
        true[:, 0] = -1
        factors = {} if objects is None else {"object": torch.arange(n) % objects}
        found = cls("patches", split, pixels, torch.arange(n) % 2, ("red", "green"), factors)
        found.true = true
        return found


class Pooled(Encoder):
    """Means over 2x2 pixels through a 1x1 convolution with a norm; `blind` sees nothing but a constant."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.in_channels, self.dim, self.blind = 3, 6, blind
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))

    def fibres(self, images: Tensor) -> Tensor:
        return self.body(images * 0 if self.blind else images)[:, :, None]

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))


def made(n: int = 24, known: int = 40, **parts: object) -> Subject:
    given = {
        "encoder": Pooled(), "source": Patches.drawn(n, 1), "train": Patches.drawn(known, 2, "train"),
        "untrained": lambda: Pooled(blind=True), "batch_size": 8, "provenance": {"run": "patches"},
    }
    return Subject(**{**given, **parts})


def test_scores_are_scikit_learns_over_named_pixels() -> None:
    draw = torch.Generator().manual_seed(0)
    true = torch.randint(-1, 4, (5, 7, 7), generator=draw)
    said = torch.randint(0, 4, (5, 7, 7), generator=draw)
    named = true >= 0
    t, p = true[named].numpy(), said[named].numpy()
    found = overlap.scores(overlap.counts(said, true, 4).sum(dim=0)).tolist()
    assert found == pytest.approx([jaccard_score(t, p, average="macro"), balanced_accuracy_score(t, p), accuracy_score(t, p)])


def test_regions_that_are_nowhere_count_nowhere() -> None:
    """Of four regions two occur: perfect predictions score 1, and one wrong region more is a zero in the mean of IoU alone."""
    true = torch.tensor([[[0, 0], [2, 2]]])
    assert overlap.scores(overlap.counts(true, true, 4).sum(dim=0)).tolist() == [1, 1, 1]
    wrong = torch.tensor([[[0, 3], [2, 2]]])
    found = overlap.scores(overlap.counts(wrong, true, 4).sum(dim=0)).tolist()
    assert found == pytest.approx([(0.5 + 1 + 0) / 3, 0.75, 0.75])


def test_what_has_no_name_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    true = torch.randint(0, 3, (2, 6, 6), generator=draw)
    true[:, 2:4] = -1
    said = torch.randint(0, 3, (2, 6, 6), generator=draw)
    other = torch.where(true < 0, 2 - said, said)
    assert torch.equal(overlap.counts(said, true, 3), overlap.counts(other, true, 3))
    with pytest.raises(GeomsslError, match="-1 to 1"):
        overlap.counts(said, true, 2)


def test_intervals_draw_whole_units() -> None:
    """Every image twice, both in one unit, gives the images' own interval; as units of their own, a narrower one."""
    draw = torch.Generator().manual_seed(2)
    true = torch.randint(0, 2, (12, 4, 4), generator=draw)
    said = torch.where(torch.rand(12, 4, 4, generator=draw) < 0.7, true, 1 - true)
    once = overlap.counts(said, true, 2)
    one = overlap.scored(once, torch.arange(12), 0)
    twice = overlap.scored(once.repeat(2, 1, 1), torch.arange(12).repeat(2), 0)
    assert torch.allclose(one.low, twice.low)
    assert torch.allclose(one.high, twice.high)
    apart = overlap.scored(once.repeat(2, 1, 1), torch.arange(24), 0)
    assert ((apart.high - apart.low) < (one.high - one.low)).all()
    assert overlap.scored(once[:1], torch.zeros(1, dtype=torch.long), 0).low.isnan().all()


def test_every_resample_has_the_mean_over_the_same_regions() -> None:
    """Each image has a region of its own, all of it found: a region that a resample lacks must not move the mean."""
    true = torch.arange(6)[:, None, None].expand(6, 3, 3)
    found = overlap.scored(overlap.counts(true, true, 6), torch.arange(6), 0)
    assert (found.drawn == 1).all()
    # always region 0: IoU 1/6 there, 0 elsewhere; the mean must not rise to 1/K' of the regions that are left
    said = torch.zeros_like(true)
    always = overlap.scored(overlap.counts(said, true, 6), torch.arange(6), 0)
    # accuracy 1 of one region out of six in every resample
    assert torch.allclose(always.drawn[:, 1], torch.full_like(always.drawn[:, 1], 1 / 6))


def pixel(model: Hyper, place: Tensor, colours: Tensor, y: float, x: float) -> Tensor:
    """One pixel's logits, written out."""
    weight = model.make.weight.detach().double().flatten(1) @ (
        model.signal.weight.detach().double().flatten(1) @ place.double() + model.signal.bias.detach().double()
    ).clamp(min=0) + model.make.bias.detach().double()
    inputs = torch.cat([2 * colours.double() - 1, torch.tensor([y, x], dtype=torch.float64)])
    k, w, i = model.regions, model.width, model.inputs
    first, lift = weight[: w * i].view(w, i), weight[w * i : w * i + w]
    second, bias = weight[w * i + w : w * i + w + k * w].view(k, w), weight[-k:]
    return second @ (first @ inputs + lift).clamp(min=0) + bias


def test_the_hypernetwork_is_the_stated_network_at_every_pixel() -> None:
    torch.manual_seed(3)
    model = Hyper(5, (2, 4), 3, 3, 8, width=4, signal=6)
    maps, images = torch.randn(2, 5, 2, 4), torch.rand(2, 3, 8, 8)
    found = model(maps, images)
    assert found.shape == (2, 3, 8, 8)
    for n, row, column in ((0, 0, 0), (1, 3, 5), (1, 7, 7), (0, 4, 2)):
        y, x = (row % 4 + 0.5) / 2 - 1, (column % 2 + 0.5) - 1
        wanted = pixel(model, maps[n, :, row // 4, column // 2], images[n, :, row, column], y, x)
        assert torch.allclose(found[n, :, row, column].double(), wanted, atol=1e-5)


def test_a_place_moves_its_own_patch_alone() -> None:
    torch.manual_seed(4)
    model = Hyper(5, (4, 4), 3, 1, 16)
    maps, images = torch.randn(1, 5, 4, 4), torch.rand(1, 1, 16, 16)
    moved = maps.clone()
    moved[0, :, 1, 2] += 1
    change = (model(moved, images) - model(maps, images)).abs().sum(dim=1)[0]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 8:12] = True
    assert (change[~inside] == 0).all()
    assert (change[inside] > 0).all()


@pytest.mark.parametrize("grid", [(3, 3), (1, 1), (7, 5)])
def test_maps_that_do_not_divide_the_image_are_read(grid: tuple[int, int]) -> None:
    found = Hyper(4, grid, 2, 3, 16)(torch.randn(2, 4, *grid), torch.rand(2, 3, 16, 16))
    assert found.shape == (2, 2, 16, 16)
    assert found.isfinite().all()


def test_a_linear_decoder_needs_a_map() -> None:
    with pytest.raises(GeomsslError, match="hypernetwork") as caught:
        Linear(4, (1, 1), 2, 3, 16)
    assert caught.value.reason == "no-map"


def test_standardised_places_have_mean_zero_and_variance_one_and_constants_weigh_nothing() -> None:
    sample = torch.randn(8, 3, 4, 4) * torch.tensor([2.0, 1e3, 0.0]).view(1, 3, 1, 1) + 5
    found = Standardised(sample)(sample)
    assert torch.allclose(found.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(found.std(dim=(0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4)


def test_orientations_lie_side_by_side() -> None:
    fibres = torch.arange(2 * 3 * 4 * 5 * 5.0).view(2, 3, 4, 5, 5)
    assert torch.equal(places(fibres)[:, 7], fibres[:, 1, 3])


@pytest.mark.parametrize("decoder", ["linear", "hypernetwork"])
def test_what_the_map_shows_is_found_and_what_it_does_not_is_not(decoder: str) -> None:
    """Colours are in the map, so both decoders find the rectangles; a blind map gives the linear one nothing but chance."""
    found = probe(made(), Options(decoder=decoder, steps=150, rate=2e-2, step_images=8, show=3))
    values = {m.name: m.value for m in found.metrics}
    assert values["miou"] > 0.75
    assert values["overall_accuracy"] > 0.9
    if decoder == "linear":
        assert values["miou_random"] == pytest.approx(values["miou_chance"])
        gain = found.metric("miou_gain_over_random")
        assert gain.interval.low > 0.3
    share = float((Patches.drawn(24, 1).true[:, 1:] == 0).double().mean())
    assert values["overall_accuracy_chance"] == pytest.approx(share)
    assert values["miou_chance"] == pytest.approx(share / 3)
    assert values["mean_accuracy_chance"] == pytest.approx(1 / 3)
    regions = found.table("regions").columns
    assert regions["region"] == ["background", "red", "green"]
    assert sum(regions["share"]) == pytest.approx(1)
    assert sum(regions["iou"]) / 3 == pytest.approx(values["miou"])
    assert found.files["masks.png"][:4] == b"\x89PNG"


def test_two_runs_are_equal_and_the_encoder_stays_as_it_was() -> None:
    subject = made()
    before = {k: v.clone() for k, v in subject.encoder.state_dict().items()}
    options = Options(steps=5, step_images=4, beside=False)
    for frozen in (True, False):
        chosen = options.model_copy(update={"frozen": frozen})
        one, two = (probe(subject, chosen) for _ in range(2))
        assert [m.value for m in one.metrics] == [m.value for m in two.metrics]
        assert all(torch.equal(before[k], v) for k, v in subject.encoder.state_dict().items())
        assert not subject.encoder.training
        assert not any(p.requires_grad for p in subject.encoder.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_learns_along_only_where_it_is_asked_to(frozen: bool) -> None:
    subject = made()
    how = Schedule(4, 8, 1e-2, frozen, "linear", 0)
    model = fit(subject, torch.arange(40), 3, how)
    weights = zip(subject.encoder.parameters(), model.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights) == frozen
    assert not model.encoder.training
    for name, value in subject.encoder.named_buffers():
        assert torch.equal(value, dict(model.encoder.named_buffers())[name]), "statistics of norms stay"


def test_few_steps_on_many_images_give_what_cached_features_give() -> None:
    """The two ways to the frozen features: the cache, and a pass in the step."""
    subject = made(known=24)
    how = Schedule(3, 8, 1e-2, True, "linear", 0)
    cached = fit(subject, torch.arange(23), 3, how)
    again = made(known=24)
    again.features = lambda *given: pytest.fail("24 images in 24 draws are not worth a cache")  # type: ignore[method-assign]
    passing = fit(again, torch.arange(24), 3, how)
    assert all(p.isfinite().all() for p in passing.parameters())
    images = to_unit(subject.source.images(torch.arange(2)))
    assert cached(images).shape == passing(images).shape


def test_masks_are_the_same_from_memory_and_from_the_source() -> None:
    source, rows = Patches.drawn(9, 3), torch.tensor([4, 1, 8])
    chosen = torch.tensor([2, 0, 0])
    assert torch.equal(Masks(source, rows, 2**20)[chosen], Masks(source, rows, 0)[chosen])
    assert torch.equal(Masks(source, rows, 2**20)[chosen], source.true[torch.tensor([8, 4, 4])])


def test_images_without_a_named_pixel_train_nothing_and_break_nothing() -> None:
    train = Patches.drawn(8, 2, "train")
    train.true = torch.full_like(train.true, -1)
    model = fit(made(train=train), torch.arange(8), 3, Schedule(3, 4, 1e-2, True, "linear", 0))
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(GeomsslError, match="without one named pixel"):
        probe(made(train=train), Options(steps=1, beside=False))


def test_objects_are_resampled_where_the_set_tells_them() -> None:
    found = probe(made(source=Patches.drawn(24, 1, objects=4)), Options(steps=2, beside=False))
    assert "over objects" in found.metric("miou").interval.method
    one = probe(made(source=Patches.drawn(24, 1, objects=1)), Options(steps=2, beside=False))
    assert one.metric("miou").interval is None
    assert one.metric("miou").reason


def test_what_cannot_be_measured_is_one_line(make_subject) -> None:
    with pytest.raises(GeomsslError, match="no masks") as caught:
        probe(make_subject(), Options())
    assert caught.value.reason == "no-masks"
    subject = made()
    subject.encoder.train()
    with pytest.raises(GeomsslError) as caught:
        probe(subject, Options())
    assert caught.value.reason == "not-frozen"
    with pytest.raises(GeomsslError, match="training split"):
        probe(dataclasses.replace(made(), train=None), Options())


def test_the_other_set_takes_its_own_settings() -> None:
    found = probe(made(), Options(to="views", to_set=("views.classes=3",), steps=1, n=12, train_n=12, beside=False, show=0))
    assert len(found.table("regions")) == 4, "the background and three classes"
    with pytest.raises(GeomsslError, match="without --to"):
        probe(made(), Options(to_set=("views.classes=3",)))


def test_another_data_set_is_brought_to_the_encoders_images() -> None:
    """views at the side of the subject's own images, with its masks; the subject itself is not changed."""
    subject = made()
    found = probe(subject, Options(to="views", steps=1, n=12, train_n=12, beside=False, show=2))
    assert found.provenance["dataset"] == "views"
    assert found.table("regions").columns["region"][0] == "background"
    assert len(found.table("regions")) == 9
    assert subject.source.name == "patches"
    assert "dataset" not in subject.provenance


def test_the_picture_shows_images_from_all_over_the_split() -> None:
    found = probe(made(), Options(steps=1, beside=False, show=4, side=16))
    assert "Images 0, 8, 15, 23 of the split" in next(f for f in found.figures if f.kind == "image").caption
    sheet = Image.open(io.BytesIO(found.files["masks.png"]))
    assert sheet.size == (3 * 16, 4 * 16)
    pixels = torch.from_numpy(np.array(sheet))
    source = Patches.drawn(24, 1)
    wanted = source.images(torch.tensor([0, 8, 15, 23])).permute(0, 2, 3, 1)
    assert torch.equal(pixels[:, :16].reshape(4, 16, 16, 3), wanted)
    true = source.masks(torch.tensor([0, 8, 15, 23]))
    painted = pixels[:, 16:32].reshape(4, 16, 16, 3)
    assert (painted[true < 0] == 0).all()
    assert len({tuple(c) for c in painted[true >= 0].tolist()}) == 3


@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        ("c4-cnn", {"widths": [4, 4, 4]}, (16, 4, 4)), ("mlp", {"size": 16}, None),
        ("vit-small", {"size": 16, "width": 24, "depth": 1, "heads": 2}, (24, 4, 4)),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_group_maps_tokens_and_single_places_are_read(name: str, options: dict, grid: tuple | None, frozen: bool) -> None:
    """Orientations lie side by side, tokens on their grid; an encoder that learnt along is the one that its weights say."""
    torch.manual_seed(0)
    subject = made(n=4, known=8, encoder=encoders.build(name, in_channels=3, **options))
    model = fit(subject, torch.arange(8), 3, Schedule(2, 4, 1e-2, frozen, "hypernetwork", 0))
    images = to_unit(subject.source.images(torch.arange(4)))
    if grid is not None:
        assert places(model.encoder.fibres(images)).shape == (4, *grid)
    fresh = encoders.build(name, in_channels=3, **options).eval().requires_grad_(False)
    fresh.load_state_dict(model.encoder.state_dict())
    assert torch.equal(model.encoder.fibres(images), fresh.fibres(images)), "no filters of an earlier step are left"
    assert model(images).shape == (4, 3, SIZE, SIZE)
