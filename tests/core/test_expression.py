"""Transforms from a short text: what is made, what is listed, one canonical form, and one line for every mistake."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms import (
    Brightness,
    Compose,
    CyclicRotations,
    Dihedral,
    GaussianBlur,
    Hue,
    Rotate,
    Scales,
    Shear,
    Translate,
    Translations,
    Zoom,
    named,
    parse,
)
from geomssl.transforms.compose import POLICIES


def draws(text, n=4000, size=(20, 20)):
    return named(text).sample(n, generator(0, "test"), size)


@pytest.mark.parametrize(
    ("text", "canonical", "kind", "low", "high"),
    [
        ("rotate(±30)", "rotate(±30)", Rotate, [-30], [30]),
        ("Rotate( +-30 )", "rotate(±30)", Rotate, [-30], [30]),
        ("rotate(-30..30)", "rotate(±30)", Rotate, [-30], [30]),
        ("rotate(+/-30 deg)", "rotate(±30)", Rotate, [-30], [30]),
        ("rotate(10..20.5°)", "rotate(10..20.5)", Rotate, [10], [20.5]),
        ("shear(±10)", "shear(±10)", Shear, [-10], [10]),
        ("zoom(0.57..1)", "zoom(0.57..1)", Zoom, [0.57], [1]),
        ("hue(0.1)", "hue(±0.1)", Hue, [-0.1], [0.1]),
        ("hue(-.1..1e-1)", "hue(±0.1)", Hue, [-0.1], [0.1]),
        ("brightness(±0.2)", "brightness(±0.2)", Brightness, [0.8], [1.2]),
        ("brightness(0.2)", "brightness(±0.2)", Brightness, [0.8], [1.2]),
        ("brightness(0.9..1.3)", "brightness(0.9..1.3)", Brightness, [0.9], [1.3]),
        ("blur(0.5..2)", "blur(0.5..2)", GaussianBlur, [0.5], [2]),
        ("gaussian-blur(0.5..2px)", "blur(0.5..2px)", GaussianBlur, [0.5], [2]),
        ("translate(0.2)", "translate(0.2)", Translate, [-4, -4], [4, 4]),
        ("translate(±3px)", "translate(3px)", Translate, [-3, -3], [3, 3]),
        ("translate(8px, wrap)", "translate(8px, wrap)", Translations, [-8, -8], [8, 8]),
        ("translate(wrap, 3 pixels)", "translate(3px, wrap)", Translations, [-3, -3], [3, 3]),
    ],
)
def test_a_range_is_drawn_from_all_of_it(text, canonical, kind, low, high):
    found = parse(text)
    assert (type(found.transform), found.text, found.grid) == (kind, canonical, None)
    params = draws(text)
    spread = torch.tensor(high) - torch.tensor(low)
    assert (params.amin(0) >= torch.tensor(low) - 1e-6).all()
    assert (params.amax(0) <= torch.tensor(high) + 1e-6).all()
    assert (params.amax(0) - params.amin(0) > 0.98 * spread).all()
    limits = [(p.low, p.high) for p in found.transform.parameters]
    if not canonical.startswith("translate"):
        assert limits == [pytest.approx(pair) for pair in zip(low, high, strict=True)]


@pytest.mark.parametrize(
    ("text", "canonical", "rows"),
    [
        ("rotate(15, 30, 45)", "rotate(15, 30, 45)", [[15], [30], [45]]),
        ("rotate(90)", "rotate(90)", [[90]]),
        ("rotate(-30..30 by 15)", "rotate(-30..30 by 15)", [[-30], [-15], [0], [15], [30]]),
        ("rotate(±30 by 15)", "rotate(-30..30 by 15)", [[-30], [-15], [0], [15], [30]]),
        ("rotate(0..10 by 4)", "rotate(0..10 by 4)", [[0], [4], [8]]),
        ("zoom(0.5, 2)", "zoom(0.5, 2)", [[0.5], [2]]),
        ("hue(-0.25, 0.25)", "hue(-0.25, 0.25)", [[-0.25], [0.25]]),
        ("brightness(0.5..1.5 by 0.5)", "brightness(0.5..1.5 by 0.5)", [[0.5], [1], [1.5]]),
        ("blur(1, 2)", "blur(1, 2)", [[1], [2]]),
        ("translate(0:4, 3:-2)", "translate(0:4, 3:-2)", [[0, 4], [3, -2]]),
        ("translate(0.5:0px, wrap)", "translate(0.5:0, wrap)", [[0.5, 0]]),
        ("translate(-4..4 by 8, wrap)", "translate(-4..4px by 8, wrap)", [[-4, -4], [-4, 4], [4, -4], [4, 4]]),
        ("flips + rotate(10, 20)", "flips + rotate(10, 20)", [[0, 10], [0, 20], [1, 10], [1, 20]]),
    ],
)
def test_a_list_or_a_grid_is_exactly_that_and_is_drawn_from_too(text, canonical, rows):
    found = parse(text)
    assert (found.grid.tolist(), found.text) == (rows, canonical)
    assert sorted(map(tuple, draws(text, 500).unique(dim=0).tolist())) == sorted(map(tuple, rows))
    images = torch.rand(len(rows), 3, 20, 20)
    assert found.transform(images, found.grid).shape == images.shape


def test_tenths_do_not_lose_the_last_step():
    assert len(parse("zoom(0.1..0.7 by 0.1)").grid) == 7
    assert parse("hue(-0.3..0.3 by 0.1)").grid[-1].item() == pytest.approx(0.3)


def test_groups_policies_and_own_transforms_keep_their_names():
    assert isinstance(named("c4"), CyclicRotations)
    assert isinstance(named("D4"), Dihedral)
    assert isinstance(parse("translate(wrap)").transform, Translations)
    assert parse("translate(wrap)").text == "translations"
    for name in POLICIES:
        assert (named(name).name, parse(name).text) == (name, name)
    assert isinstance(named("scales(1, 1.25)"), Scales)
    assert named("geomssl.transforms.groups:Flips").name == "flips"


def test_a_sum_acts_from_left_to_right():
    found = parse("rotate(±30) + hue(0.1)")
    assert isinstance(found.transform, Compose)
    assert [p.name for p in found.transform.parameters] == ["rotate.angle", "hue.hue"]
    assert (found.text, found.grid) == ("rotate(±30) + hue(±0.1)", None)
    mixed = parse("rotate(15, 30) + hue(0.1)")
    assert mixed.grid is None
    params = mixed.transform.sample(200, generator(0, "test"), (8, 8))
    assert params[:, 0].unique().tolist() == [15, 30]
    assert params[:, 1].unique().numel() > 100
    assert parse("c4 + hue(±0.1)").grid is None
    assert parse("c4 + d4").grid is None
    assert len(parse("c4 + d4 + rotate(1, 2)").grid) == 64


def test_angles_listed_at_quarter_turns_stay_exact():
    found = parse("rotate(90, 180, 45)")
    assert found.transform.is_exact(found.grid, (8, 8)).tolist() == [True, True, False]
    assert [p.kind for p in named("rotate(±180)").parameters] == ["periodic"]
    assert [p.kind for p in named("rotate(0..180)").parameters] == ["continuous"]


def test_a_blur_holds_three_sigma_and_is_always_applied():
    found = named("blur(0.5..2)")
    assert found.kernel_size == 13
    assert (found.sample(200, generator(0, "test"), (32, 32)) > 0).all()
    assert (named("gaussian-blur").sample(200, generator(0, "test"), (32, 32)) == 0).any()


def test_shifts_within_a_reach_never_name_one_shift_of_the_torus_twice():
    found = named("translate(8px, wrap)")
    assert len(found.elements((6, 6))) == 36
    assert len(found.elements((32, 32)).unique(dim=0)) == 17**2
    assert found == Translations()
    assert len(found.elements((6, 6)).remainder(6).unique(dim=0)) == 36


def test_a_shear_leans_the_top_to_the_right_and_undoes_itself():
    images = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    images[0, 0, :, 4] = 1
    leaning = Shear(50)(images, torch.tensor([[45.0]]))
    assert torch.equal(leaning[0, 0], torch.eye(9, dtype=torch.float64).flip(1))
    shear, params = Shear(), torch.tensor([[12.0]], dtype=torch.float64)
    points = torch.rand(1, 5, 5, 2, dtype=torch.float64)
    back = shear.pull(shear.pull(points, params, (9, 7)), shear.inverse(params), (9, 7))
    assert (back - points).abs().max() < 1e-14
    assert shear.is_exact(torch.tensor([[0.0], [1.0]]), (9, 9)).tolist() == [True, False]


numbers = st.floats(0, 40, allow_nan=False).map(lambda v: float(format(v, ".6g")))


@st.composite
def parts(draw):
    a, b = sorted((draw(numbers), draw(numbers)))
    step = draw(st.floats(0.5, 20)) if draw(st.booleans()) else None
    tail = "" if step is None else f" by {step:g}"
    return draw(
        st.sampled_from(
            [
                "c4", "d6", "flips", "simclr", "hue", "zoom", f"rotate(±{a:g}{tail})", f"rotate(-{b:g}..{a:g}{tail})",
                f"rotate({a:g}, {-a - 1:g})", f"shear(+-{b:g})", f"zoom({a + 0.1:g}..{b + 0.1:g}{tail})", f"hue({a / 100:g})",
                f"brightness(±{a:g})", f"contrast({a:g}..{b:g})", f"blur({a / 9 + 0.1:g}..{b / 9 + 0.1:g})",
                f"translate({a / 40:g})", f"translate({a:g}px)", f"translate({round(a)} px,wrap)", f"translate({-a:g}:{b:g})",
                f"translate(-1..{a:g}px{tail or ' by 9'}, wrap)", f"scales(1, {a + 1.5:g})", f"jitter({a:g}, {b:g})",
            ]
        )
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(parts(), min_size=1, max_size=3))
def test_the_canonical_text_is_read_as_itself_and_means_the_same(chosen):
    found = parse(" + ".join(chosen))
    again = parse(found.text)
    assert again.text == found.text
    assert again.transform.parameters == found.transform.parameters
    assert (again.grid is None) == (found.grid is None)
    assert found.grid is None or torch.equal(again.grid, found.grid)
    one, two = (e.transform.sample(5, generator(0, "test"), (16, 16)) for e in (found, again))
    assert torch.equal(one, two)


def complaint(text):
    try:
        return parse(text).text
    except GeomsslError as error:
        return str(error)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="rotaezm(±30.,1 +-by:)wpx…e", max_size=25))
def test_any_text_is_read_or_refused_in_one_line(text):
    assert "\n" not in complaint(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rotat(±30)", "did you mean 'rotate'"),
        ("c4 + rotat(±30)", "did you mean 'rotate'"),
        ("rotate(±30", "at '(±30'; expected a closing parenthesis"),
        ("rotate(±30))", "one pair of parentheses"),
        ("rotate(thirty)", "at 'thirty'; expected a number"),
        ("rotate(30..-30)", "the smaller number first"),
        ("rotate(±200)", "0 to 180 degrees"),
        ("rotate(90, 180, 270)", "did you mean 'c4'"),
        ("rotate(200, 300)", "did you mean 'rotate(-160, -60)'"),
        ("rotate(0..360)", "did you mean 'rotate(±180)'"),
        ("translate(8)", "did you mean 'translate(8px)'"),
        ("p4", "did you mean 'c4'"),
        ("shift", "did you mean 'translate'"),
        ("rotate(8px)", "without px"),
        ("rotate(10, 5..6)", "at '5..6'; expected one range, or a list"),
        ("rotate(5, 5)", "numbers that differ"),
        ("rotate(1..5 by 0)", "a step above 0"),
        ("rotate(5 by 2)", "a range before 'by'"),
        ("rotate(0..180 by 1e-9)", "at most 65536 steps"),
        ("zoom(±0.5)", "0 < low"),
        ("hue(0.9)", "0.5 turns"),
        ("hue(-0.7..0)", "-0.5 to 0.5"),
        ("brightness(-1..1)", "factors from 0"),
        ("translate(8px, warp)", "did you mean 'wrap'"),
        ("translate(0.2, wrap)", "pixels, such as 8px"),
        ("translate(-1..8px)", "as far one way as the other"),
        ("translate(1.5px, wrap)", "whole pixels"),
        ("translate(3:x)", "a shift dy:dx"),
        ("translate(0..300px by 1)", "at most 65536 shifts"),
        ("c4(3)", "c4 without arguments"),
        ("simclr(3)", "simclr without arguments"),
        ("jitter(1, 1, 1, 0, 1)", "at most 4 numbers"),
        ("", "such as c4"),
        ("c4 +", "on both sides of every +"),
        ("c4 * d4", "name or name(arguments)"),
        ("no.such.module:thing", "importable"),
    ],
)
def test_a_mistake_is_one_line_that_shows_the_place(text, said):
    with pytest.raises(GeomsslError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_keep_ten_digits():
    assert parse(f"rotate({math.pi})").text == "rotate(3.141592654)"
