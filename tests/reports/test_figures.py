"""Drawing: what stands where, in which colour, and that nothing a label holds can break it."""

import dataclasses
import math
import re
import warnings
from xml.etree import ElementTree as ET

import pytest
from report_samples import embed, equivariance, linear, rank

from geomssl import figures
from geomssl.artifact import Figure, Table
from geomssl.figure_style import COLOURS

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter(f"{SVG}text")]


def drawn(artifact, **how):
    figure = artifact.figures[0]
    return figures.draw(figure, artifact.table(figure.table), **how)


BARS = Table("t", "", {"x": ["a", "b"], "y": [1.0, 3.0], "low": [0.5, 2.0], "high": [2.0, 4.0]})
BAR = Figure("f", "bar", "Bars", table="t", x="x", y="y", low="low", high="high", x_label="where", y_label="how much")


@pytest.mark.parametrize("make", [equivariance, rank, linear, embed])
@pytest.mark.parametrize("theme", ["page", "file"])
def test_is_whole_svg_that_scales_and_is_named(make, theme):
    root = ET.fromstring(drawn(make("run"), theme=theme))
    assert root.get("width") == "100%"
    assert root.get("height") is None
    assert root.get("viewBox") == "0 0 640 360"
    assert root.get("role") == "img"
    ids = root.get("aria-labelledby").split()
    assert [root.find(f"*[@id='{i}']").tag for i in ids] == [f"{SVG}title", f"{SVG}desc"]


def test_the_same_data_gives_the_same_bytes():
    assert drawn(rank("run")) == drawn(rank("run"))
    assert drawn(rank("run")) != drawn(rank("hssl-c4-cnn"))


def test_a_page_has_no_colour_of_its_own_and_a_file_has_no_variable():
    page, file = drawn(embed("run")), drawn(embed("run"), theme="file")
    assert re.findall(r": ?#[0-9a-f]{3,6}", page) == []
    assert {"--ink", "--grid", "--paper", "--series-0", "--series-9"} <= set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    assert "var(" not in file
    # the picture is the same but for the colours
    light = re.sub(r"var\(--([a-z0-9-]+)\)", lambda m: figures.LIGHT[m[1]], page)
    assert re.findall(r'data-row="\d+"', light) == re.findall(r'data-row="\d+"', file)


def test_a_file_states_its_title_and_a_white_ground():
    assert "Bars" in texts(figures.draw(BAR, BARS, "file"))
    assert f"fill: {figures.LIGHT['paper']}" in figures.draw(BAR, BARS, "file")
    assert "Bars" not in texts(figures.draw(BAR, BARS))


@pytest.mark.parametrize("make", [equivariance, rank, linear])
def test_is_small(make):
    assert len(drawn(make("run")).encode()) < 40_000


def test_a_thousand_points_are_small_and_carry_their_rows():
    svg = drawn(embed("run", 1000))
    assert len(svg.encode()) < 150_000
    assert sorted(map(int, re.findall(r'data-row="(\d+)"', svg))) == list(range(1000))


def test_points_stand_where_the_axes_say():
    # three points on a known lattice: right is larger x, up is larger y
    table = Table("t", "", {"x": [0.0, 2.0, 0.0], "y": [0.0, 0.0, 1.0]})
    figure = Figure("f", "scatter", "t", table="t", x="x", y="y")
    root = ET.fromstring(figures.draw(figure, table))
    at = {int(u.get("data-row")): (float(u.get("x")), float(u.get("y"))) for u in root.iter(f"{SVG}use") if u.get("data-row")}
    assert at[1][0] > at[0][0]
    assert at[2][1] < at[0][1]
    assert at[1][1] == at[0][1]
    assert at[2][0] == at[0][0]
    # and among the tick labels: x = 2 stands over the tick that reads 2
    ticks = {"".join(t.itertext()): (float(t.get("x")), float(t.get("y"))) for t in root.iter(f"{SVG}text") if t.get("x")}
    assert abs(ticks["2.00"][0] - at[1][0]) < 1


def test_a_missing_point_is_left_out_and_keeps_the_others_rows():
    table = Table("t", "", {"x": [0.0, None, 2.0, math.nan], "y": [0.0, 1.0, 2.0, 3.0]})
    svg = figures.draw(Figure("f", "scatter", "t", table="t", x="x", y="y"), table)
    assert re.findall(r'data-row="(\d+)"', svg) == ["0", "2"]


def heights(svg):
    """Upper and lower ends of the bars, in units of the drawing."""
    boxes = [p.get("d") for p in ET.fromstring(svg).iter(f"{SVG}path") if "opacity: 0.82" in (p.get("style") or "")]
    found = []
    for d in boxes:
        ys = [float(v) for v in re.findall(r"[ML] \S+ (\S+)", d)]
        found.append(max(ys) - min(ys))
    return found


