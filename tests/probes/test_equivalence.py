"""equivalence: equal to float precision for exact backbones, apart for others, and the split of the difference adds up."""

import pytest
import torch
from torch import nn

from geomssl.encoders import build
from geomssl.encoders.base import Encoder
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.errors import GeomsslError
from geomssl.objectives.hssl import HSSL
from geomssl.probes.equivalence import Options, _frozen, compare, explained, probe, untouched
from geomssl.probes.equivalence import bundles as bundles_of
from geomssl.seeding import seeded
from geomssl.transforms.groups import CyclicRotations, Dihedral


class Shifting(Encoder):
    """Convolution, BatchNorm, ReLU, pooling by 2, twice over: circular padding is exact under shifts by multiples of 4."""

    def __init__(self, padding_mode="circular", width=6):
        super().__init__()
        self.dim, self.in_channels = width, 1
        stages = ((1, 5), (5, width))
        self.body = nn.Sequential(*(
            m for a, b in stages
            for m in (nn.Conv2d(a, b, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm2d(b), nn.ReLU(), nn.AvgPool2d(2))
        ))

    def fibres(self, images):
        return self.body(images)[:, :, None]

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


class Turning(Encoder):
    """Group convolution, BatchNorm, ReLU, pooling by 2, twice over: circular, so exact under turns and shifts by 4 together."""

    def __init__(self, group=None, padding_mode="circular"):
        super().__init__()
        self.dim, self.in_channels, self.group = 4, 1, group or CyclicRotations(4)
        self.convs = nn.ModuleList(
            GroupConv2d(a, b, 3, self.group, lifting=a == 1, padding=1, bias=False, padding_mode=padding_mode)
            for a, b in ((1, 3), (3, 4))
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(width) for width in (3, 4))

    def fibres(self, images):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = nn.functional.avg_pool3d(norm(conv(images)).relu(), (1, 2, 2))
        return images

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


class AsFibres(Encoder):
    """A plain CNN whose channels are read as four fibres: no structure."""

    def __init__(self):
        super().__init__()
        self.cnn = build("cnn", in_channels=1, widths=(4, 4, 16))
        self.dim, self.in_channels = 4, 1

    def fibres(self, images):
        return self.cnn.fibres(images).squeeze(2).unflatten(1, (4, 4))

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


class Reversed(Encoder):
    """An exact C4 backbone whose orientations are numbered the other way round: a broken action."""

    def __init__(self):
        super().__init__()
        self.inner = build("c4-cnn", in_channels=1, widths=(3, 4, 6))
        self.dim, self.in_channels, self.group = 6, 1, self.inner.group

    def fibres(self, images):
        return self.inner.fibres(images).flip(2)

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


def c4():
    return build("c4-cnn", in_channels=1, widths=(3, 4, 6))


def homomorphic(name, widths, **options):
    """A backbone of the paper over quarter turns; images of 8 x 8 are resampled to 9, which turns exactly."""
    return build(name, in_channels=1, widths=widths, size=9, kernel_size=3, **options)


def case(make, n=12, size=8, **settings):
    """An encoder with statistics that are not the identity, an objective on it, images and draws, in float64."""
    with seeded(0, "case"):
        encoder = make().double()
        config = HSSL.Config(**{"draws": "matched", "positives": "both", "projector": (7, 5), **settings})
        objective = HSSL(config, encoder, 0, 1).double()
        for module in (*encoder.modules(), *objective.modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.2, 0.6)
                nn.init.normal_(module.weight, 1.0, 0.1)
                nn.init.normal_(module.bias, 0.0, 0.1)
        # images of unlike contrast, so that their features are unlike too
        images = torch.rand(n, 1, size, size, dtype=torch.float64) ** torch.linspace(0.2, 5, n).view(-1, 1, 1, 1)
        return objective, encoder, images, torch.rand(n, 3)


EXACT = {
    "rotation": (c4, {}),
    "rotation, odd images, base 3, a bound": (c4, {"base": 3, "size": 9, "distance": 1.0, "metric": "group"}),
    "rotation, bilinear": (c4, {"critic": "bilinear", "beta": 2.0, "denominator": "nt-xent"}),
    "rotation, simsiam": (c4, {"method": "simsiam", "predictor": 6}),
    "translation, a patch": (Shifting, {"group": "translation", "size": 12, "base": 2, "base_counts": "side"}),
    "hssl-mnist": (lambda: homomorphic("hssl-mnist", (3, 4, 5)), {"base": 2}),
    "hssl-cifar10, full mixing": (
        lambda: homomorphic("hssl-cifar10", (3, 4, 5), stem=(2, 3), blocks=(1, 1, 1), mixing="full"), {"input_norm": True},
    ),
    "p4": (Turning, {"group": "p4", "size": 12}),
    "p4, even maps, a patch, a bound": (
        Turning, {"group": "p4", "size": 8, "base": 6, "distance": 2, "metric": "group", "invariance": "right"},
    ),
    "p4m": (lambda: Turning(Dihedral(4)), {"group": "p4", "size": 12, "base": 3}),
}  # fmt: skip
BROKEN = {
    "a plain cnn read as fibres": (AsFibres, {}),
    "a broken action": (Reversed, {}),
    "zero padding": (lambda: Shifting("zeros"), {"group": "translation", "size": 12}),
}


def whole(gradients):
    return torch.cat(list(gradients.values()))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_backbone_makes_the_losses_and_their_gradients_one(name, mode):
    make, settings = EXACT[name]
    found = compare(*case(make, **settings), mode)
    assert abs(found.gap) < 1e-10
    assert abs(found.defect) < 1e-10
    a, h = whole(found.gradients_a), whole(found.gradients_h)
    assert (a - h).abs().max() < 1e-10
    assert (a - h).norm() < 1e-9 * h.norm()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", [*BROKEN, "p4, zero padding"])
def test_another_backbone_does_not(name, mode):
    make, settings = BROKEN.get(name, (lambda: Turning(padding_mode="zeros"), {"group": "p4", "size": 12}))
    found = compare(*case(make, **settings), mode)
    a, h = whole(found.gradients_a), whole(found.gradients_h)
    assert abs(found.gap) > 1e-3
    assert (a - h).norm() > 0.1 * h.norm()
    assert found.moved > 0.1


def test_norms_alone_make_a_rest_and_no_defect():
    """Statistics a pass of its own for each view: the backbone is exact under frozen ones, the losses differ all the same."""

    class Apart(Encoder):
        def __init__(self):
            super().__init__()
            self.inner = c4()
            self.dim, self.in_channels, self.group = 6, 1, self.inner.group

        def fibres(self, images):
            return torch.cat([self.inner.fibres(half) for half in images.split(6)])

        def pool(self, fibres):
            return fibres.mean(dim=(2, 3, 4))

    # with rows that meet in other company the same image has other statistics; the order of the halves is what differs
    class Mixed(Apart):
        def fibres(self, images):
            order = torch.arange(len(images)).view(2, -1).T.flatten() if len(images) == 24 else torch.arange(len(images))
            return super().fibres(images[order])[order.argsort()]

    objective, encoder, images, draw = case(Mixed)
    found = compare(objective, encoder, images, draw, "train")
    assert abs(found.rest) > 1e-3
    assert compare(objective, encoder, images, draw, "eval").gap == pytest.approx(0, abs=1e-10)


def test_frozen_statistics_are_those_of_the_images_in_train_mode():
    """Of every layer at once: the un-augmented pass gives what it gives in training, so the path starts at h."""
    _, encoder, images, _ = case(c4)
    with untouched(encoder), torch.no_grad():
        expected = encoder.train().fibres(images)
        with _frozen(encoder, images):
            assert not encoder.training
            torch.testing.assert_close(encoder.fibres(images), expected, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(encoder.fibres(images[:4]), encoder.train().fibres(images[:4]))


@pytest.mark.parametrize("name", BROKEN)
def test_the_path_integral_is_the_difference_of_the_losses(name):
    """The fundamental theorem along the line from h to a, image by image; in eval mode nothing else is left."""
    make, settings = BROKEN[name]
    objective, encoder, images, draw = case(make, **settings)
    objective.eval()
    encoder.eval()
    with torch.no_grad():
        found = bundles_of(objective, encoder, images, draw)
        a, h = (objective.critic(objective.over_bundles, pair) for pair in found)
    parts = explained(objective, found)
    assert parts.shape == (12,)
    # the head's ReLU bends the path, so the rule is not exact
    assert parts.sum() == pytest.approx(float(a - h), abs=0.02 * abs(float(a - h)))
    report = compare(objective, encoder, images, draw, "eval")
    assert report.gap == pytest.approx(float(a - h), abs=1e-12)
    assert report.rest == pytest.approx(report.gap - float(parts.sum()), abs=1e-12)


def test_the_path_integral_of_a_smooth_head_is_exact():
    objective, encoder, images, draw = case(AsFibres, projector=(5,))
    objective.eval()
    encoder.eval()
    with torch.no_grad():
        found = bundles_of(objective, encoder, images, draw)
        gap = float(objective.critic(objective.over_bundles, found.a) - objective.critic(objective.over_bundles, found.h))
    assert float(explained(objective, found).sum()) == pytest.approx(gap, abs=1e-6)


def test_nothing_of_the_model_changes():
    objective, encoder, images, draw = case(c4)
    for module in (objective, encoder):
        module.float().eval().requires_grad_(False)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (objective, encoder)]
    with untouched(encoder, objective):
        assert next(encoder.parameters()).dtype == torch.float64
        compare(objective, encoder, images, draw, "train")
        compare(objective, encoder, images, draw, "eval")
    for module, state in zip((objective, encoder), states, strict=True):
        assert not any(part.training for part in module.modules())
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        for name, value in module.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name]), name


