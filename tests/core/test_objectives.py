"""Objectives against their equations, written out again here in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomssl.encoders import build
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.losses import info_nce
from geomssl.objectives.base import Batch, View
from geomssl.objectives.ciper import CIPER, standardise
from geomssl.objectives.frozen import Frozen
from geomssl.objectives.hssl import HSSL, pick
from geomssl.objectives.simclr import SimCLR
from geomssl.objectives.supervised import Supervised
from geomssl.transforms import CyclicRotations, policy


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Given(Encoder):
    """Fibres (N, C, G, H, W) read off the image's own numbers, so that a test knows them."""

    def __init__(self, c=3, g=4, h=2, w=2):
        super().__init__()
        self.shape, self.dim, self.in_channels = (c, g, h, w), c, 1

    def fibres(self, images):
        return images.flatten(1).unflatten(1, self.shape)

    def pool(self, fibres):
        return fibres.amax(dim=2).mean(dim=(2, 3))


def batch(objective, images, labels=None, seed=0, draw=None):
    """Views drawn by each of the objective's policies, as the trainer draws them."""
    views = {}
    for k, spec in enumerate(objective.views):
        params = spec.policy.sample(len(images), torch.Generator().manual_seed(seed + k), tuple(images.shape[2:])).double()
        views[spec.name] = View(spec.policy(images, params), params, spec.policy)
    draw = torch.rand(len(images), objective.draws) if draw is None else draw
    return Batch(views, labels, torch.arange(len(images)), draw)


def test_hssl_contrasts_two_fibres_of_one_pass():
    encoder, images = Given(), torch.rand(6, 1, 6, 8)
    objective = HSSL(HSSL.Config(projector=(5,)), encoder, 0, 1)
    assert [spec.name for spec in objective.views] == ["plain"]
    draw = torch.tensor([[0.0, 0.99], [0.3, 0.3], [0.5, 0.1], [0.76, 0.74], [0.999, 0.0], [0.25, 0.5]])
    losses = objective(encoder, batch(objective, images, draw=draw))
    maps = images.view(6, 3, 4, 4).mean(dim=3)
    first = torch.stack([maps[i, :, g] for i, g in enumerate([0, 1, 2, 3, 3, 1])])
    second = torch.stack([maps[i, :, g] for i, g in enumerate([3, 1, 0, 2, 0, 2])])
    z1, z2 = objective.projector(torch.cat([first, second])).chunk(2)
    torch.testing.assert_close(losses.total, info_nce(z1, z2, 10.0, "pooled"))
    torch.testing.assert_close(losses.h, encoder(images))


def test_assl_reads_the_same_fibre_of_two_augmented_passes():
    encoder, images = Given(3, 4, 1, 3), torch.rand(5, 1, 6, 6)
    objective = HSSL(HSSL.Config(positives="inputs", projector=(5,)), encoder, 0, 1)
    assert [spec.name for spec in objective.views] == ["1", "2"]
    made = batch(objective, images, draw=torch.tensor([0.1, 0.3, 0.6, 0.8, 0.3])[:, None])
    losses = objective(encoder, made)
    places = [0, 1, 2, 3, 1]
    bundles = [
        torch.stack([encoder.fibres(made.views[v].images)[i].mean(dim=(2, 3))[:, g] for i, g in enumerate(places)])
        for v in ("1", "2")
    ]
    z1, z2 = objective.projector(torch.cat(bundles)).chunk(2)
    torch.testing.assert_close(losses.total, info_nce(z1, z2, 10.0, "pooled"))
    assert not torch.equal(made.views["1"].params, made.views["2"].params)


def test_hssl_on_translations_reads_places():
    encoder, images = Given(2, 1, 3, 4), torch.rand(4, 1, 4, 6)
    objective = HSSL(HSSL.Config(group="translation", projector=(5,)), encoder, 0, 1)
    line = objective.line(encoder.fibres(images))
    assert line.shape == (4, 2, 12)
    torch.testing.assert_close(line[:, :, 5], encoder.fibres(images)[:, :, 0, 1, 1])


def test_a_fibre_of_the_turned_image_is_another_fibre_of_the_image():
    """f(T_g x)(k) = f(x)(g^-1 k): why A-SSL and H-SSL agree on an exactly equivariant backbone."""
    encoder = build("c4-cnn", in_channels=1).double().eval()
    images, group = torch.rand(3, 1, 9, 9), CyclicRotations(4)
    objective = HSSL(HSSL.Config(), encoder, 0, 1)
    upright = objective.line(encoder.fibres(images))
    for g in range(4):
        turned = objective.line(encoder.fibres(group(images, torch.full((3, 1), float(g)))))
        for k in range(4):
            torch.testing.assert_close(turned[:, :, k], upright[:, :, (k - g) % 4])


