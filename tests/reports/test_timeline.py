"""Over training: which metrics are drawn against the step, and what of a course the report shows in full."""

from __future__ import annotations

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.reports import compare, timeline
from geomssl.reports.html import render


def at(step: int | None, run: str = "run", recipe: str = "aaa", tau: float = 1.0, **metrics: float | None) -> Artifact:
    return Artifact(
        "rank", "Rank", f"looked at {step}", "a definition",
        [
            Metric(name, value, 10, Interval(value - 1, value + 1, "m") if value is not None else None, "r",
                   unit="dimensions" if name.startswith("rank") else "")
            for name, value in metrics.items()
        ],
        tables=[Table("curve", "Curve", {"x": [1, 2], "y": [1.0, float(step or 0)]})],
        figures=[Figure("curve", "line", "The curve", table="curve", x="x", y="y")],
        options={"tau": tau, "n": None}, step=step,
        provenance={"run": run, "recipe_sha256": recipe, "epoch": None if step is None else step // 10}
        if step is not None else {"run": run, "checkpoint_sha256": "fff"},
    )


def test_every_metric_has_a_row_for_every_step_in_order() -> None:
    (course,) = timeline.courses([at(20, rank_h=3.0, share=0.5), at(0, rank_h=1.0, share=0.5), at(10, rank_h=2.0, share=None)])
    columns = course.table("course").columns
    assert columns["metric"] == ["rank_h"] * 3 + ["share"] * 3
    assert columns["step"] == [0, 10, 20] * 2
    assert columns["epoch"] == [0, 1, 2] * 2
    assert columns["value"] == [1.0, 2.0, 3.0, 0.5, None, 0.5]
    assert columns["low"] == [0.0, 1.0, 2.0, -0.5, None, -0.5]
    assert columns["n"] == [10] * 6
    assert "At 3 steps, n = 10; step 0" in course.figures[0].caption
    assert course.headline == "rank: rank h goes from 1.00 at step 0 to 3.00 at step 20."
    # share never moves: a line that says nothing is not drawn
    assert [f.y_label for f in course.figures] == ["dimensions"]
    assert set(course.table(course.figures[0].table).columns["metric"]) == {"rank_h"}
    assert course.step is None


def test_a_single_moment_is_no_course() -> None:
    assert timeline.courses([at(None, rank_h=1.0), at(5, rank_h=2.0)]) == []
    assert timeline.courses([at(0, tau=1.0, rank_h=1.0), at(5, tau=2.0, rank_h=2.0)]) == []


def test_runs_and_options_are_kept_apart() -> None:
    found = timeline.courses([
        at(s, run=run, tau=tau, rank_h=float(s)) for s in (0, 9) for run in ("a", "b") for tau in (1.0, 2.0)
    ])
    assert [(c.run, c.options) for c in found] == [
        (run, {"probe": "rank", "tau": tau}) for run in ("a", "b") for tau in (1.0, 2.0)
    ]
    alone = timeline.courses([at(s, rank_h=float(s)) for s in (0, 9)])
    assert alone[0].options == {"probe": "rank"}
    named = timeline.courses([at(s, recipe=recipe, rank_h=float(s)) for s in (0, 9) for recipe in ("aaa", "bbb")])
    assert compare.labels(named) == ["run (aaa)", "run (bbb)"]


def test_first_middle_and_last_are_shown_in_full() -> None:
    steps = [at(s, rank_h=1.0) for s in range(7)]
    final = at(None, rank_h=2.0)
    assert [a.step for a in timeline.shown([final, *steps])] == [None, 0, 3, 6]
    assert [a.step for a in timeline.shown(steps[:2])] == [0, 1]
    assert [a.step for a in timeline.shown(steps[:3])] == [0, 1, 2]
    assert compare.labels(timeline.shown([final, *steps])) == ["run", "run @0", "run @3", "run @6"]


def test_many_metrics_fill_the_table_and_not_the_figure() -> None:
    many = [at(s, **{f"rank_{i}": float(s + i) for i in range(12)}) for s in (0, 4)]
    (course,) = timeline.courses(many)
    (figure,) = course.figures
    assert len(set(course.table(figure.table).columns["metric"])) == timeline.LINES
    assert len(set(course.table("course").columns["metric"])) == 12
    assert "4 further metrics stand in" in figure.caption
    most = timeline.courses([at(s, **{f"rank_{i}": float(s + i) for i in range(timeline.LINES + 1)}) for s in (0, 4)])
    assert "1 further metric stands in" in most[0].figures[0].caption


def test_the_page_has_the_section_and_leaves_the_middle_steps_to_it() -> None:
    page = render([at(s, run=run, rank_h=float(s)) for s in (0, 10, 20, 30) for run in ("a", "b")])
    assert page.count("<h2") == 3
    assert "Over training" in page
    assert page.index("Over training") < page.index('id="rank"')
    assert "a @10" in page
    assert "a @20" not in page
    assert "geomssl report a b -o report.html" in page
    plain = render([at(None, rank_h=1.0)])
    assert "Over training" not in plain


def test_runs_draw_the_same_metrics_and_the_papers_come_first() -> None:
    """One panel a metric with a line for each run, also for a metric that moves in one of the runs alone."""
    def run(name: str, falls: float) -> list[Artifact]:
        others = {f"rank_{i}": 5.0 + i for i in range(6)}
        return [
            at(s, run=name, **{k: v + s for k, v in others.items()}, rank_projector_layer_0=64 - falls * s, rank_still=1.0)
            for s in (0, 9)
        ]

    courses = timeline.courses([*run("a", 0.0), *run("b", 2.0)])
    drawn = [list(dict.fromkeys(c.table(c.figures[0].table).columns["metric"])) for c in courses]
    assert drawn == [["rank_projector_layer_0", "rank_0", "rank_1", "rank_2"]] * 2
    (question,) = compare.questions(courses)[1]
    (plate,) = compare.plates(question, ["a", "b"])
    assert [panel.title for panel in plate.panels] == drawn[0]
    first = plate.panels[0].table.columns
    assert list(zip(first["run"], first["value"], strict=True)) == [("a", 64.0), ("a", 64.0), ("b", 64.0), ("b", 46.0)]


def test_panels_of_different_metrics_share_the_steps_and_not_the_height() -> None:
    runs = [at(s, run=run, rank_a=1000.0 + s, rank_b=1.0 + s) for run in ("a", "b") for s in (0, 9)]
    (question,) = compare.questions(timeline.courses(runs))[1]
    (plate,) = compare.plates(question, ["a", "b"])
    assert [(panel.limits.x is None, panel.limits.y) for panel in plate.panels] == [(False, None)] * 2