def test_bars_are_as_long_as_their_values():
    first, second = heights(figures.draw(BAR, BARS))
    assert second / first == pytest.approx(3, rel=1e-3)


def test_whiskers_reach_from_low_to_high():
    svg = figures.draw(BAR, BARS)
    unit = heights(svg)[0]
    lines = [
        [float(v) for v in re.findall(r"[ML] \S+ (\S+)", p.get("d"))] for p in ET.fromstring(svg).iter(f"{SVG}path")
        if "stroke: var(--ink); stroke-width: 1.2" in (p.get("style") or "")
    ]
    assert [(max(y) - min(y)) / unit for y in lines] == pytest.approx([1.5, 2.0], rel=1e-2)


def test_bars_start_at_zero_even_where_panels_share_axes():
    assert figures.shared([(BAR, BARS)]).y[0] == 0
    a, b = (figures.draw(BAR, t, limits=figures.shared([(BAR, BARS), (BAR, HALF)])) for t in (BARS, HALF))
    assert heights(a)[1] / heights(b)[1] == pytest.approx(2, rel=1e-3)


HALF = dataclasses.replace(BARS, columns={k: v if k == "x" else [n / 2 for n in v] for k, v in BARS.columns.items()})


def test_shared_limits_hold_values_and_intervals_of_every_panel():
    line = dataclasses.replace(BAR, kind="line", log_y=True)
    limits = figures.shared([(line, BARS), (line, HALF)])
    assert limits.y[0] < 0.25
    assert limits.y[1] > 4
    assert limits.x is None


def test_a_logarithmic_bar_is_a_point_and_zero_is_marked():
    table = dataclasses.replace(BARS, columns=BARS.columns | {"y": [0.0, 3.0]})
    svg = figures.draw(dataclasses.replace(BAR, log_y=True), table)
    assert heights(svg) == []
    assert "0" in texts(svg)
    assert "10" in texts(svg)


def test_powers_of_ten_are_written_out():
    written = {1e-7: "10⁻⁷", 1e-3: "10⁻³", 0.01: "10⁻²", 0.1: "0.1", 1.0: "1", 10.0: "10", 1e4: "10⁴", 0.0: ""}
    assert {v: figures.power(v) for v in written} == written


NASTY = [
    '<script>alert("1")</script>', "_hidden", "$x^2$", "a & b", 'id="x" href="#y"', "#ffffff", "日本\x00語", "w" * 300, "",
    None,
]


@pytest.mark.parametrize("kind", ["bar", "line", "scatter"])
def test_labels_are_shown_and_never_read(kind):
    n = len(NASTY)
    table = Table("t", "", {"x": list(range(n)) if kind == "scatter" else NASTY, "y": [1.0 + i for i in range(n)], "s": NASTY})
    figure = Figure("f", kind, "<b>&\x07", table="t", x="x", y="y", series="s", x_label="<i>", y_label='"&"')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = figures.draw(figure, table)
    said = " ".join(texts(svg))
    assert "<script" not in svg
    for part in ('<script>alert("1")</scr', "_hidden", "$x^2$", "a & b", 'id="x" href="#y"', "#ffffff", "日本 語", "none"):
        assert part in said or part[:13] in said
    assert "w" * 40 not in said


def test_ids_are_prefixed_and_referenced():
    svg = figures.draw(BAR, BARS, prefix="p7")
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert len(ids) == len(set(ids))
    assert all(i.startswith("p7-") for i in ids)
    assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
    assert "<style" not in svg


def test_a_series_keeps_its_colour_when_others_are_missing():
    table = dataclasses.replace(BARS, columns=BARS.columns | {"run": ["b", "b"]})
    svg = figures.draw(dataclasses.replace(BAR, series="run"), table, order=["a", "b"])
    assert "--series-1" in svg
    assert "--series-0" not in svg


