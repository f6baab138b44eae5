"""What the checks of e2cnn and escnn accept: a zero filter, and a random one in their check of convolutions; ours does not."""

import matplotlib.image
import pytest
import scipy.datasets
import torch

from geomssl.data.rendered import Fields
from geomssl.probes.equivariance import NotEquivariant, assert_equivariant, equivariance_error
from geomssl.transforms import CyclicRotations

pytestmark = pytest.mark.peers
C4 = CyclicRotations(4)


@pytest.fixture
def photograph(monkeypatch):
    """In place of the picture that their checks fetch: a field in bytes, from 0 to 255."""
    fields = Fields(3, 1, 128, 0.1, seed=0).images(torch.arange(3))[:, 0]
    low, high = fields.amin(), fields.amax()
    picture = ((fields - low) / (high - low) * 255).byte().permute(1, 2, 0).numpy()
    assert picture.min() == 0
    assert picture.max() == 255
    monkeypatch.setattr(scipy.datasets, "face", lambda: picture)
    monkeypatch.setattr(matplotlib.image, "imread", lambda name: picture)
    return picture


def layer(library, filters, kind="regular"):
    """A C4 convolution of three images to one regular field, or to four trivial ones, with these filters (4, 3, 3, 3)."""
    space = library.space("c4")
    after = library.regular(space, 1) if kind == "regular" else library.trivial(space, 4)
    conv = library.conv(library.trivial(space, 3), after, padding=0, bias=False).eval()
    with torch.no_grad():
        conv.filter.copy_(filters)
    return conv


def as_model(library, conv):
    def model(images):
        return conv(library.nn.GeometricTensor(images, conv.in_type)).tensor.unflatten(1, (1, 4))

    return model


def images():
    return torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def random_filters():
    """As large as those of a layer that is initialised: their squares sum to about 2 for each output."""
    return torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * (2 / 27) ** 0.5


def test_a_zero_filter_passes_every_check_of_theirs_and_is_no_pass_here(library, photograph, capsys):
    conv = layer(library, torch.zeros(4, 3, 3, 3))
    conv.check_equivariance()
    library.nn.EquivariantModule.check_equivariance(conv)
    model = as_model(library, conv)
    found = equivariance_error(model, images(), C4, C4.elements()[1:])
    assert found.degenerate.all()
    assert found.total.isnan().all()
    with pytest.raises(NotEquivariant) as caught:
        assert_equivariant(model, C4, 0.1)
    assert not caught.value.judged


def test_a_random_filter_passes_their_check_of_convolutions_and_fails_here(library, photograph, capsys):
    # four channels that ought to turn as pictures do
    conv = layer(library, random_filters(), "trivial")
    seen = []
    conv.register_forward_pre_hook(lambda _, given: seen.append(given[0].tensor))
    conv.check_equivariance()
    # why: bytes are divided by 255 twice, so the picture is -0.5 all over but for 0.004, under a tolerance of 0.1
    inside = seen[-1][..., 40:-40, 40:-40]
    assert float(inside.mean()) == pytest.approx(-0.5, abs=0.004)
    assert 0 < float(inside.max() - inside.min()) < 1 / 255
    with pytest.raises(AssertionError, match="too high"):
        library.nn.EquivariantModule.check_equivariance(conv)
    found = equivariance_error(as_model(library, conv), images(), C4, C4.elements()[1:], "spatial")
    assert float(found.bounds.low_any.max()) > 1
    with pytest.raises(NotEquivariant) as caught:
        assert_equivariant(as_model(library, conv), C4, 0.1, action="spatial")
    assert caught.value.judged


def test_their_generic_check_depends_on_the_scale_and_ours_does_not(library, capsys):
    small = layer(library, 1e-9 * random_filters())
    library.nn.EquivariantModule.check_equivariance(small)
    totals = [
        equivariance_error(as_model(library, layer(library, scale * random_filters())), images(), C4, C4.elements()[1:]).total
        for scale in (1e-9, 1.0)
    ]
    assert float(totals[0].min()) > 0.8
    assert torch.allclose(*totals, rtol=1e-4)


def test_an_equivariant_filter_passes_all(library, photograph, capsys):
    space = library.space("c4")
    torch.manual_seed(0)
    conv = library.conv(library.trivial(space, 3), library.regular(space, 1), padding=0, bias=False).eval()
    conv.check_equivariance()
    library.nn.EquivariantModule.check_equivariance(conv, atol=1e-5)
    assert_equivariant(as_model(library, conv), C4, 1e-5)
