"""The gate against a baseline: compared only where both were measured alike, bounded by the two intervals."""

import dataclasses

import pytest
from report_samples import equivariance, linear, rank, row

from geomssl.artifact import Artifact, Interval, Metric
from geomssl.errors import GeomsslError
from geomssl.reports.gate import Rule, Rules, evaluate, exit_code


def rules(**rule):
    return Rules(rule=(Rule(**({"name": "r", "probe": "equivariance"} | rule)),))


def measured(run, rows, **changes):
    """An artifact as the probe writes it today, with the fingerprint of its images."""
    options = {key: value for key, value in changes.items() if key not in ("provenance", "n_images")}
    found = equivariance(run, rows, n=changes.get("n_images", 360), **options)
    facts = {"images_sha256": "ab12", "split": "test", "action": "regular"} | changes.get("provenance", {})
    return dataclasses.replace(found, provenance=found.provenance | facts)


NOW = row(element="90°", total=0.50, low=0.49, high=0.51, low_any=0.48)
THEN = row(element="90°", total=0.48, low=0.47, high=0.49, low_any=0.46)


def judge(now, then, **rule):
    (found,) = evaluate([measured("new", [now])], rules(**rule), [measured("old", [then])])
    return found


class TestIncrease:
    # The increase lies within [.49 - .49, .51 - .47] = [0, .04]; for all elements at once it is over .48 - .50 = -.02.
    @pytest.mark.parametrize(
        ("demand", "verdict", "reason"),
        [
            ({"max_increase": 0.041}, "pass", "ok"),
            ({"max_increase": 0.039}, "inconclusive", "interval-straddles-limit"),
            ({"max_increase": 0.001}, "inconclusive", "interval-straddles-limit"),
            ({"max_ratio": 1.09}, "pass", "ok"),
            ({"max_ratio": 1.08}, "inconclusive", "interval-straddles-limit"),
        ],
    )
    def test_is_bounded_by_both_intervals(self, demand, verdict, reason):
        found = judge(NOW, THEN, **demand)
        assert (found.verdict, found.reason, found.baseline) == (verdict, reason, "old")

    def test_the_figure_is_the_increase_with_its_bounds(self):
        found = judge(NOW, THEN, max_increase=0.041)
        assert found.found == pytest.approx(0.02)
        assert (found.interval.low, found.interval.high) == (pytest.approx(0.0), pytest.approx(0.04))
        assert "not paired" in " ".join(found.why)
        found = judge(NOW, THEN, max_ratio=1.09)
        assert (found.interval.low, found.interval.high) == (pytest.approx(1.0), pytest.approx(0.51 / 0.47))

    def test_a_failure_needs_bounds_of_all_elements_at_once_on_both_sides(self):
        worse = NOW | {"total": 0.60, "low": 0.59, "high": 0.61, "low_any": 0.58}
        # .58 - max(.49, 2 * .48 - .46) = .08
        assert judge(worse, THEN, max_increase=0.079).verdict == "fail"
        assert judge(worse, THEN, max_increase=0.079).reason == "above-baseline"
        assert judge(worse, THEN, max_increase=0.081).verdict == "inconclusive"
        assert judge(worse, THEN | {"low_any": 0.40}, max_increase=0.079).verdict == "inconclusive"

    def test_an_exact_baseline_has_no_ratio(self):
        exact = row(element="90°", total=0.0, low=0.0, high=0.0, low_any=0.0)
        assert judge(NOW, exact, max_ratio=2).verdict == "fail"
        assert judge(exact, exact, max_ratio=2).verdict == "pass"

    def test_one_element_decides(self):
        now = [NOW, NOW | {"element": "180°", "total": 0.9, "low": 0.88, "high": 0.92, "low_any": 0.87}]
        then = [THEN | {"element": "180°"}, THEN]
        (found,) = evaluate([measured("new", now)], rules(max_increase=0.1), [measured("old", then)])
        assert (found.verdict, found.where) == ("fail", "180°")
        (found,) = evaluate([measured("new", now)], rules(max_increase=0.1), [measured("old", now)])
        assert found.verdict == "pass"

    def test_limit_and_increase_are_both_demanded(self):
        assert judge(NOW, THEN, max_increase=0.1, limit=1.0).verdict == "pass"
        assert judge(NOW, THEN, max_increase=0.1, limit=0.4).reason == "above-limit"
        assert judge(NOW, THEN, max_increase=0.1, limit=0.5).verdict == "inconclusive"
        found = judge(NOW | {"low_any": 0.7, "low": 0.7, "high": 0.8, "total": 0.75}, THEN, max_increase=0.1, limit=1.0)
        assert (found.verdict, found.reason) == ("fail", "above-baseline")
        assert found.expected == "total < 1 and total < baseline + 0.1 for every element of c4"

    def test_degenerate_features_are_never_compared(self):
        for pair in ((NOW | {"degenerate": True}, THEN), (NOW, THEN | {"degenerate": True})):
            found = judge(*pair, max_increase=1.0)
            assert found.verdict == "inconclusive"
            assert exit_code([found], "pass") == 2

    def test_bounds_of_the_defect_are_compared_not_the_total(self):
        wide = NOW | {"exact": False, "resampling": 0.1, "bound_low": 0.39, "bound_high": 0.61, "bound_low_any": 0.38}
        narrow = THEN | {"resampling": 0.0, "bound_low": 0.47, "bound_high": 0.49, "bound_low_any": 0.46}
        assert judge(wide, narrow, max_increase=0.139).verdict == "inconclusive"
        assert judge(wide, narrow, max_increase=0.141).verdict == "pass"


