"""Runs side by side: what answers the same question, which figure is best, and what is laid over what."""

import dataclasses

import pytest
from report_samples import embed, equivariance, everything, linear, rank, saliency

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.reports import compare


def one(run, value, low=None, high=None, better="higher", n=10, **more):
    interval = None if low is None else Interval(low, high, "bootstrap")
    metric = Metric("m", value, n, interval, "none", better=better)
    return Artifact("p", "", "", "", [metric], provenance={"run": run}, **more)


def row(*artifacts):
    runs, (question,) = compare.questions(list(artifacts))
    return compare.rows(question, runs)[0]


class TestRows:
    def test_the_best_is_marked_where_its_interval_is_clear(self):
        found = row(one("a", 0.9, 0.85, 0.95), one("b", 0.5, 0.4, 0.6), one("c", 0.6, 0.5, 0.7))
        assert [c.mark for c in found.cells] == ["best", "", ""]

    def test_lower_may_be_better(self):
        found = row(one("a", 0.9, 0.85, 0.95, "lower"), one("b", 0.5, 0.4, 0.6, "lower"))
        assert [c.mark for c in found.cells] == ["", "best"]

    def test_an_overlap_is_only_a_lead(self):
        found = row(one("a", 0.9, 0.7, 0.95), one("b", 0.8, 0.6, 0.9))
        assert [c.mark for c in found.cells] == ["leads, intervals overlap", ""]

    def test_without_intervals_nothing_is_best(self):
        assert [c.mark for c in row(one("a", 0.9), one("b", 0.8)).cells] == ["", ""]
        assert [c.mark for c in row(one("a", 0.9, 0.8, 1.0), one("b", 0.5)).cells] == ["", ""]

    @pytest.mark.parametrize("artifacts", [
        [one("a", 0.9, 0.8, 1.0)],
        [one("a", 0.9, 0.8, 1.0), one("b", 0.9, 0.8, 1.0)],
        [one("a", 0.9, 0.8, 1.0, None), one("b", 0.5, 0.4, 0.6, None)],
        [one("a", 0.9, 0.8, 1.0), one("b", None)],
        [one("a", 0.9, 0.8, 1.0), one("b", 0.9, 0.8, 1.0), one("c", 0.1, 0.0, 0.2)],
    ])
    def test_where_nothing_is_best_nothing_is_marked(self, artifacts):
        assert all(not c.mark for c in row(*artifacts).cells)

    def test_two_runs_have_a_difference_and_three_have_none(self):
        assert row(one("a", 0.5), one("b", 0.75)).difference == "+0.250"
        assert row(one("a", 0.75), one("b", 0.5)).difference == "-0.250"
        assert row(one("a", 0.5), one("b", 0.5)).difference == "0"
        assert row(one("a", 0.5), one("b", None)).difference == ""
        assert row(one("a", 0.5), one("b", 0.6), one("c", 0.7)).difference == ""

    def test_what_all_runs_share_is_said_once(self):
        assert (row(one("a", 0.5), one("b", 0.6)).n, row(one("a", 0.5), one("b", 0.6)).reason) == (10, "none")
        mixed = row(one("a", 0.5, 0.4, 0.6), one("b", 0.6, n=20))
        assert (mixed.n, mixed.reason) == (None, None)

    def test_a_run_without_the_metric_has_an_empty_cell(self):
        bare = dataclasses.replace(one("b", 0.5), metrics=[])
        assert [c.metric is None for c in row(one("a", 0.5), bare).cells] == [False, True]


class TestQuestions:
    def test_other_options_are_another_question(self):
        _, found = compare.questions([equivariance("a"), equivariance("b"), equivariance("a", transform="c8")])
        assert [(q.label, list(q.answers)) for q in found] == [("transform = c4", ["a", "b"]), ("transform = c8", ["a"])]

    def test_runs_of_one_name_are_told_apart(self):
        a, b = linear("run"), linear("run")
        b = dataclasses.replace(b, provenance=b.provenance | {"checkpoint": "ffffffff"})
        assert compare.labels([a, b]) == ["run (3f9a0c1)", "run (fffffff)"]
        assert compare.labels([a, rank("run")]) == ["run", "run"]

    def test_a_snapshot_is_named_by_its_step(self):
        assert compare.labels([equivariance("a"), equivariance("a", step=5)]) == ["a", "a @5"]

    def test_two_answers_of_one_run_are_both_shown(self):
        runs, (question,) = compare.questions([one("a", 0.5), one("a", 0.6)])
        assert runs == ["a", "a (2)"]
        assert [a.metrics[0].value for a in question.answers.values()] == [0.5, 0.6]

    def test_nothing_is_lost(self):
        artifacts = [a for run in ("a", "b") for a in everything(run)]
        _, found = compare.questions(artifacts)
        assert sorted(id(a) for q in found for a in q.answers.values()) == sorted(map(id, artifacts))


