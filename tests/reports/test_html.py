"""The page as text: whole, small, closed, in order, and never made to run what a name holds."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from report_samples import RUNS, embed, equivariance, everything, linear, png, rank, saliency

from geomssl.artifact import Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.reports import html
from geomssl.reports.gate import Rule, Rules, evaluate
from geomssl.reports.html import render

RULES = Rules(rule=(
    Rule(name="accuracy", probe="linear", metric="accuracy", at_least=0.9),
    Rule(name="turns", probe="equivariance", limit=0.01),
))
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes, its ancestors and its text; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "up": list(self.stack), "text": "", **{k: v or "" for k, v in attrs}}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1]["tag"] == tag, f"</{tag}> closes <{self.stack[-1]['tag']}>"
        self.stack.pop()

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def all(self, tag, within=None, **attributes):
        return [
            e for e in self.elements
            if e["tag"] == tag and (within is None or any(u is within for u in e["up"]))
            and all(v in e.get(k.rstrip("_"), "").split() for k, v in attributes.items())
        ]


@pytest.fixture(scope="module")
def text(artifacts):
    return render(artifacts, evaluate(artifacts, RULES), "Three encoders")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_is_one_small_closed_file(text, page):
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) < 1_000_000
    assert re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?(?!data:|#)[^\s"')]+""", text) == []
    assert [u for u in re.findall(r"https?://[^\s\"'<]+", text) if u != "http://www.w3.org/2000/svg"] == []
    assert page.all("link", rel="stylesheet") == []
    assert all("src" not in e for e in page.all("script"))
    assert "default-src 'none'" in page.all("meta")[2]["content"]


def test_the_script_is_small():
    assert len(html._read("report.js").encode()) < 6_000


def test_the_same_artifacts_give_the_same_page(artifacts, text):
    assert render(artifacts, evaluate(artifacts, RULES), "Three encoders") == text


def test_every_id_is_used_once_and_every_link_leads_somewhere(page):
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    targets = {e["href"][1:] for e in page.elements if e.get("href", "").startswith("#")}
    named = {i for e in page.elements for i in e.get("aria-labelledby", "").split()}
    assert targets | named <= set(ids)


def test_names_that_are_spelled_alike_have_anchors_of_their_own():
    alike = Rules(rule=tuple(Rule(name=n, probe="equivariance", limit=0.01) for n in ("a b", "a-b", "A  B!")))
    artifacts = [equivariance("x"), equivariance("X", transform="c8")]
    ids = [e["id"] for e in Page(render(artifacts, evaluate(artifacts, alike))).elements if "id" in e]
    assert len(ids) == len(set(ids))


def test_verdicts_come_first_and_failures_first_of_all(page):
    kinds = [e["class"].split()[1] for e in page.all("article")]
    assert kinds == ["fail", "fail", "inconclusive", "pass", "pass", "pass"]
    assert [s["id"] for s in page.all("section")][:2] == ["verdicts", "overview"]
    first = page.all("article")[0]
    for part in ("turns", "simclr-cnn", "total < 0.01 for every element of c4", "0.939 [0.892, 0.986] at 270°, n=360"):
        assert part in first["text"]


def test_every_figure_has_its_table_definition_provenance_and_link(page):
    plates = page.all("figure")
    assert len(plates) == 6
    for plate in plates:
        folds = {d["class"]: d["text"] for d in page.all("details", plate)}
        assert {"table", "defined", "origin"} <= folds.keys()
        assert "digits" in folds["origin"]
        assert page.all("table", page.all("details", plate, class_="table")[0])
        assert [a["href"] for a in page.all("a", plate, class_="anchor")] == [f"#{plate['id']}"]
        assert page.all("svg", plate) or page.all("img", plate)
        for run in RUNS:
            assert run in plate["text"]


def test_the_contents_name_every_section(page):
    nav = page.all("nav")[0]
    assert [a["href"][1:] for a in page.all("a", nav)] == [s["id"] for s in page.all("section")]


def test_metrics_show_interval_n_or_reason(page):
    overview = next(s for s in page.all("section") if s["id"] == "overview")
    said = " ".join(overview["text"].split())
    for part in ("0.948 [0.918, 0.973]", "n=360", "No interval: a rank has no valid bootstrap", "leads, intervals overlap"):
        assert part in said
    assert "difference" not in overview["text"]
    assert "percentile bootstrap over images, 95 %" in page.all("main")[0]["text"]


def test_two_runs_have_a_column_of_differences():
    overview = next(s for s in Page(render([linear(r) for r in RUNS[:2]])).all("section") if s["id"] == "overview")
    assert "difference" in overview["text"]
    assert "+0.0350" in overview["text"]


def test_notes_stand_out_and_name_their_run(page):
    (notes,) = page.all("aside")
    assert "Estimators disagree" in notes["text"]
    assert "simclr-cnn" in notes["text"]
    assert "hssl" not in notes["text"]


def test_one_run_has_no_comparison():
    page = Page(render(everything("alone")))
    assert page.all("section")[0]["id"] == "overview"
    assert "best" not in next(s for s in page.all("section") if s["id"] == "overview")["text"]
    assert page.all("article") == []