class TestMeasuredAlike:
    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"transform": "c8"}, "transform = 'c4' here, 'c8' in the baseline"),
            ({"seed": 1}, "seed = 0 here, 1 in the baseline"),
            ({"layer": "h"}, "layer = 'fibres' here, 'h' in the baseline"),
            ({"images": "fields"}, "images is stated by the baseline only"),
            ({"n_images": 100}, "n = 360 here, 100 in the baseline"),
            ({"provenance": {"images_sha256": "cd34"}}, "images_sha256 = 'ab12' here, 'cd34' in the baseline"),
            ({"provenance": {"dtype": "float64"}}, "dtype = 'float32' here, 'float64' in the baseline"),
            ({"provenance": {"action": "spatial"}}, "action = 'regular' here, 'spatial' in the baseline"),
            ({"provenance": {"split": "val"}}, "split = 'test' here, 'val' in the baseline"),
        ],
    )
    def test_else_the_field_is_named(self, changes, field):
        (found,) = evaluate([measured("new", [NOW])], rules(max_increase=1.0), [measured("old", [THEN], **changes)])
        assert (found.verdict, found.reason) == ("inconclusive", "baseline-differs")
        assert field in found.why[0]
        assert [exit_code([found], how) for how in ("error", "fail", "pass")] == [2, 1, 2]

    def test_how_sure_one_is_may_differ(self):
        then = measured("old", [THEN], level=0.99, resamples=4000)
        now = measured("new", [NOW], level=0.95, resamples=2000)
        assert evaluate([now], rules(max_increase=0.1), [then])[0].verdict == "pass"

    def test_all_images_by_number_or_by_default_are_the_same_images(self):
        then = measured("old", [THEN])
        then = dataclasses.replace(then, options=then.options | {"n": 360})
        assert evaluate([measured("new", [NOW])], rules(max_increase=0.1), [then])[0].verdict == "pass"

    def test_without_a_fingerprint_nothing_is_compared(self):
        bare = {"provenance": {"images_sha256": None}}
        (found,) = evaluate([measured("a", [NOW], **bare)], rules(max_increase=1.0), [measured("b", [THEN], **bare)])
        assert "fingerprint" in found.why[0]
        rendered = bare | {"images": "fields"}
        (found,) = evaluate([measured("a", [NOW], **rendered)], rules(max_increase=1.0), [measured("b", [THEN], **rendered)])
        assert found.verdict == "pass"

    def test_other_elements_are_named(self):
        (found,) = evaluate(
            [measured("new", [NOW])], rules(max_increase=1.0), [measured("old", [THEN | {"element": "45°"}])]
        )
        assert "elements: 90°" in found.why[0]

    def test_of_several_the_one_measured_alike_is_taken(self):
        baselines = [measured("old", [THEN], seed=1), measured("old", [THEN]), measured("new", [NOW])]
        assert evaluate([measured("new", [NOW])], rules(max_increase=1.0), baselines)[0].baseline == "new"
        assert evaluate([measured("new", [NOW])], rules(max_increase=1.0), baselines[:2])[0].verdict == "pass"


class TestMistakes:
    def test_no_baseline(self):
        with pytest.raises(GeomsslError, match=r"'r' has max_ratio and no baseline; expected --baseline") as caught:
            evaluate([measured("new", [NOW])], rules(max_ratio=2))
        assert caught.value.reason == "no-baseline"

    def test_a_baseline_of_another_probe(self):
        with pytest.raises(GeomsslError, match="a baseline of rank for rule 'r'; expected an artifact of equivariance"):
            evaluate([measured("new", [NOW])], rules(max_increase=0.1), [rank("old")])

    def test_a_baseline_that_no_rule_uses(self):
        with pytest.raises(GeomsslError, match="no rule that compares"):
            evaluate([measured("new", [NOW])], rules(limit=0.1), [measured("old", [THEN])])

    @pytest.mark.parametrize(
        ("rule", "said"),
        [
            ({}, "neither limit nor at_least, max_increase or max_ratio"),
            ({"max_increase": 0}, "greater than 0"),
            ({"max_ratio": 1}, "greater than 1"),
            ({"max_increase": 1.5}, "a max_increase between 0 and √2"),
            ({"probe": "linear", "metric": "m", "at_least": 0.9, "max_increase": 0.1}, "at_least beside max_increase"),
            ({"max_incrase": 0.1}, "max_incrase"),
        ],
    )
    def test_rules(self, rule, said):
        with pytest.raises((GeomsslError, ValueError), match=said):
            rules(**rule)

    def test_a_figure_that_is_better_when_higher(self):
        with pytest.raises(GeomsslError, match="accuracy is better when higher"):
            evaluate([linear("a")], rules(probe="linear", metric="accuracy", max_increase=0.1), [linear("b")])


def figure(run, value, low, high, **provenance):
    metric = Metric("m", value, 100, None if low is None else Interval(low, high, "bootstrap"), "none was taken")
    facts = {"run": run, "images_sha256": "ab12"} | provenance
    return Artifact("bound", "", "", "", [metric], provenance=facts, options={"seed": 0})


class TestOtherFigures:
    def test_are_compared_by_their_intervals(self):
        now, then = figure("a", 5.0, 4.9, 5.1), figure("b", 4.0, 3.9, 4.1)
        for limit, verdict in ((1.21, "pass"), (1.0, "inconclusive"), (0.79, "fail")):
            (found,) = evaluate([now], rules(probe="bound", metric="m", max_increase=limit), [then])
            assert found.verdict == verdict
            assert found.interval.low == pytest.approx(0.8)

    def test_a_baseline_without_an_interval_is_said(self):
        (found,) = evaluate(
            [figure("a", 5.0, 4.9, 5.1)], rules(probe="bound", metric="m", max_increase=1), [figure("b", 4.0, None, None)]
        )
        assert "m has no interval in the baseline" in found.why[0]