def test_pick_covers_every_place_evenly():
    draw = torch.rand(4000)
    places = pick(torch.arange(5.0).expand(4000, 1, 5), draw)[:, 0]
    torch.testing.assert_close(places, (draw * 5).floor())
    assert places.unique().tolist() == [0, 1, 2, 3, 4]


def test_hssl_without_a_group_is_refused():
    objective = HSSL(HSSL.Config(), Given(3, 1, 2, 2), 0, 1)
    with pytest.raises(GeomsslError, match="more than one fibre along the group"):
        objective(Given(3, 1, 2, 2), batch(objective, torch.rand(4, 1, 3, 4)))


def test_simclr_averages_both_directions():
    encoder, images = Given(), torch.rand(6, 1, 6, 8)
    objective = SimCLR(SimCLR.Config(policy="small", projector=(7,)), encoder, 0, 1)
    made = batch(objective, images)
    z1, z2 = (encoder(made.views[v].images) @ objective.projector[0].weight.T for v in ("1", "2"))
    expected = (info_nce(z1, z2, 2.0, "nt-xent") + info_nce(z2, z1, 2.0, "nt-xent")) / 2
    torch.testing.assert_close(objective(encoder, made).total, expected)


@pytest.mark.parametrize(("channels", "targets"), [(1, 7), (3, 10)])
def test_ciper_predicts_what_acts(channels, targets):
    encoder = build("cnn", in_channels=channels, coordinates=True).double()
    objective = CIPER(CIPER.Config(), encoder, 0, channels)
    assert objective.predictor[-1].out_features == targets


@pytest.mark.parametrize(("alpha", "contrastive"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.0)])
def test_ciper_is_its_equation(alpha, contrastive):
    encoder, images = build("cnn", in_channels=3).double().eval(), torch.rand(8, 3, 8, 8)
    objective = CIPER(CIPER.Config(alpha=alpha, contrastive=contrastive), encoder, 0, 3).eval()
    made = batch(objective, images)
    h0, h1, h2 = (encoder(made.views[v].images) for v in ("plain", "1", "2"))
    torch.testing.assert_close(made.views["plain"].images, images)
    errors = []
    for h, v in ((h1, "1"), (h2, "2")):
        r = made.views[v].params
        assert r.shape[1] == 10
        spread = r.std(dim=0, correction=0)
        target = torch.where(spread > 1e-9, (r - r.mean(dim=0)) / spread.clamp(min=1e-9), 0.0)
        hidden = F.layer_norm(F.linear(h0 - h, objective.predictor[0].weight, objective.predictor[0].bias), (512,)).relu()
        errors.append((objective.predictor[-1](hidden) - target) ** 2)
    prediction = sum(e.sum() for e in errors) / (2 * 8 * 10)
    contrast = info_nce(objective.projector(h1), objective.projector(h2), 2.0, "nt-xent", symmetric=True)
    losses = objective(encoder, made)
    torch.testing.assert_close(losses.terms["prediction"], prediction)
    torch.testing.assert_close(losses.total, contrastive * contrast + alpha * prediction)
    torch.testing.assert_close(losses.h, h0)


def test_ciper_standardises_over_the_batch():
    params = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert standardise(params).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_ciper_without_anything_to_predict_is_refused():
    with pytest.raises(GeomsslError, match="parameters to predict"):
        CIPER(CIPER.Config(policy="none"), Given(), 0, 1)


def test_supervised_and_frozen():
    encoder, images, labels = Given(), torch.rand(6, 1, 6, 8), torch.arange(6) % 3
    supervised = Supervised(Supervised.Config(), encoder, 3, 1)
    expected = F.cross_entropy(supervised.classifier(encoder(images)), labels)
    torch.testing.assert_close(supervised(encoder, batch(supervised, images, labels)).total, expected)
    with pytest.raises(GeomsslError, match="without labels"):
        supervised(encoder, batch(supervised, images))
    with pytest.raises(GeomsslError, match="on 1 classes"):
        Supervised(Supervised.Config(), encoder, 1, 1)
    frozen = Frozen(Frozen.Config(), encoder, 3, 1)
    assert frozen(encoder, batch(frozen, images)).total == 0
    assert not frozen.trains_encoder


@pytest.mark.parametrize("objective", [SimCLR, HSSL, CIPER])
def test_the_projector_is_a_registered_submodule(objective):
    made = objective(objective.Config(), build("c4-cnn", in_channels=1), 10, 1)
    assert isinstance(made.projector, nn.Module)
    assert any(name.startswith("projector.") for name, _ in made.named_parameters())
    assert made.policy is not None
    assert policy("rotations").sample(2, torch.Generator(), (8, 8)).shape == (2, 1)