def test_points_know_their_rows(page):
    panels = [e for e in page.elements if "points-panel" in e.get("class", "")]
    assert len(panels) == 3
    data = json.loads(page.all("script", panels[0])[0]["text"])
    assert data["columns"] == ["label", "index"]
    assert data["rows"][123] == ["3", "123"]
    assert data["across"] * data["down"] >= 360
    # the three maps show the same images, which are embedded once
    assert len({p["class"] for p in panels}) == 1
    assert page.all("style")[0]["text"].count("--tile:url(") == 1


EVIL = "<script>alert(1)</script>"


@pytest.mark.parametrize("runs", [[EVIL], [EVIL, "b"]])
def test_names_are_text_everywhere(runs):
    evil = [
        dataclasses.replace(
            a, headline=EVIL, title=EVIL, notes=[EVIL], definition=EVIL, options=a.options | {"note": EVIL},
            provenance=a.provenance | {"command": EVIL},
            figures=[dataclasses.replace(f, title=EVIL, caption=EVIL) for f in a.figures],
            metrics=[dataclasses.replace(m, about=EVIL, unit=EVIL) for m in a.metrics],
        )
        for run in runs
        for a in [*everything(run)[:4], embed(run, label=lambda c: f"{EVIL}{c}</script><img src=x onerror=alert(1)>")]
    ]
    page = Page(render(evil, evaluate(evil, RULES), EVIL))
    scripts = [s for s in page.all("script") if s.get("type") != "application/json"]
    assert len(scripts) == 1
    assert "alert(" not in scripts[0]["text"]
    assert page.all("img") == []
    assert not any(k.startswith("on") for e in page.elements for k in e if k != "on")
    assert all(EVIL in e["text"] for e in page.all("h1"))
    data = json.loads(next(s for s in page.all("script") if s.get("type"))["text"])
    assert data["rows"][0][0].startswith(EVIL)


def test_long_tables_are_cut_and_say_so(page):
    plate = next(f for f in page.all("figure") if f["id"].startswith("embed"))
    assert len(page.all("tr", page.all("details", plate, class_="table")[0])) == 1 + 3 * 66
    shown = [r["text"] for r in page.all("tr", page.all("details", plate, class_="table")[0])]
    assert [sum(run in text for text in shown) for run in RUNS] == [66] * 3
    assert "The first 66 rows of each run, of 1080 in all; the rest is in map.csv" in plate["text"]


def noise(size, seed):
    state = [seed]

    def pixel(x, y):
        state[0] = (state[0] * 1103515245 + 12345) % 2**31
        return state[0] >> 16 & 255

    return png(size, size, pixel)


def test_stays_under_two_megabytes_by_leaving_out_the_largest_images():
    big = [dataclasses.replace(saliency(run), files={"maps.png": noise(700 + 20 * i, i)}) for i, run in enumerate("abcde")]
    text = render([*big, embed("a")])
    assert len(text.encode()) < html.LIMIT
    page = Page(text)
    assert 0 < len(page.all("img")) < 5
    assert page.all("p", class_="missing")[-1]["text"].startswith("The image maps.png was left out")
    assert "left out to keep this page under 2 MB" in page.all("footer")[0]["text"]
    assert "--tile:url(" in text


def test_a_missing_image_is_said():
    gone = dataclasses.replace(saliency("a"), files={})
    assert "is not in the artifact" in Page(render([gone])).all("p", class_="missing")[0]["text"]


def test_values_that_are_missing_are_dashes():
    columns = {"features": ["x", None], "accuracy": [None, 0.5], "low": [None, 0.4], "high": [None, 0.6]}
    artifact = dataclasses.replace(
        linear("a"), tables=[Table("accuracy", "T", columns)],
        metrics=[Metric("gone", None, None, None, "no labels"), Metric("there", 0.5, 3, Interval(0.4, 0.6, "b"))],
    )
    text = Page(render([artifact])).all("main")[0]["text"]
    assert "No interval: no labels" in text
    assert "None" not in text
    assert not re.search(r"\bnan\b", text.lower())


def test_other_ways_of_measuring_have_their_own_heading():
    page = Page(render([equivariance("a"), equivariance("a", transform="c8"), rank("a", projector=False)]))
    assert [e["text"].rstrip("#") for e in page.all("h3", class_="question")] == ["transform = c4", "transform = c8"]


def test_captions_that_differ_stand_under_their_own_panel():
    def titled(run):
        artifact = saliency(run)
        return dataclasses.replace(artifact, figures=[dataclasses.replace(artifact.figures[0], caption=f"Only {run}.")])

    page = Page(render([titled("a"), titled("b")]))
    panels = [e for e in page.elements if e.get("class") == "panel"]
    assert ["Only a." in p["text"] for p in panels] == [True, False]
    assert "Only" not in page.all("figcaption")[0]["text"]


def test_many_notes_are_folded_but_none_is_lost():
    page = Page(render([dataclasses.replace(linear("a"), notes=[f"Note {i}." for i in range(9)])]))
    (aside,) = page.all("aside")
    assert all(f"Note {i}." in aside["text"] for i in range(9))
    assert "5 more notes" in aside["text"]


def test_no_artifacts_are_one_line():
    with pytest.raises(GeomsslError, match="no artifacts"):
        render([])
