"""VICReg and E-SSL against their equations, written out again in float64; gradients reach exactly what they should."""

import math

import pytest
import torch
import torch.nn.functional as F

from geomssl.encoders import build
from geomssl.errors import GeomsslError
from geomssl.losses import info_nce, vicreg
from geomssl.objectives.base import Batch, View
from geomssl.objectives.essl import ESSL
from geomssl.objectives.vicreg import VICReg


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


def by_hand(z):
    """Variance and covariance terms of one view, number by number."""
    n, p = z.shape
    rows = z.tolist()
    mean = [sum(row[j] for row in rows) / n for j in range(p)]
    cov = [[sum((row[j] - mean[j]) * (row[k] - mean[k]) for row in rows) / (n - 1) for k in range(p)] for j in range(p)]
    variance = sum(max(0.0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(p)) / p
    return variance, sum(cov[j][k] ** 2 for j in range(p) for k in range(p) if j != k) / p


def test_vicreg_is_its_equations_and_its_code():
    z1, z2 = torch.randn(2, 7, 4) * torch.tensor([0.2, 0.7, 1.0, 3.0])
    (v1, c1), (v2, c2) = by_hand(z1), by_hand(z2)
    distance = sum(float((z1[i] - z2[i]).square().sum()) for i in range(7)) / 7
    for form, share, half in (("printed", 1, 1), ("released", 4, 2)):
        found = vicreg(z1, z2, form)
        assert [float(found.invariance), float(found.variance), float(found.covariance)] == pytest.approx(
            [distance / share, (v1 + v2) / half, c1 + c2], rel=1e-12
        )
        assert float(found.total(2, 3, 5)) == pytest.approx(2 * distance / share + 3 * (v1 + v2) / half + 5 * (c1 + c2))


def test_a_collapsed_embedding_costs_the_whole_hinge_and_a_white_one_nothing():
    point = torch.ones(6, 3)
    found = vicreg(point, point)
    assert [float(found.invariance), float(found.covariance)] == [0, 0]
    assert float(found.variance) == pytest.approx(1 - 0.01)
    white = torch.linalg.qr(torch.randn(50, 4))[0]
    white = torch.linalg.qr(white - white.mean(dim=0))[0] * 7.0
    found = vicreg(white, white)
    assert float(found.variance) < 1e-6
    assert float(found.covariance) < 1e-6


def test_vicreg_passes_gradcheck_and_refuses_a_single_pair():
    z1, z2 = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: vicreg(a, b).total(), (z1, z2))
    with pytest.raises(GeomsslError, match="a batch of 1"):
        vicreg(z1[:1], z2[:1])
    with pytest.raises(GeomsslError, match="one of printed, released"):
        vicreg(z1, z2, "relesed")


def test_the_vicreg_objective():
    encoder, images = build("cnn", in_channels=3, widths=(4, 4, 6)).double().eval(), torch.rand(9, 3, 8, 8)
    objective = VICReg(VICReg.Config(projector=(8, 5), invariance=3, variance=2, covariance=0.5), encoder, 0, 3).eval()
    made = batch(objective, images)
    z = [objective.projector(encoder(made.views[v].images)) for v in ("1", "2")]
    assert [type(layer).__name__ for layer in objective.projector] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    (v1, c1), (v2, c2) = by_hand(z[0]), by_hand(z[1])
    expected = 3 * (z[0] - z[1]).square().mean() + (v1 + v2) + 0.5 * (c1 + c2)
    torch.testing.assert_close(objective(encoder, made).total, expected)


def test_essl_asks_for_the_turn_of_six_images_a_sample():
    encoder, images = build("cnn", in_channels=3, widths=(4, 4, 6)).double().eval(), torch.rand(5, 3, 8, 8)
    objective = ESSL(ESSL.Config(projector=(7,), predictor=(9, 8), weight=0.3), encoder, 0, 3)
    made, seen = batch(objective, images), []
    encoder.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    losses = objective(encoder, made)
    assert seen == [6 * 5]
    q, entropy = objective.predictor, 0
    for k in range(4):
        h = encoder(torch.rot90(made.views["turned"].images, k, (2, 3)))
        h = F.layer_norm(q[0](h), (9,)).relu()
        entropy = entropy - q[6](F.layer_norm(q[3](h), (8,)).relu()).log_softmax(dim=1)[:, k].mean() / 4
    z = [objective.projector(encoder(made.views[v].images)) for v in ("1", "2")]
    torch.testing.assert_close(losses.terms["rotation"], entropy)
    torch.testing.assert_close(losses.total, info_nce(*z, 2.0, "nt-xent", symmetric=True) + 0.3 * entropy)


@pytest.mark.parametrize("kind", [VICReg, ESSL])
def test_the_gradient_reaches_the_encoder_and_every_head(kind):
    encoder = build("cnn", in_channels=3, widths=(4, 4, 6)).double()
    objective = kind(kind.Config(projector=(8, 6)), encoder, 0, 3)
    objective(encoder, batch(objective, torch.rand(9, 3, 8, 8))).total.backward()
    for name, parameter in [*encoder.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