def plate(*artifacts):
    runs, (question,) = compare.questions(list(artifacts))
    return compare.plates(question, runs)[0]


class TestPlates:
    def test_one_run_is_drawn_as_it_is(self):
        artifact = rank("a")
        found = plate(artifact)
        assert [(p.figure, p.table) for p in found.panels] == [(artifact.figures[0], artifact.tables[0])]

    def test_lines_without_series_are_laid_over_each_other(self):
        (panel,) = plate(equivariance("a"), equivariance("b")).panels
        assert panel.figure.series == "run"
        assert panel.table.columns["run"] == ["a"] * 4 + ["b"] * 4
        alone = [equivariance(run).tables[0].columns["total"] for run in "ab"]
        assert panel.table.columns["total"] == alone[0] + alone[1]

    def test_series_become_panels_that_share_their_axes(self):
        found = plate(rank("a"), rank("b"))
        assert [p.title for p in found.panels] == ["encoder h", "projector z"]
        assert found.panels[0].limits == found.panels[1].limits is not None
        assert all(set(p.table.columns["object"]) == {p.title} for p in found.panels)
        assert sum(len(p.table) for p in found.panels) == len(found.table) == 2 * 98

    def test_many_series_become_a_panel_a_run(self):
        def many(run):
            table = Table("t", "", {"x": [0, 1] * 6, "y": list(range(12)), "s": [i // 2 for i in range(12)]})
            return one(run, 0.5, tables=[table], figures=[Figure("f", "line", "F", table="t", x="x", y="y", series="s")])

        found = plate(many("a"), many("b")).panels
        assert [p.title for p in found] == ["a", "b"]
        assert {p.order for p in found} == {("0", "1", "2", "3", "4", "5")}

    def test_maps_stand_side_by_side_with_their_own_rows(self):
        found = plate(embed("a"), embed("b"))
        assert [p.title for p in found.panels] == ["a", "b"]
        assert [len(p.table) for p in found.panels] == [360, 360]

    def test_points_that_are_measured_share_their_axes_and_places_on_a_map_do_not(self):
        def points(run, most, sprite=None):
            table = Table("t", "", {"true": [0.0, 1.0], "predicted": [0.0, most]})
            figure = Figure("f", "scatter", "F", table="t", x="true", y="predicted", sprite=sprite)
            return one(run, 0.5, tables=[table], figures=[figure])

        first, second = plate(points("a", 1.0), points("b", 9.0)).panels
        assert first.limits == second.limits
        assert first.limits.y[1] > 9
        assert {p.limits for p in plate(points("a", 1.0, "s.png"), points("b", 9.0, "s.png")).panels} == {None}
        assert plate(points("a", 1.0)).panels[0].limits is None

    def test_an_image_without_a_table_has_the_first(self):
        bare = dataclasses.replace(saliency("a"), figures=[Figure("maps", "image", "M", file="maps.png")])
        assert plate(bare).table is bare.tables[0]
        _, (question,) = compare.questions([bare])
        assert compare.spare_tables(question) == []

    def test_a_column_called_run_is_kept(self):
        def own(run):
            table = Table("t", "", {"x": [0, 1], "y": [1, 2], "run": ["p", "q"]})
            return one(run, 0.5, tables=[table], figures=[Figure("f", "line", "F", table="t", x="x", y="y")])

        found = plate(own("a"), own("b"))
        assert found.panels[0].figure.series == "run_"
        assert found.table.columns["run"] == ["p", "q"] * 2
        assert found.table.columns["run_"] == ["a", "a", "b", "b"]

    def test_a_table_that_no_figure_draws_is_shown(self):
        extra = Table("classes", "Classes", {"class": ["0"]})
        artifacts = [dataclasses.replace(linear(r), tables=[*linear(r).tables, extra]) for r in ("a", "b")]
        _, (question,) = compare.questions(artifacts)
        ((table, sizes),) = compare.spare_tables(question)
        assert table.columns == {"run": ["a", "b"], "class": ["0", "0"]}
        assert sizes == [1, 1]
