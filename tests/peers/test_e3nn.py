"""e3nn: maps of vectors under rotations of space, measured with Wigner matrices as the user's own T_g and Γ_g."""

import math

import pytest
import torch
from e3nn import o3
from e3nn.util.test import assert_equivariant as their_assertion
from e3nn.util.test import equivariance_error as their_error

from geomssl.probes.equivariance import NotEquivariant, assert_equivariant, equivariance_error
from geomssl.probes.fitted import agreement, fit_action
from geomssl.seeding import seeded
from geomssl.transforms.base import Parameter, Transform

pytestmark = pytest.mark.peers
BEFORE, AFTER = o3.Irreps("2x0e + 2x1o + 1x2e"), o3.Irreps("1x0e + 2x1o + 1x2e")
N, SIDE = 40, 3


class Turned(Transform):
    """Rotations of space about the origin on images (n, C, H, W) whose H W pixels each hold C numbers of `irreps`."""

    name = "so3"
    parameters = tuple(Parameter(name, "radians", "continuous", 0.0, -math.pi, math.pi) for name in ("alpha", "beta", "gamma"))

    def __init__(self, irreps):
        self.irreps = irreps

    def sample(self, n, generator, size):
        return torch.rand(n, 3, generator=generator) * torch.tensor([2 * math.pi, math.pi, 2 * math.pi])

    def __call__(self, images, params):
        return torch.einsum("nij,nj...->ni...", self.irreps.D_from_angles(*params.to(images).unbind(1)), images)

    def inverse(self, params):
        return -params.flip(1)

    def is_exact(self, params, size):
        return torch.ones(len(params), dtype=torch.bool)


def declared(irreps, back=False):
    """Γ: the same rotation of the features' own irreps. back: its inverse."""
    turned = Turned(irreps)

    def gamma(features, params, size):
        return turned(features, turned.inverse(params) if back else params)

    gamma.permutes = True
    return gamma


def on_pixels(f):
    """A map of vectors (..., C) as a model of images (n, C, H, W)."""
    return lambda images: f(images.movedim(1, -1)).movedim(-1, 1)


