"""The Lie derivative: closed forms, exact equivariance of periodic convolutions, shares that add up, and what is refused."""

import json
import math

import pytest
import torch
from torch import nn

from geomssl import artifact, data, encoders
from geomssl.data.base import Resident
from geomssl.data.rendered import Fields, Phantoms
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.probes import lie, shares
from geomssl.probes.generators import GENERATORS, differences, tangent
from geomssl.probes.lie import Options, lie_derivative, probe
from geomssl.probes.subject import Subject

DOUBLE = torch.float64
SIDE = 11


def plane(size=SIDE):
    """x to the right and y down, from the centre of the image, (1, 1, size, size)."""
    line = torch.arange(size, dtype=DOUBLE) - (size - 1) / 2
    return line.expand(1, 1, size, size), line.view(-1, 1).expand(1, 1, size, size)


X, Y = plane()
# what d/dt T_{g_t} f is for f = x^2 - y^2, x right, y down; turns are anticlockwise as displayed
FORMS = {
    "rotate": -4 * X * Y, "zoom": -2 * (X**2 - Y**2), "shear": 2 * X * Y, "translate-x": -2 * X, "translate-y": 2 * Y,
    "brightness": X**2 - Y**2,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_of_a_quadratic_it_is_the_closed_form(name):
    image = X**2 - Y**2
    if name == "brightness":
        image = image.abs() / 60
        assert torch.allclose(lie_derivative(nn.Identity(), image, name), image, atol=1e-12)
        return
    assert (lie_derivative(nn.Identity(), image, name, action="trivial") - FORMS[name]).abs().max() < 1e-10
    assert lie_derivative(nn.Identity(), image, name, action="spatial").abs().max() < 1e-12


@pytest.mark.parametrize("name", ["translate-x", "translate-y", "rotate", "zoom", "shear"])
def test_of_one_rendered_plane_wave_it_is_the_closed_form(name):
    pictures = Fields(5, 1, 16, 0.3, waves=1, contrast=0.1, seed=2)
    waves, real, imaginary, _ = pictures._drawn(torch.arange(5))
    x, y = plane(16)
    phase = 2 * math.pi * (waves[:, :1, 1:, None] * x + waves[:, :1, :1, None] * y)
    slope = -2 * math.pi * (real[..., None] * phase.sin() + imaginary[..., None] * phase.cos())
    along_x, along_y = slope * waves[:, :1, 1:, None], slope * waves[:, :1, :1, None]
    velocity = {"translate-x": (1, 0), "translate-y": (0, 1), "rotate": (y, -x), "zoom": (x, y), "shear": (-y, 0)}[name]
    found = lie_derivative(nn.Identity(), pictures, name, action="trivial", dtype=DOUBLE)
    expected = -(velocity[0] * along_x + velocity[1] * along_y)
    assert (found - expected).abs().max() < 1e-12 * max(1.0, float(expected.abs().max()))


class Head(nn.Module):
    """A vector that is no linear function of the image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.mix = nn.Linear(4 * 16 * 16, 5)

    def forward(self, images):
        return self.mix(self.conv(images).tanh().flatten(1)).tanh()


FIELDS, PHANTOMS = Fields(4, 1, 16), Phantoms(4, 1, 16)


@pytest.mark.parametrize(
    ("name", "pictures"),
    # contrast pushes a black background below 0, where values are cut: a kink
    [("rotate", PHANTOMS), ("zoom", FIELDS), ("shear", PHANTOMS), ("translate-y", FIELDS), ("brightness", PHANTOMS),
     ("contrast", FIELDS)],
)
def test_of_a_vector_it_is_the_limit_of_small_movements(name, pictures):
    torch.manual_seed(0)
    model, g, h = Head().double().requires_grad_(False), GENERATORS[name], 1e-5

    def moved(t):
        return model(pictures.images(torch.arange(4), g.transform, g.params(torch.tensor(t, dtype=DOUBLE), 4), DOUBLE))

    found = lie_derivative(model, pictures, name)
    assert (found - (moved(h) - moved(-h)) / (2 * h)).abs().max() < 1e-8
    assert found.abs().max() > 1e-3


def test_hue_is_the_limit_of_small_turns_and_grey_does_not_move():
    images = torch.rand(4, 3, 6, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    hue = GENERATORS["hue"].transform
    h = 1e-6
    limit = (hue(images, torch.full((4, 1), h)) - hue(images, torch.full((4, 1), -h))) / (2 * float(torch.tensor(h)))
    assert (tangent(images, GENERATORS["hue"]) - limit).abs().max() < 1e-4
    assert tangent(images.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous(), GENERATORS["hue"]).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_circular_convolutions_commute_with_shifts_and_strided_ones_while_nothing_folds(dtype):
    torch.manual_seed(0)
    closed = {"padding_mode": "circular"}
    plain = nn.Sequential(nn.Conv2d(1, 3, 5, 1, 2, **closed), nn.Conv2d(3, 2, 3, 1, 1, **closed))
    strided = nn.Sequential(plain, nn.Conv2d(2, 2, 3, 2, 1, **closed))
    low, high = (
        Fields(6, 1, 24, b, periodic=True, contrast=None).images(torch.arange(6), dtype=dtype) for b in (0.24, 0.4)
    )
    tiny = 1e-11 if dtype == DOUBLE else 1e-4
    for model, images, exact in ((plain, low, True), (plain, high, True), (strided, low, True), (strided, high, False)):
        model = model.to(dtype).requires_grad_(False)
        for name in ("translate-x", "translate-y"):
            found = lie_derivative(model, images, name, difference="spectral")
            size = lie_derivative(model, images, name, action="trivial", difference="spectral").abs().max()
            assert (found.abs().max() < tiny * size) if exact else (found.abs().max() > 0.05 * size)


def test_the_scale_of_a_map_is_its_stride_not_the_ratio_of_sizes():
    """33 -> 17 at stride 2: pixels divided by 33/17 would leave an error."""
    strided = nn.Conv2d(1, 1, 1, 2).double().requires_grad_(False)
    x, y = plane(33)
    for image in (x, y):
        for name in ("translate-x", "translate-y", "zoom", "rotate"):
            assert lie_derivative(strided, image, name).abs().max() < 1e-12


def subject(name="cnn", n=24, size=12, channels=1, kind="fields", module=None, **options):
    torch.manual_seed(0)
    source = data.load(kind, "test", size=size, n=n, channels=channels, **({"bandwidth": 0.4} if kind == "phantoms" else {}))
    encoder = module or encoders.build(name, in_channels=channels, **{"widths": (3, 4, 5), **options})
    return Subject(encoder, source, dtype=DOUBLE, batch_size=7, provenance={"run": name})


def rows(found, table="lie"):
    columns = found.table(table).columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_all_layers_of_one_pass_are_what_each_gives_alone():
    made = subject()
    found = rows(probe(made, Options(layer=("convs.0", "norms.1", "fibres", "h"), generator=("zoom", "translate-y"))))
    assert [(r["movement"], r["layer"]) for r in found] == [
        (g, layer) for g in ("zoom", "translate-y") for layer in ("convs.0", "norms.1", "fibres", "h")
    ]
    pictures, index = made.source.rendered, torch.arange(24)
    for row in found:
        wrapped = encoders.wrap(made.encoder, None if row["layer"] in ("fibres", "h") else row["layer"], in_channels=1)
        function = wrapped.forward if row["layer"] == "h" else wrapped.fibres
        one = lie_derivative(function, pictures, row["movement"], dtype=DOUBLE)
        values = function(pictures.images(index, dtype=DOUBLE)).detach()
        if row["layer"] != "h":
            margin = min(3, (values.shape[-1] - 1) // 4)
            inner = (..., slice(margin, values.shape[-1] - margin), slice(margin, values.shape[-1] - margin))
            one, values = one[inner], values[inner]
        per = {"zoom": 0.01, "translate-y": 1.0}[row["movement"]]
        expected = per * float(one.square().sum().sqrt() / (values - values.mean(0)).square().sum().sqrt())
        assert row["value"] == pytest.approx(expected, rel=1e-9)
        assert 0 < row["low"] <= row["value"] <= row["high"]
        assert row["action"] == ("trivial" if row["layer"] == "h" else "spatial")


def test_the_figures_do_not_depend_on_the_scale_of_the_features_nor_on_the_batch():
    class Scaled(Encoder):
        in_channels, dim = 1, 5

        def __init__(self, inner, factor, shift):
            super().__init__()
            self.inner, self.factor, self.shift = inner, factor, shift

        def fibres(self, images):
            return self.factor * self.inner.fibres(images) + self.shift

        def pool(self, fibres):
            return fibres.mean((2, 3, 4))

    made = subject()
    plain = rows(probe(made, Options(generator=("rotate",))))
    scaled = rows(probe(subject(module=Scaled(made.encoder, -7.0, 3.0)), Options(generator=("rotate",))))
    for a, b in zip(plain, scaled, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-9)
        assert a["low"] == pytest.approx(b["low"], rel=1e-9)
    made.batch_size = 24
    again = rows(probe(made, Options(generator=("rotate",))))
    assert [r["value"] for r in again] == pytest.approx([r["value"] for r in plain], rel=1e-12)


class Net(nn.Module):
    """A trunk with one residual block, so that not every layer is a cut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.after = nn.Identity()
        self.down = nn.Conv2d(3, 4, 3, 2, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        maps = self.first(images).tanh()
        maps = self.after(maps + self.branch(maps).tanh())
        maps = self.down(maps).tanh()
        return self.head(maps.mean((2, 3))).tanh()


def test_shares_are_the_defect_of_each_segment_carried_to_the_end():
    torch.manual_seed(1)
    net = Net().double().requires_grad_(False)
    made = subject(module=encoders.wrap(net, in_channels=1), size=10)
    options = Options(layer=("first", "branch", "after", "down", "head", "h"), generator=("zoom", "brightness"), shares=True)
    found = probe(made, options)
    assert any("around them: branch" in note for note in found.notes)
    table = rows(found, "shares")
    for name in ("zoom", "brightness"):
        here = [r for r in table if r["movement"] == name]
        assert [r["layer"] for r in here] == ["first", "after", "down", "head", "h"]
        assert sum(r["share"] for r in here) == pytest.approx(1, abs=1e-9)
        assert all(r["low"] <= r["share"] <= r["high"] for r in here)
    # by hand: the segments as functions, each defect pushed through what follows
    pictures, index = made.source.rendered, torch.arange(24)
    segments = [
        net.first, lambda a: a.tanh() + net.branch(a.tanh()).tanh(), net.down,
        lambda a: net.head(a.tanh().mean((2, 3))), torch.tanh,
    ]  # fmt: skip
    x = pictures.images(index, dtype=DOUBLE)
    values, flows = [x], [lie.rendered_tangent(pictures, index, GENERATORS["zoom"], DOUBLE, "cpu")]
    for segment, stride in zip(segments, (1, 1, 2, None, None), strict=True):
        values.append(segment(values[-1]))
        flows.append(zooming(values[-1], stride) if stride else torch.zeros_like(values[-1]))
    end, carried = torch.zeros_like(values[-1]), []
    for i, segment in enumerate(segments):
        defect = slope(segment, values[i], flows[i]) - flows[i + 1]
        for j in range(i + 1, len(segments)):
            defect = slope(segments[j], values[j], defect)
        carried.append(defect)
        end = end + defect
    assert (end - lie_derivative(net, pictures, "zoom")).abs().max() < 1e-12
    expected = [float((part * end).sum() / end.square().sum()) for part in carried]
    assert [r["share"] for r in table if r["movement"] == "zoom"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # nothing is declared to move under brightness, so that all of it is there from the first layer on
    assert [round(r["share"], 9) for r in table if r["movement"] == "brightness"] == [1, 0, 0, 0, 0]


def slope(function, at, way):
    return torch.func.jvp(function, (at,), (way,))[1]


def zooming(maps, stride):
    """-(u - centre) . grad of a map whose pixel i stands at stride i on an image of 10 x 10."""
    place = stride * torch.arange(maps.shape[-1], dtype=DOUBLE) - 4.5
    matrix = differences(maps.shape[-1]) / stride
    return -(place[:, None] * (matrix @ maps) + place * (maps @ matrix.T))


def test_a_sum_of_shares_that_is_not_one_is_a_fault():
    with pytest.raises(ArithmeticError, match="not to one"):
        shares._added(torch.tensor([[0.5, 0.4]], dtype=DOUBLE), torch.ones(1, dtype=DOUBLE), GENERATORS["zoom"])


def test_a_small_turn_of_oriented_fibres_is_left_out_and_said():
    found = probe(subject("c4-cnn"), Options(generator=("rotate", "translate-x"), shares=True))
    measured = [(r["movement"], r["layer"]) for r in rows(found)]
    assert measured == [("rotate", "h"), ("translate-x", "fibres"), ("translate-x", "h")]
    assert any("rotate at fibres" in note and "c4 declares no action" in note for note in found.notes)
    assert any("Not cuts for rotate" in note and "fibres" in note for note in found.notes)
    with pytest.raises(GeomsslError, match="c4 declares no action"):
        lie_derivative(subject("c4-cnn").encoder, Fields(3, 1, 12), "rotate")


def test_the_artifact_is_whole_and_survives_the_disk(tmp_path):
    found = probe(subject(channels=3), Options(n=10, shares=True))
    assert [m.name for m in found.metrics] == [f"lie_{g}" for g in lie.DEFAULT]
    assert all(m.n == 10 and m.interval.low <= m.value <= m.interval.high for m in found.metrics)
    assert found.metric("lie_rotate").unit == "spread per degree"
    assert found.headline.startswith("h changes by this share of its spread")
    assert found.provenance["images"] == "fields"
    again = artifact.load(found.save(tmp_path))
    assert again.to_json() == found.to_json()
    json.dumps(found.to_json(), allow_nan=False)


def test_natural_images_fields_and_phantoms_are_all_taken():
    pixels = torch.randint(0, 256, (12, 1, 14, 14), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = subject()
    natural = Subject(made.encoder, Resident("noise", "test", pixels, None), dtype=DOUBLE, provenance={"run": "r"})
    found = probe(natural, Options(generator=("rotate", "hue")))
    assert any("central differences of pixels" in note for note in found.notes)
    assert any(note.startswith("hue: left out") for note in found.notes)
    assert {r["movement"] for r in rows(found)} == {"rotate"}
    for kind in ("fields", "phantoms"):
        found = probe(natural, Options(n=6, generator=("rotate",), images=kind, bandwidth=0.4))
        assert (found.provenance["images"], found.metric("lie_rotate").n) == (kind, 6)
        assert any("tangents are exact" in note for note in found.notes)


class Rough(nn.Module):
    """Overwrites its input, has statistics, and attends."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.patch = nn.Conv2d(1, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, images):
        images.mul_(2)
        maps = nn.functional.relu(self.norm(images), inplace=True)
        tokens = self.block(self.patch(maps).flatten(2).transpose(1, 2))
        query = tokens.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(query, query, query).squeeze(1)


def test_overwriting_statistics_and_attention_are_taken_and_leave_no_trace():
    torch.manual_seed(0)
    net = Rough()
    net.norm.running_mean.fill_(0.3)
    pictures = Fields(9, 1, 16, 0.3)
    before = pictures.images(torch.arange(9))
    images = before.clone()
    found = lie_derivative(net, images, "translate-x", action="trivial")
    assert torch.equal(images, before)
    assert net.training
    assert found.shape == (9, 16, 8)
    made = Subject(encoders.wrap(net, in_channels=1), data.load("fields", "test", size=16, n=9), provenance={"run": "r"})
    table = rows(probe(made, Options(generator=("translate-x",), layer=("fibres", "patch"))))
    assert {r["action"] for r in table} == {"spatial"}


class Stubborn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Backward(nn.Module):
    def forward(self, images):
        return Stubborn.apply(images)


class Bag(nn.Module):
    def forward(self, images):
        return nn.functional.embedding_bag(torch.zeros(len(images), 1).long(), images.flatten(1)[:, :2])


class Image(Encoder):
    """The image as its own features: it moves as declared, to the last bit."""

    in_channels, dim = 1, 1

    def fibres(self, images):
        return images[:, :, None]

    def pool(self, fibres):
        return fibres.mean((2, 3, 4))


def test_fibres_of_another_pass_are_no_cut():
    class Twice(Image):
        def forward(self, images):
            return images.tanh().mean((2, 3))

    found = probe(subject(module=Twice()), Options(generator=("brightness",), shares=True))
    assert any("another forward pass makes them: fibres" in note for note in found.notes)
    assert [(r["layer"], round(r["share"], 9)) for r in rows(found, "shares")] == [("h", 1)]


def test_no_derivative_at_all_is_drawn_and_has_no_shares(tmp_path):
    pixels = torch.randint(0, 256, (9, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = Subject(Image(), Resident("noise", "test", pixels, None), provenance={"run": "r"})
    found = probe(made, Options(generator=("rotate", "zoom"), layer=("fibres",), shares=True))
    assert [r["value"] for r in rows(found)] == [0, 0]
    assert [t.name for t in found.tables] == ["lie"]
    assert sum("is zero" in note for note in found.notes) == 2
    assert artifact.load(found.save(tmp_path)).to_json() == found.to_json()


def test_a_constant_network_is_degenerate_and_says_so(tmp_path):
    class Constant(Encoder):
        in_channels, dim = 1, 2

        def fibres(self, images):
            return 0 * images[:, :1, None, :2, :2].expand(-1, 2, 1, 2, 2) + 1

        def pool(self, fibres):
            return fibres.mean((2, 3, 4))

    found = probe(subject(module=Constant()), Options(generator=("zoom", "brightness"), shares=True))
    assert {r["degenerate"] for r in rows(found)} == {True}
    assert all(m.value is None for m in found.metrics)
    assert "nothing can be told" in found.headline
    assert sum("is zero" in note for note in found.notes) == 2
    found.save(tmp_path)


def test_crop_judges_only_what_sees_the_image_alone():
    made = subject(size=16)
    one = {"generator": ("translate-x",), "layer": ("convs.0", "convs.1")}
    whole, cropped = (
        {r["layer"]: r["value"] for r in rows(probe(made, Options(**one, boundary=edge)))} for edge in ("interior", "crop")
    )
    assert cropped["convs.0"] == pytest.approx(whole["convs.0"], rel=1e-12)  # three pixels are left out already
    assert cropped["convs.1"] != pytest.approx(whole["convs.1"], rel=1e-3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lie_derivative(nn.Identity(), X, "rotat"), "did you mean 'rotate'"),
        (lambda: probe(subject(), Options(generator=("translatex",))), "did you mean 'translate-x'"),
        (lambda: probe(subject(), Options(generator=("hue",))), "one that changes such images"),
        (lambda: probe(subject(), Options(layer=("conv.0",))), "unknown layer 'conv.0'"),
        (lambda: probe(subject(size=8), Options(boundary="crop", generator=("zoom",))), "boundary interior"),
        (lambda: lie_derivative(nn.Sequential(nn.Conv2d(1, 2, 3), Backward()), X.float(), "zoom"), "layer '1' (Backward)"),
        (lambda: lie_derivative(nn.Sequential(nn.Identity(), Bag()), X, "zoom"), "_embedding_bag"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