def test_classes_have_the_same_colour_whatever_comes_first():
    table = Table("t", "", {"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 2.0], "s": ["10", "9", "1"]})
    figure = Figure("f", "scatter", "t", table="t", x="x", y="y", series="s")
    assert [(s.label, s.style) for s in figures.split(figure, table)] == [("1", 0), ("9", 1), ("10", 2)]


def test_what_cannot_be_drawn_is_refused_by_name():
    with pytest.raises(KeyError, match="no column 'z'"):
        figures.draw(dataclasses.replace(BAR, y="z"), BARS)
    with pytest.raises(ValueError, match="image"):
        figures.draw(Figure("f", "image", "t", file="f.png"), BARS)


@pytest.mark.parametrize("kind", ["bar", "line", "scatter"])
def test_an_empty_table_is_an_empty_drawing(kind):
    empty = Table("t", "", {"x": [], "y": [], "low": [], "high": []})
    ET.fromstring(figures.draw(dataclasses.replace(BAR, kind=kind), empty))


def linear_rgb(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def dot(row, values):
    return sum(a * b for a, b in zip(row, values, strict=True))


def luminance(colour):
    return dot((0.2126, 0.7152, 0.0722), linear_rgb(colour))


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK])
def test_colours_stand_out_from_their_paper(theme):
    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    # WCAG: 3 for graphics, 4.5 for text
    assert all(contrast(theme[f"series-{i}"], theme["paper"]) >= 3 for i in range(COLOURS))
    assert contrast(theme["muted"], theme["paper"]) >= 4.5
    assert contrast(theme["ink"], theme["paper"]) >= 7


# Viénot, Brettel and Mollon 1999: what a protanope and a deuteranope see, in linear RGB.
VIENOT = {
    "protan": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deutan": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK])
@pytest.mark.parametrize("seen", VIENOT)
def test_the_first_series_differ_for_the_colour_blind(theme, seen):
    def lab(colour):
        rgb = [min(1.0, max(0.0, dot(row, linear_rgb(colour)))) for row in VIENOT[seen]]
        xyz = [dot(row, rgb) for row in ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))]
        fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
        return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)

    first = [lab(theme[f"series-{i}"]) for i in range(4)]
    assert min(math.dist(a, b) for i, a in enumerate(first) for b in first[:i]) > 12


def test_light_colours_are_distinct_names():
    assert len(set(figures.LIGHT.values())) == len(figures.LIGHT) == len(figures.DARK)
    assert figures.LIGHT.keys() == figures.DARK.keys()


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn(rank("run"))
    assert dict(matplotlib.rcParams) == before


def test_moments_of_a_run_share_its_style_and_widen_with_the_step():
    order = ["a @0", "a @5", "a @10", "b @0", "b @10", "b"]
    table = Table("t", "", {"run": order, "x": [1.0] * 6, "y": [1.0] * 6})
    found = figures.split(Figure("f", "line", "", table="t", x="x", y="y", series="run"), table, order)
    assert [s.style for s in found] == [0, 0, 0, 1, 1, 1]
    widths = [s.width for s in found]
    assert widths[0] == widths[3] < widths[1] < widths[2] == widths[4] < widths[5]
    plain = figures.split(Figure("f", "line", "", table="t", x="x", y="y", series="run"), table, ["b", "a @x"])
    assert {s.label: (s.style, s.width) for s in plain}["b"] == (0, None)
    assert all(s.width is None for s in plain)
    assert len(plain) == 6


def test_the_diagonal_is_where_both_axes_agree():
    """A dashed line in the units of the axes; without it the drawing is what it was."""
    table = Table("t", "", {"x": [0.0, 10.0, 4.0], "y": [2.0, 9.0, 4.0]})
    plain = Figure("f", "scatter", "t", table="t", x="x", y="y")
    with_line = figures.draw(dataclasses.replace(plain, diagonal=True), table, prefix="f")
    dashed = [path for path in ET.fromstring(with_line).iter(f"{SVG}path") if "dasharray" in (path.get("style") or "")]
    assert len(dashed) == 1
    assert "dasharray" not in figures.draw(plain, table, prefix="f")
    (x0, y0), (x1, y1) = [tuple(map(float, at)) for at in re.findall(r"[ML] (\S+) (\S+)", dashed[0].get("d"))]
    place = {row: (float(x), float(y)) for x, y, row in re.findall(r'x="(\S+)" y="(\S+)" data-row="(\d)"', with_line)}
    # row 2 is the one with x = y
    across, up = place["2"]
    assert (across - x0) * (y1 - y0) == pytest.approx((up - y0) * (x1 - x0), abs=0.2 * (abs(x1 - x0) + abs(y1 - y0)))
    away, above = place["0"]
    assert above < y0 + (y1 - y0) * (away - x0) / (x1 - x0) - 1, "y = 2 at x = 0 lies above the line"


def test_a_cloud_is_named_where_it_is_one_and_not_where_its_points_are_everywhere():
    near = [0.0, 0.1, 0.2, 0.1] * 5
    far = [0.0, 10.0, 4.0, 7.0, 1.0] * 4
    table = Table("t", "", {"x": near + far, "y": near + far[::-1], "s": ["cloud"] * 20 + ["dust"] * 20})
    svg = figures.draw(Figure("f", "scatter", "t", table="t", x="x", y="y", series="s"), table)
    assert texts(svg).count("cloud") == 2, "in the legend and on the cloud"
    assert texts(svg).count("dust") == 1
