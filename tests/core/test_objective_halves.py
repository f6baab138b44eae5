"""SIE and reconstruction against their equations in float64; what reaches what; what view 2 may not tell its own decoder."""

import math

import pytest
import torch
import torch.nn.functional as F

from geomssl.encoders import build
from geomssl.errors import GeomsslError
from geomssl.losses import vicreg
from geomssl.objectives.base import Batch, View
from geomssl.objectives.decoder import Decoder, tokens
from geomssl.objectives.halves import Halves
from geomssl.objectives.hypernetwork import Code, HyperNetwork
from geomssl.objectives.reconstruction import Reconstruction
from geomssl.objectives.sie import PARTS, SIE, OneOf
from geomssl.transforms import (
    Compose,
    CyclicRotations,
    GaussianBlur,
    HorizontalFlip,
    Jitter,
    ResizedCrop,
    Rotate,
    Translate,
    policy,
)

SMALL = {"half": 5, "projector": (8, 6)}
PAINT = {"width": 8, "heads": 2, "depth": 3}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def batch(objective, images):
    views = {}
    for k, spec in enumerate(objective.views):
        params = spec.policy.sample(len(images), torch.Generator().manual_seed(k), tuple(images.shape[2:])).double()
        views[spec.name] = View(spec.policy(images, params), params, spec.policy)
    return Batch(views, None, torch.arange(len(images)), torch.empty(len(images), 0))


def made(kind, encoder=None, size=8, channels=3, **config):
    encoder = build("cnn", in_channels=channels, widths=(4, 4, 6)).double().eval() if encoder is None else encoder
    objective = kind(kind.Config(**config), encoder, 0, channels)
    objective.complete(encoder, size, None)
    return encoder, objective.double().eval()


def test_the_split_is_the_representation_itself_where_it_fits():
    h = torch.randn(3, 10)
    invariant, equivariant = Halves(10, 5)(h)
    assert torch.equal(torch.cat([invariant, equivariant], dim=1), h)
    assert not list(Halves(10, 5).parameters())
    assert Halves(384, 256).map.weight.shape == (512, 384)


def test_a_code_is_zero_at_the_identity_and_of_the_order_of_one():
    whole = Compose([
        ResizedCrop((0.2, 1.0)), HorizontalFlip(), Rotate(180), Rotate(30), Translate(0.2), Jitter(0.4, 0.4, 0.4, 0.1),
        GaussianBlur(),
    ])
    code = Code(whole.parameters, 16)
    assert code.width == len(whole.parameters) + 1
    assert torch.equal(code(whole.identity(2).double()), torch.zeros(2, code.width))
    drawn = whole.sample(500, torch.Generator().manual_seed(0), (16, 16)).double()
    assert code(drawn).abs().max() <= 2
    assert (code(drawn).std(dim=0) > 0.05).all()
    crop = Code(whole.parameters[:4], 16)(torch.tensor([[2.0, 4.0, 8.0, 16.0]]))
    assert crop.tolist() == [[0.125, 0.25, -0.5, 0.0]]
    ends = Code(whole.parts[2].parameters, 16)(torch.tensor([[-180.0], [180.0], [90.0]]))
    torch.testing.assert_close(ends, torch.tensor([[-2.0, 0.0], [-2.0, 0.0], [-1.0, 1.0]]), rtol=0, atol=1e-12)
    shift = Code(whole.parts[4].parameters + whole.parts[6].parameters, 16)(torch.tensor([[4.0, -8.0, 1.0]]))
    assert shift.tolist() == [[0.25, -0.5, 0.5]]


def test_the_hypernetwork_is_linear_in_z_and_a_function_of_g_alone():
    net = HyperNetwork(Code(policy("equivariant").parameters, 8), 4, 7).double()
    params = policy("equivariant").sample(5, torch.Generator().manual_seed(0), (8, 8)).double()
    a, b = torch.randn(2, 5, 4)
    torch.testing.assert_close(net(2 * a - 3 * b, params), 2 * net(a, params) - 3 * net(b, params))
    maps = net.maps(params)
    torch.testing.assert_close(net(a, params), torch.stack([maps[i] @ a[i] for i in range(5)]))
    assert (maps - torch.eye(4)).abs().max() > 1e-3
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    # the untrained map is close to the identity, and still lets a gradient through to every weight
    assert (maps - torch.eye(4)).norm(dim=(1, 2)).max() < 1
    net(a, params).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("form", ["released", "printed"])