def points(dtype=torch.float64):
    return torch.randn(N, BEFORE.dim, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def rotations(e=4):
    """Elements (e, 3) in float64, so that no angle is rounded."""
    return Turned(BEFORE).sample(e, torch.Generator().manual_seed(1), (SIDE, SIDE)).double()


def exact_maps():
    with seeded(0, "e3nn"):
        linear = o3.Linear(BEFORE, AFTER).double()
        tensor = o3.FullyConnectedTensorProduct(BEFORE, BEFORE, AFTER).double()
    harmonics = o3.SphericalHarmonics(o3.Irreps("1x0e + 1x1o + 1x2e"), normalize=True)
    return {
        "linear": (linear, AFTER),
        "tensor product": (lambda x: tensor(x, x), AFTER),
        "spherical harmonics": (lambda x: harmonics(x[..., 2:5]), harmonics.irreps_out),
    }


def broken(share):
    """An equivariant map and a share of one that is not."""
    with seeded(0, "e3nn"):
        linear = o3.Linear(BEFORE, AFTER).double()
        mixing = torch.randn(BEFORE.dim, AFTER.dim, dtype=torch.float64) / math.sqrt(BEFORE.dim)
    linear.requires_grad_(False)
    return lambda x: linear(x) + share * (x @ mixing)


def measured(f, after=AFTER, params=None, **options):
    params = rotations() if params is None else params
    return equivariance_error(on_pixels(f), points(), Turned(BEFORE), params, declared(after), resamples=200, **options)


@pytest.mark.parametrize("name", ["linear", "tensor product", "spherical harmonics"])
def test_their_exact_maps_measure_as_exact_and_pass(name):
    f, after = exact_maps()[name]
    found = measured(f, after)
    assert found.exact.all()
    assert not found.degenerate.any()
    assert float(found.total.max()) < 1e-6
    assert float(found.action_size.min()) > 0.3
    assert_equivariant(on_pixels(f), Turned(BEFORE), 1e-5, points(), declared(after), rotations())
    (theirs,) = their_error(f, [points().movedim(1, -1)], [BEFORE], [after], do_parity=False).values()
    assert float(theirs.max()) < 1e-5


def test_total_is_the_sum_over_their_differences():
    """The same rotation: our total from their matrices alone, and their largest difference within our sum."""
    f = broken(0.5)
    with seeded(3, "rotation"):
        (theirs,) = their_error(f, [points().movedim(1, -1)], [BEFORE], [AFTER], do_parity=False).values()
    with seeded(3, "rotation"):
        rotation = o3.rand_matrix(dtype=torch.float64)
    angles = torch.stack(o3.matrix_to_angles(rotation)).unsqueeze(0)
    total = float(measured(f, params=angles).total)
    x = points().movedim(1, -1)
    moved = f(x) @ AFTER.D_from_matrix(rotation).T
    gap = f(x @ BEFORE.D_from_matrix(rotation).T) - moved
    spread = float((moved - moved.mean(dim=0)).norm())
    assert total == pytest.approx(float(gap.norm()) / spread, rel=1e-9)
    assert 0.1 < total < 1.5
    largest = float(theirs)
    assert largest == pytest.approx(float(gap.abs().max()), rel=1e-6)
    assert largest <= total * spread <= largest * math.sqrt(gap.numel())


def test_both_figures_double_with_the_defect():
    found = [float(measured(broken(share)).total[0]) for share in (1e-3, 2e-3)]
    theirs = []
    for share in (1e-3, 2e-3):
        with seeded(5, "rotation"):
            errors = their_error(broken(share), [points().movedim(1, -1)], [BEFORE], [AFTER], do_parity=False)
        theirs.append(float(next(iter(errors.values()))))
    assert found[1] / found[0] == pytest.approx(2, rel=0.01)
    assert theirs[1] / theirs[0] == pytest.approx(2, rel=1e-6)


def test_the_inverse_rotation_is_wrong_by_what_its_square_asks():
    """D is orthogonal: |Γ_g f - Γ_g^-1 f| = |Γ_gg f - f|, the action size of the turn by twice the angle."""
    f, after = exact_maps()["linear"]
    once, twice = torch.tensor([[0.0, 0.7, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.4, 0.0]], dtype=torch.float64)
    wrong = equivariance_error(on_pixels(f), points(), Turned(BEFORE), once, declared(after, back=True), resamples=200)
    assert float(wrong.total) == pytest.approx(float(measured(f, params=twice).action_size), rel=1e-6)
    assert float(wrong.total) > 0.5


def test_their_assertion_passes_a_small_map_that_is_wrong_and_a_zero_map():
    x = points(torch.float32).movedim(1, -1)
    mixing = torch.randn(BEFORE.dim, AFTER.dim, generator=torch.Generator().manual_seed(2)) * 1e-5

    def wrong(values):
        return values @ mixing

    def zero(values):
        return values.new_zeros(*values.shape[:-1], AFTER.dim)

    for accepted in (wrong, zero):
        their_assertion(accepted, [x], [BEFORE], [AFTER], ntrials=5)
    with pytest.raises(AssertionError):
        their_assertion(lambda values: 1e5 * wrong(values), [x], [BEFORE], [AFTER])
    found = [
        equivariance_error(on_pixels(f), points(torch.float32), Turned(BEFORE), rotations(), declared(AFTER), resamples=200)
        for f in (wrong, lambda values: 1e5 * wrong(values), zero)
    ]
    assert float(found[0].total.min()) > 0.8
    assert torch.allclose(found[0].total, found[1].total, rtol=1e-4)
    assert found[2].degenerate.all()
    for f, judged in ((wrong, True), (zero, False)):
        with pytest.raises(NotEquivariant) as caught:
            assert_equivariant(on_pixels(f), Turned(BEFORE), 0.1, points(torch.float32), declared(AFTER), rotations())
        assert caught.value.judged is judged


def test_an_action_fitted_on_features_is_their_wigner_matrix():
    f, after = exact_maps()["linear"]
    angles = rotations(1)
    x = points().movedim(1, -1).reshape(-1, BEFORE.dim)
    matrix = after.D_from_angles(*angles[0])
    fit = fit_action(f(x), f(x @ BEFORE.D_from_angles(*angles[0]).T))
    assert fit.r2_held_out > 1 - 1e-9
    assert fit.r2_identity < 0.9
    assert agreement(fit, matrix) < 1e-6
    assert agreement(fit, matrix.T) > 0.3
