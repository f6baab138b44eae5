"""views: pictures against a float64 tracer of its own, true tangents, factors as drawn, splits that are apart."""

import math

import pytest
import torch

from geomssl import data
from geomssl.data.raytrace import BACKGROUND, HALF_WIDTH, PART, camera, render
from geomssl.data.views import DISTANCE, ELEVATION, INSTANCES, ViewsSet, _drawn
from geomssl.errors import GeomsslError

DOUBLE = torch.float64
# torch itself compiles a script when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


def scene(n=5, seed=0, parts=2):
    """Objects, views and backgrounds in float64, every number drawn within the range of `views`."""
    draw = torch.Generator().manual_seed(seed)
    objects = torch.rand(n, parts, PART, generator=draw, dtype=DOUBLE)
    objects[:, :, 3:5] = 0.3 + 0.8 * objects[:, :, 3:5]
    objects[:, 0, :3] = 0.36 + 0.3 * objects[:, 0, :3]
    objects[:, 0, 5:8] = 0
    if parts > 1:
        objects[:, 1, :3] = 0.16 + 0.14 * objects[:, 1, :3]
        objects[:, 1, 5:8] = torch.tensor([0.6, 0.2, 0.1], dtype=DOUBLE)
    view = torch.rand(n, 4, generator=draw, dtype=DOUBLE) * torch.tensor([360, 60, 1.6, 1], dtype=DOUBLE)
    background = torch.zeros(n, BACKGROUND, dtype=DOUBLE)
    background[:, :3] = 0.5
    return objects, view + torch.tensor([0, 5, 3.6, 0], dtype=DOUBLE), background


def gauge(points, part):
    """Barr's inside-outside function, written anew: below 1 inside. points (..., 3)."""
    x, y, z = ((points - part[5:8]) / part[:3]).abs().unbind(dim=-1)
    e1, e2 = part[3], part[4]
    return (x ** (2 / e2) + y ** (2 / e2)) ** (e2 / e1) + z ** (2 / e1)


def test_a_pixel_shows_the_object_where_a_march_along_its_ray_enters_it():
    size, (objects, view, background) = 24, scene(3, parts=1)
    found = (render(objects, view, background, size) - 0.5).abs().amax(dim=1) > 1e-9
    line = (torch.arange(size, dtype=DOUBLE) + 0.5) / size * 2 - 1
    march, checked = torch.linspace(2, 7, 2000, dtype=DOUBLE)[:, None, None, None], 0
    for i in range(3):
        azimuth, elevation, distance = (float(v) for v in view[i, :3])
        flat = math.cos(math.radians(elevation))
        turn = math.radians(azimuth)
        outward = torch.tensor([flat * math.cos(turn), flat * math.sin(turn), math.sin(math.radians(elevation))], dtype=DOUBLE)
        right = torch.linalg.cross(-outward, torch.tensor([0.0, 0.0, 1.0], dtype=DOUBLE))
        right = right / right.norm()
        up = torch.linalg.cross(right, -outward)
        half = math.tan(math.radians(18))
        rays = -outward + half * (line[None, :, None] * right - line[:, None, None] * up)
        least = gauge(distance * outward + march * rays, objects[i, 0]).amin(dim=0)
        clear = (least - 1).abs() > 0.02
        assert torch.equal(found[i][clear], (least < 1)[clear])
        checked += int(clear.sum())
    assert checked > 1500


def test_a_sphere_is_a_disc_of_the_radius_that_perspective_gives():
    part = torch.zeros(1, 1, PART, dtype=DOUBLE)
    part[..., :3], part[..., 3:5], part[..., 8:] = 0.5, 1.0, 0.7
    view = torch.tensor([[30.0, 20.0, 4.0, 0.0]], dtype=DOUBLE)
    background = torch.zeros(1, BACKGROUND, dtype=DOUBLE)
    size = 201
    seen = (render(part, view, background, size)[0] > 0).any(dim=0)
    radius = 0.5 / math.sqrt(16 - 0.25) / HALF_WIDTH * size / 2
    assert math.sqrt(float(seen.sum()) / math.pi) == pytest.approx(radius, abs=0.15)
    rows, columns = seen.nonzero().double().mean(dim=0).tolist()
    assert (rows, columns) == pytest.approx((100, 100), abs=0.02)


