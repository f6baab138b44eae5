"""CIPER and its predictive half on a data set's own transformations, and positives from other images (row C7)."""

import pytest
import torch
import torch.nn.functional as F

from geomssl.data.base import Resident
from geomssl.encoders import build
from geomssl.errors import GeomsslError
from geomssl.learner import make_batch
from geomssl.losses import info_nce
from geomssl.objectives.ciper import CIPER
from geomssl.objectives.pairs import QUATERNION, change, changed, following, others
from geomssl.objectives.predictive import Predictive
from geomssl.objectives.reconstruction import Reconstruction
from geomssl.objectives.sie import SIE
from geomssl.objectives.simclr import SimCLR
from geomssl.objectives.vicreg import VICReg
from geomssl.transforms.base import Parameter

CPU, N = torch.device("cpu"), 24
OWN = {"policy": "none", "positives": "object", "object": "thing"}
BOTH = OWN | {"categories": ("session", "light"), "continuous": ("azimuth", "distance")}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def source(**more):
    """Six objects of four images; image i is known by the pixel i, four sequences of six frames stored backwards."""
    i = torch.arange(N)
    pixels = torch.randint(0, 255, (N, 3, 8, 8), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = i.to(torch.uint8)
    factors = {
        "thing": (i // 4).float(), "session": (i % 3 * 2).float(), "light": (i % 2).float(), "azimuth": (i * 77 % 360).float(),
        "distance": i.float(), "sequence": (i % 4).float(), "frame": -i.float(),
    }
    found = Resident("toys", "train", pixels, i % 2, ("a", "b"), factors | more)
    found.parameters = (
        Parameter("azimuth", "degrees", "periodic", 0.0, 0.0, 360.0), Parameter("light", "", "index", 0.0, 0.0, 1.0),
        Parameter("distance", "", "continuous", 0.0, 0.0, 24.0),
    )
    return found


def made(objective, data=None, **config):
    data = source() if data is None else data
    encoder = build("cnn", in_channels=3, widths=(4, 4, 8)).double().eval()
    found = objective(objective.Config(**config), encoder, 2, 3)
    found.complete(encoder, 8, data)
    found.double().eval()
    batch = make_batch(data, torch.arange(N).flip(0), found, CPU, 0, 1, 2)
    views = {k: v._replace(images=v.images.double(), params=v.params.double()) for k, v in batch.views.items()}
    return encoder, found, type(batch)(views, batch.labels, batch.indices, batch.draw, batch.factors)


def shown(view):
    return (view.images[:, 0, 0, 0] * 255).round().long()


def test_partners_are_other_images_of_the_same_object_and_bring_their_factors():
    _, _, batch = made(CIPER, **BOTH)
    own = torch.arange(N).flip(0)
    assert torch.equal(shown(batch.views["plain"]), own)
    for name in ("1", "2"):
        partner = shown(batch.views[name])
        assert torch.equal(partner // 4, own // 4)
        assert (partner != own).all()
        assert torch.equal(batch.views[name].factors["distance"].long(), partner)
    assert torch.equal(batch.factors["distance"].long(), own)
    assert not torch.equal(shown(batch.views["1"]), shown(batch.views["2"]))


def test_the_rows_of_a_process_are_rows_of_the_whole_batch():
    """Partners and their factors are drawn for the whole batch, so views do not depend on the number of processes."""
    data, (_, objective, _) = source(), made(CIPER, **BOTH)
    order = torch.randperm(N)
    whole, *parts = (
        make_batch(data, order, objective, CPU, 0, 5, rows=rows) for rows in (slice(None), slice(0, 12), slice(12, 24))
    )
    for name, view in whole.views.items():
        assert torch.equal(view.images, torch.cat([part.views[name].images for part in parts]))
        for factor in objective.factors:
            assert torch.equal(view.factors[factor], torch.cat([part.views[name].factors[factor] for part in parts]))
    assert torch.equal(whole.factors["azimuth"], torch.cat([part.factors["azimuth"] for part in parts]))


def test_every_other_image_of_an_object_is_drawn_as_often():
    draw = others(torch.tensor([0.0, 1, 0, 2, 0, 1, 2, 0]))
    found = draw(torch.zeros(6000, dtype=torch.long), torch.Generator().manual_seed(0))
    counts = found.bincount(minlength=8)
    assert counts.nonzero()[:, 0].tolist() == [2, 4, 7]
    # five standard deviations of a binomial count
    assert (counts[[2, 4, 7]] - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5
    assert set(draw(torch.tensor([1] * 9), torch.Generator()).tolist()) == {5}


@pytest.mark.parametrize("kind", [VICReg, Reconstruction])
def test_the_others_take_pairs_as_well(kind):
    own = torch.arange(N).flip(0)
    encoder, objective, batch = made(kind, **OWN)
    for name in ("1", "2"):
        assert torch.equal(shown(batch.views[name]) // 4, own // 4)
        assert (shown(batch.views[name]) != own).all()
    assert objective(encoder, batch).total.isfinite()


def test_the_next_frame():
    sequence, frame = torch.tensor([1.0, 0, 1, 0, 1]), torch.tensor([30.0, 1, 10, 2, 20])
    assert following(sequence, frame).tolist() == [4, 3, 4, 1, 0]
    _, _, batch = made(SimCLR, policy="none", positives="next")
    # frame = -index within index mod 4: the next frame is four images earlier, and the last one's is the one before
    own = torch.arange(N).flip(0)
    assert torch.equal(shown(batch.views["1"]), own)
    assert torch.equal(shown(batch.views["2"]), torch.where(own >= 4, own - 4, own + 4))


def expected(encoder, objective, batch):
    """Equation 1 with two categories and two continuous factors, example by example."""
    h = {name: encoder(view.images) for name, view in batch.views.items()}
    weights = [objective.predictor[0], objective.predictor[3]]
    rows, changes, classes = [], [], []
    for name in ("1", "2"):
        view = batch.views[name]
        hidden = F.layer_norm(weights[0](h["plain"] - h[name]), (512,)).relu()
        rows.append(weights[1](hidden))
        turn = view.factors["azimuth"] - batch.factors["azimuth"]
        turn = torch.stack([min((t - 360, t, t + 360), key=abs) for t in turn.double()])
        change = torch.stack([turn, (view.factors["distance"] - batch.factors["distance"]).double()], dim=1)
        changes.append((change - change.mean(dim=0)) / change.std(dim=0, correction=0))
        classes.append(torch.stack([view.factors["session"].long() // 2, view.factors["light"].long()], dim=1))
    rows, changes, classes = torch.cat(rows), torch.cat(changes), torch.cat(classes)
    error = ((rows[:, :2] - changes) ** 2).sum() / (2 * N * 2)
    n = torch.arange(2 * N)
    parts = zip((rows[:, 2:5], rows[:, 5:]), classes.T, strict=True)
    entropy = sum(-part.log_softmax(dim=1)[n, wanted].mean() for part, wanted in parts)
    return error, entropy, info_nce(objective.projector(h["1"]), objective.projector(h["2"]), 2.0, "nt-xent", symmetric=True)


def test_categories_by_cross_entropy_and_continuous_by_squared_error():
    encoder, objective, batch = made(CIPER, **BOTH, alpha=0.7)
    error, entropy, contrast = expected(encoder, objective, batch)
    losses = objective(encoder, batch)
    torch.testing.assert_close(losses.terms["regression"], error)
    torch.testing.assert_close(losses.terms["classification"], entropy)
    torch.testing.assert_close(losses.total, contrast + 0.7 * (error + entropy))


def test_predictive_is_ciper_without_contrast():
    encoder, whole, batch = made(CIPER, contrastive=0.0)
    _, half, _ = made(Predictive)
    half.predictor.load_state_dict(whole.predictor.state_dict())
    assert half.projector is None
    torch.testing.assert_close(half(encoder, batch).total, whole(encoder, batch).total)
    assert half(encoder, batch).terms.keys() == {"prediction"}


def test_sie_sees_how_the_factors_of_the_object_change():
    changes = {"known": (), "changes": ("azimuth", "distance"), "half": 5, "projector": (8, 6)}
    encoder, objective, batch = made(SIE, **OWN, **changes)
    own, other = shown(batch.views["1"]), shown(batch.views["2"])
    assert torch.equal(own, torch.arange(N).flip(0))
    assert torch.equal(other // 4, own // 4)
    turn = torch.deg2rad((other - own) * 77.0)
    code = torch.stack([turn.cos() - 1, turn.sin(), (other - own) / (N - 1)], dim=1)
    torch.testing.assert_close(objective.predictor.code(objective.given(batch)), code, rtol=0, atol=1e-6)
    objective(encoder, batch).total.backward()
    assert objective.predictor.net[0].weight.grad.abs().min() > 0
    with pytest.raises(GeomsslError, match="where none changes; expected positives = object or next"):
        made(SIE, known=(), changes=("azimuth",))
    with pytest.raises(GeomsslError, match="sie that sees no parameter; expected known transformations, or changes"):
        made(SIE, **OWN, known=())
    with pytest.raises(GeomsslError, match="factor 'azimut' of toys; .*did you mean 'azimuth'"):
        made(SIE, **OWN, known=(), changes=("azimut",))


def test_the_change_of_a_rotation_is_the_turn_between_the_two():
    """first^-1 second, as 3DIEBench's loader has it, against scipy; the same for both signs of either quaternion."""
    from scipy.spatial.transform import Rotation

    first, second = torch.randn(2, N, 4)
    first, second = (q / q.norm(dim=1, keepdim=True) for q in (first, second))
    before, after = (dict(zip(QUATERNION, q.unbind(dim=1), strict=True)) for q in (first, second))
    by = change(source(**before), "quaternion")
    turn = (Rotation.from_quat(first.numpy()).inv() * Rotation.from_quat(second.numpy())).as_matrix()
    found = changed(before, after, by)
    assert (found[:, 3] >= 0).all()
    torch.testing.assert_close(torch.from_numpy(Rotation.from_quat(found.numpy()).as_matrix()), torch.from_numpy(turn))
    torch.testing.assert_close(changed(before, {k: -v for k, v in after.items()}, by), found)
    data = source(**before)
    _, objective, batch = made(SIE, data, **OWN, known=(), changes=("quaternion",), half=5, projector=(8, 6))
    assert objective.given(batch).shape == (N, 4)
    assert torch.equal(objective.predictor.code(torch.tensor([[0.0, 0, 0, 1]])), torch.zeros(1, 4))
    encoder, objective, batch = made(Predictive, data, **OWN, continuous=("quaternion", "distance"))
    assert objective.predictor[-1].out_features == 5
    assert objective(encoder, batch).total.isfinite()


@pytest.mark.parametrize(("kind", "config"), [(Predictive, {}), (CIPER, BOTH), (CIPER, OWN | {"categories": ("session",)})])
def test_the_gradient_reaches_the_encoder_and_every_head(kind, config):
    encoder, objective, batch = made(kind, **config)
    objective(encoder, batch).total.backward()
    for name, parameter in [*encoder.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OWN | {"categories": ("sesion",)}, "factor 'sesion' of toys; expected one of thing, .* did you mean 'session'"),
        (OWN | {"continuous": ("flat",)}, "factor 'flat' of toys with the one value 3; expected a factor of at least two"),
        (OWN | {"continuous": ("gaps",)}, "factor 'gaps' of toys, unknown for 1 of 24 images"),
        (OWN | {"object": "single", "continuous": ("distance",)}, "24 of 24 objects with a single image"),
        ({"policy": "none", "positives": "next", "sequence": "distance", "continuous": ("azimuth",)}, "24 of 24 images alone"),
        ({"categories": ("session",)}, "between views of one image, where none changes; expected positives = next or object"),
        (OWN | {"continuous": ("session",), "categories": ("session",)}, "session in categories and in continuous"),
        (OWN | {"continuous": ("light",)}, "the change of 'light', a category; expected a continuous factor"),
        (OWN, "policy 'none' on 3 channels; expected a policy with parameters to predict, or factors"),
    ],
)
def test_what_the_data_set_lacks_is_one_line(config, message):
    i = torch.arange(N).float()
    data = source(flat=i * 0 + 3, gaps=torch.where(i == 5, torch.nan, i), single=i)
    with pytest.raises(GeomsslError, match=message) as caught:
        made(Predictive, data, **config)
    assert "\n" not in str(caught.value)