@pytest.fixture
def measured(make_subject):
    def measure(make, config=None, **options):
        with seeded(0, "encoder"):
            encoder = make()
            objective = None if config is None else HSSL(HSSL.Config(projector=(7, 5), **config), encoder, 0, 1)
            projector = nn.Linear(encoder.dim, 5, bias=False) if objective is None else objective.projector
        subject = make_subject(n=40, encoder=encoder, projector=projector, objective=objective)
        return probe(subject, Options(batch=8, **options))

    return measure


def test_the_artifact_of_an_exact_backbone_says_so(measured):
    found = measured(c4, {"base": 2})
    assert "equal to rounding in train and eval mode" in found.headline
    assert abs(found.metric("gap").value) < 1e-10
    assert found.metric("gradient_cosine").value == pytest.approx(1, abs=1e-10)
    assert found.metric("gap").n == 5
    assert found.metric("gap").interval.low <= found.metric("gap").value <= found.metric("gap").interval.high
    # what a report shows first: the gradients, and how far the backbone is from exact
    assert [m.name for m in found.metrics if m.better][:3] == ["gradient_cosine", "gradient_gap", "moved"]
    layers = found.table("layers").columns
    assert layers["layer"][0] == "encoder.convs.0"
    assert "head.0" in layers["layer"]
    assert all(c == pytest.approx(1, abs=1e-8) for c in layers["cosine_train"] if c is not None)
    assert len(found.table("batches")) == 10