def test_sie_is_its_equation(form):
    weights = {"invariance": 3, "equivariance": 2, "variance": 5, "covariance": 0.5}
    encoder, objective = made(SIE, **SMALL, form=form, **weights, known=("crop", "flip"))
    images = torch.rand(9, 3, 8, 8)
    b = batch(objective, images)
    assert torch.equal(b.views["1"].images, images)
    y = [objective.projector.halves.map(encoder(b.views[v].images)) for v in ("1", "2")]
    i1, i2 = (objective.projector.head(x[:, :5]) for x in y)
    e1, e2 = (objective.equivariant(x[:, 5:]) for x in y)
    names = [p.name for p in b.views["2"].transform.parameters]
    seen = [k for k, name in enumerate(names) if name.startswith(("resized-crop", "horizontal-flip"))]
    maps = objective.predictor.maps(b.views["2"].params[:, seen])
    moved = torch.stack([maps[i] @ e1[i] for i in range(9)])
    whole = vicreg(torch.cat([i1, e1], dim=1), torch.cat([i2, e2], dim=1), form)
    share, half = (6, 2) if form == "released" else (1, 1)
    spread = (1 - (moved.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean() / half
    expected = (
        3 * (i1 - i2).square().sum(dim=1).mean() / share + 2 * (moved - e2).square().sum(dim=1).mean() / share
        + 5 * (whole.variance + spread) + 0.5 * whole.covariance
    )
    torch.testing.assert_close(objective(encoder, b).total, expected)


@pytest.mark.parametrize("known", [*((word,) for word in PARTS), ("rotation", "colour"), tuple(PARTS)])
def test_a_variant_of_sie_sees_its_own_parameters_alone(known):
    """A parameter that is not known does not change the prediction; each one that is known does."""
    _, objective = made(SIE, **SMALL, known=known)
    drawn = objective.policy
    assert [p.name for p in drawn.parameters] == [p.name for p in policy("equivariant").parameters]
    params = drawn.sample(1, torch.Generator().manual_seed(3), (8, 8)).double()
    z, owners = torch.randn(1, 6), {name: word for word, names in PARTS.items() for name in names}
    for k, parameter in enumerate(drawn.parameters):
        other = params.clone()
        other[:, k] = other[:, k] + 0.37
        same = torch.equal(objective.predictor(z, other[:, objective.seen]), objective.predictor(z, params[:, objective.seen]))
        assert same == (owners[parameter.name.split(".")[0]] not in known), parameter.name


def test_one_transformation_a_step():
    _, objective = made(SIE, **SMALL, single=True, known=("rotation", "flip", "blur"))
    drawn, whole = objective.views[1].policy, policy("equivariant")
    assert isinstance(drawn, OneOf)
    identity, counts = whole.identity(40), {}
    for step in range(300):
        params = drawn.sample(40, torch.Generator().manual_seed(step), (8, 8))
        pairs = zip(whole.parts, whole.slices, strict=True)
        moving = [part.name for part, at in pairs if not torch.equal(params[:, at], identity[:, at])]
        assert len(moving) == 1
        counts[moving[0]] = counts.get(moving[0], 0) + 1
    assert set(counts) == {"rotate", "horizontal-flip", "gaussian-blur"}
    # five standard deviations of a binomial count
    assert all(abs(n - 100) < 5 * math.sqrt(300 * 2 / 9) for n in counts.values())


def test_known_parameters_that_do_nothing_are_refused():
    with pytest.raises(GeomsslError, match="sie: known blur under policy 'ciper' on 3 channels, which has none; expected a"):
        made(SIE, policy="ciper", known=("blur",))
    _, grey = made(SIE, **SMALL, channels=1, known=("colour",))
    assert [p.name for p in grey.parameters_seen] == ["jitter.brightness", "jitter.contrast"]


def test_the_decoder_is_its_equation():
    """Cross-attention, block and pixels of one example, head by head and patch by patch."""
    decoder = Decoder(8, 1, 2, 3, 6, 2, 3).double()
    e1, e2 = torch.randn(2, 1, 18, 8)
    cross = decoder.cross
    q, k, v = cross.q(e2[0]), *cross.kv(e1[0]).chunk(2, dim=1)
    heads = [torch.softmax(q[:, h] @ k[:, h].T / 2, dim=1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
    t = cross.proj(torch.cat(heads, dim=1)) + decoder.positions[0]
    t = t + decoder.mlp(F.layer_norm(t, (8,), decoder.norm.weight, decoder.norm.bias))
    pixels = decoder.pixels(F.layer_norm(t, (8,), decoder.last.weight, decoder.last.bias))
    pixels = (pixels[:9] + pixels[9:]) / 2
    image = torch.zeros(3, 6, 6)
    for place in range(9):
        row, column = 2 * (place // 3), 2 * (place % 3)
        image[:, row : row + 2, column : column + 2] = pixels[place].view(3, 2, 2)
    torch.testing.assert_close(decoder(e1, e2)[0], image)
    assert decoder.positions[0, :9].unique(dim=0).shape[0] == 9


def test_view_2_says_where_to_look_and_never_what_is_there():
    """Where all values of view 1 are alike, the painting is the same whatever view 2 is: no residual from the query."""
    decoder = Decoder(8, 3, 2, 1, 8, 1, 2).double()
    alike = torch.randn(1, 1, 8).expand(1, 4, 8)
    torch.testing.assert_close(decoder(alike, torch.randn(1, 4, 8)), decoder(alike, 5 * torch.randn(1, 4, 8)))
    varied, other = torch.randn(2, 1, 4, 8)
    assert (decoder(varied, varied) - decoder(varied, other)).abs().max() > 1e-6
    assert (decoder(varied, other) - decoder(alike, other)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options", "grid"), [
    ("cnn", {"widths": (4, 4, 6)}, (1, 2)), ("c4-cnn", {"widths": (2, 3, 4)}, (4, 2)),
    ("vit-small", {"size": 8, "width": 8, "depth": 2, "heads": 2, "h": "mean"}, (1, 2)),
    ("vit-small", {"size": 8, "width": 8, "depth": 1, "heads": 2, "class_token": False}, (1, 2)),
])  # fmt: skip
def test_reconstruction_on_every_kind_of_tokens(name, options, grid):
    encoder = build(name, in_channels=3, **options).double()
    _, objective = made(Reconstruction, encoder, **SMALL, **PAINT, ssl=0.7, reconstruction=3)
    assert (objective.decoder.orientations, objective.decoder.side) == grid
    assert encoder.training
    encoder.eval()
    b = batch(objective, torch.rand(6, 3, 8, 8))
    views = [b.views[v].images for v in ("1", "2")]
    z = [objective.projector.head(objective.projector.halves.map(encoder(v))[:, :5]) for v in views]
    e = [objective.equivariant(objective.projector.halves.map(tokens(encoder.fibres(v)))[..., 5:]) for v in views]
    error = ((objective.decoder(*e) - views[1]) ** 2).mean()
    losses = objective(encoder, b)
    torch.testing.assert_close(losses.terms["reconstruction"], error)
    torch.testing.assert_close(losses.total, 0.7 * vicreg(*z).total() + 3 * error)
    torch.testing.assert_close(losses.h, encoder(views[0]))


def test_a_size_that_the_grid_does_not_divide_is_cut():
    encoder, objective = made(Reconstruction, size=9, **SMALL, **PAINT)
    maps = encoder.fibres(torch.rand(4, 3, 9, 9))
    assert maps.shape[3] == 3
    assert objective.painted(maps).shape == (2, 3, 9, 9)
    encoder, objective = made(Reconstruction, size=10, **SMALL, **PAINT)
    assert objective.painted(encoder.fibres(torch.rand(4, 3, 10, 10))).shape == (2, 3, 10, 10)


def test_a_class_token_is_refused():
    encoder = build("vit-small", in_channels=3, size=8, width=8, depth=1, heads=2).double()
    with pytest.raises(GeomsslError, match="whose h is no pooling of its tokens .*; expected h = mean"):
        made(Reconstruction, encoder)
    with pytest.raises(GeomsslError, match="a decoder of width 10 with 3 heads"):
        made(Reconstruction, width=10)


@pytest.mark.parametrize(("kind", "config"), [(SIE, {}), (SIE, {"hidden": 0, "known": ("rotation",)}), (Reconstruction, PAINT)])
def test_the_gradient_reaches_the_encoder_and_every_head(kind, config):
    encoder, objective = made(kind, **SMALL, **config)
    encoder.train()
    objective.train()
    objective(encoder, batch(objective, torch.rand(9, 3, 8, 8))).total.backward()
    for name, parameter in [*encoder.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-12, name


def test_each_half_learns_from_its_own_term_alone():
    """With one weight at zero the head of the other half gets no gradient, and the split only its rows."""
    for kind, off, own in ((Reconstruction, "reconstruction", "head"), (Reconstruction, "ssl", "equivariant")):
        encoder, objective = made(kind, **SMALL, **PAINT, **{off: 0.0})
        objective(encoder, batch(objective, torch.rand(9, 3, 8, 8))).total.backward()
        rows = objective.projector.halves.map.weight.grad
        learns = slice(0, 5) if own == "head" else slice(5, 10)
        rests = slice(5, 10) if own == "head" else slice(0, 5)
        assert rows[learns].abs().max() > 0
        assert rows[rests].abs().max() == 0
        still = objective.equivariant if own == "head" else objective.projector.head
        assert all(p.grad.abs().max() == 0 for p in still.parameters())


def test_turned_fibres_are_turned_tokens():
    group = CyclicRotations(4)
    fibres = torch.randn(1, 2, 4, 3, 3)
    assert tokens(fibres).shape == (1, 36, 2)
    moved = tokens(group.act(fibres, torch.ones(1, 1)))
    assert torch.equal(moved.sort(dim=1).values, tokens(fibres).sort(dim=1).values)