def test_the_surface_that_is_lit_faces_the_light_and_takes_its_colour():
    part = torch.zeros(1, 1, PART, dtype=DOUBLE)
    part[..., :3], part[..., 3:5], part[..., 8:] = 0.6, 1.0, 0.8
    view = torch.tensor([[0.0, 10.0, 4.0, 0.0]], dtype=DOUBLE)
    picture = render(part, view, torch.zeros(1, BACKGROUND, dtype=DOUBLE), 65)[0]
    assert picture[:, 20, 32].sum() > 2 * picture[:, 44, 32].sum()
    red, green, blue = picture[:, 24, 32].tolist()
    assert red > 1.4 * green
    assert green == pytest.approx(blue)
    view[0, 3] = 1 / 3
    turned = render(part, view, torch.zeros(1, BACKGROUND, dtype=DOUBLE), 65)[0, :, 24, 32]
    assert turned.tolist() == pytest.approx([blue, red, green])


@pytest.mark.parametrize(("factor", "step"), [(0, 1e-3), (1, 1e-3), (2, 1e-5), (3, 1e-5)])
def test_jvp_is_the_derivative_of_the_picture(factor, step):
    """In float64, at every pixel: edges, where one part hides the other, and inside."""
    objects, view, background = scene(6)
    along = torch.zeros_like(view)
    along[:, factor] = 1

    def draw(at):
        return render(objects, at, background, 32)

    _, tangent = torch.func.jvp(draw, (view,), (along,))
    difference = (draw(view + step * along) - draw(view - step * along)) / (2 * step)
    assert tangent.abs().max() > 0.05
    assert (tangent - difference).abs().max() < 1e-4 * tangent.abs().max()


def test_backward_agrees_with_forward_mode():
    objects, view, background = scene(2)
    weight = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    given = view.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((render(objects, given, background, 16) * weight).sum(), given)
    for factor in range(4):
        along = torch.zeros_like(view)
        along[:, factor] = 1
        tangent = torch.func.jvp(lambda at: render(objects, at, background, 16), (view,), (along,))[1]
        assert torch.allclose((tangent * weight).sum(dim=(1, 2, 3)), gradient[:, factor], rtol=1e-9, atol=1e-9)


def test_turns_are_closed_and_a_picture_depends_on_its_own_scene_alone():
    objects, view, background = scene(4)
    once = render(objects, view, background, 20)
    round_it = view + torch.tensor([360.0, 0, 0, 1], dtype=DOUBLE)
    assert torch.allclose(render(objects, round_it, background, 20), once, atol=1e-9)
    alone = render(objects[2:3], view[2:3], background[2:3], 20)
    assert torch.allclose(alone[0], once[2], atol=1e-12)
    swapped = render(objects.flip(1), view, background, 20)
    assert torch.allclose(swapped, once, atol=1e-12)


def test_float32_is_float64_to_a_grey_level():
    exact = scene(16, seed=3)
    single = render(*(t.float() for t in exact), 32)
    assert (single.double() - render(*exact, 32)).abs().max() < 0.5 / 255


def test_the_camera_is_a_right_handed_frame_that_looks_at_the_origin():
    _, view, _ = scene(7)
    eye, forward, right, up = camera(view)
    assert torch.allclose(eye + view[:, 2:3] * forward, torch.zeros_like(eye), atol=1e-12)
    frame = torch.stack([right, up, -forward], dim=2)
    assert torch.allclose(frame.transpose(1, 2) @ frame, torch.eye(3, dtype=DOUBLE).expand(7, 3, 3), atol=1e-12)
    assert torch.allclose(torch.linalg.det(frame), torch.ones(7, dtype=DOUBLE))