def test_the_artifact_of_another_backbone_splits_the_difference(measured):
    found = measured(AsFibres)
    value = {m.name: m.value for m in found.metrics}
    assert value["gap"] == pytest.approx(value["loss_a"] - value["loss_h"])
    assert value["gap"] == pytest.approx(value["defect"] + value["rest"])
    assert "the backbone's defect explains" in found.headline
    assert value["gradient_cosine"] < 0.9
    assert "The run is no H-SSL" in found.notes[0]
    few = measured(AsFibres, batches=2)
    assert few.metric("gap").interval is None
    assert few.metric("gap").reason == "2 batches: too few for an interval over batches"


def test_byol_is_measured_with_the_online_network(measured):
    found = measured(c4, {"method": "byol", "predictor": 6})
    assert abs(found.metric("gap").value) < 1e-10
    assert any("BYOL is measured with its own predictor" in note for note in found.notes)


@pytest.mark.parametrize(
    ("make", "config", "options", "said", "reason"),
    [
        (c4, {"group": "scale", "positives": "inputs"}, {}, "scale, which has no exact form", "no-exact-form"),
        (c4, {}, {"group": "scale"}, "scale, which has no exact form", "no-exact-form"),
        (Shifting, None, {"group": "rotation"}, "more than one fibre along the group", "no-group"),
    ],
)
def test_what_has_no_answer_is_one_line(measured, make, config, options, said, reason):
    with pytest.raises(GeomsslError, match=said) as caught:
        measured(make, config, **options)
    assert caught.value.reason == reason