def test_what_cannot_be_traced_is_refused():
    objects, view, background = scene(2)
    with pytest.raises(GeomsslError, match="parts"):
        render(objects[:, :, :5], view, background, 16)
    objects[0, 0, 3] = 2.5
    with pytest.raises(GeomsslError, match="exponent"):
        render(objects, view, background, 16)


def load(split="train", **options):
    return data.load("views", split, **{"n": 96, "size": 16, "classes": 4, "length": 6, **options})


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others():
    one = load()
    kept = one.pixels.clone()
    assert load() is one, "a split is rendered once in a process"
    _drawn.cache_clear()
    assert torch.equal(load().pixels, kept)
    assert load().fingerprint == one.fingerprint
    assert not torch.equal(load(seed=1).pixels, kept)


@pytest.mark.parametrize("unseen", ["instances", "sessions"])
def test_splits_are_apart_by_instance_and_where_asked_by_session(unseen):
    parts = {split: load(split, unseen=unseen) for split in ("train", "val", "test")}
    objects = {split: set(p.factors["object"].tolist()) for split, p in parts.items()}
    assert len(set.union(*objects.values())) == sum(len(found) for found in objects.values())
    for part in parts.values():
        assert part.labels.bincount().min() > 0
        assert torch.equal(part.labels.float(), part.factors["object"].div(sum(INSTANCES)).floor())
    sessions = {split: set(p.factors["session"].tolist()) for split, p in parts.items()}
    if unseen == "sessions":
        assert sessions["train"] == {0, 1}
        assert not sessions["train"] & sessions["test"]
    else:
        assert sessions["train"] == sessions["test"] == set(range(11))


def test_factors_are_those_of_the_pictures():
    source = load()
    rows = torch.arange(20)
    view = torch.stack([source.factors[name] for name in ("azimuth", "elevation", "distance", "hue")], dim=1)[rows]
    again = source.draw(rows, view).mul(255).round()
    assert (again - source.images(rows)).abs().max() <= 1
    for name, (low, high) in {"elevation": ELEVATION, "distance": DISTANCE, "azimuth": (0, 360), "hue": (0, 1)}.items():
        assert low <= source.factors[name].min() <= source.factors[name].max() <= high
    assert {p.name for p in source.parameters} == set(source.factors)


def test_a_sequence_is_one_object_in_one_session_whose_view_moves_a_little():
    source = load(length=8)
    known = source.factors
    for name in ("object", "session"):
        runs = known[name].view(-1, 8)
        assert bool((runs == runs[:, :1]).all())
    turn = torch.diff(known["azimuth"].view(-1, 8), dim=1)
    turn = (turn + 180) % 360 - 180
    assert 0 < turn.abs().max() <= 20.01
    assert torch.allclose(turn, turn[:, :1].expand_as(turn), atol=1e-3), "at one pace"
    assert torch.diff(known["distance"].view(-1, 8), dim=1).abs().max() <= 0.1501


def test_views_are_spread_evenly():
    source = data.load("views", "train", n=600, size=8, classes=4, length=1)
    for name, (low, high) in {"elevation": ELEVATION, "distance": DISTANCE, "azimuth": (0, 360), "hue": (0, 1)}.items():
        counts = torch.histc(source.factors[name], 4, low, high)
        assert (counts - 150).abs().max() < 4 * math.sqrt(600 * 0.25 * 0.75)
    assert source.labels.bincount().tolist() == [150] * 4


def test_subsets_keep_their_scenes_and_factors():
    source = load()
    rows = torch.tensor([5, 3, 40])
    few = source.some(rows)
    assert torch.equal(few.images(torch.arange(3)), source.images(rows))
    assert torch.equal(few.draw(torch.arange(3)), source.draw(rows))
    assert torch.equal(few.factors["azimuth"], source.factors["azimuth"][rows])
    assert few.parameters == source.parameters


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(GeomsslError, match="at least 3"):
        load(unseen="sessions", sessions=2)
    with pytest.raises(GeomsslError, match="clases"):
        load(clases=3)
    assert ViewsSet.presence().present
