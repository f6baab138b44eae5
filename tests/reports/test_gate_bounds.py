"""The gate on elements that are resampled: bounds of the defect decide, and old tables stay inconclusive."""

import pytest
from report_samples import equivariance, row

from geomssl.reports.gate import Rule, Rules, evaluate

RULES = Rules(rule=(Rule(name="r", probe="equivariance", limit=0.3),))


def resampled(**values):
    given = {"element": "15°", "total": 0.2, "low": 0.19, "high": 0.21, "low_any": 0.18, "exact": False}
    return row(**(given | values))


def bounded(r, **values):
    """A resampled element with bounds total ± r."""
    made = resampled(**values)
    return made | {
        "resampling": r, "bound_low": made["low"] - r, "bound_high": made["high"] + r, "bound_low_any": made["low_any"] - r
    }


def exact(**values):
    made = row(element="90°", total=0.1, low=0.09, high=0.11, low_any=0.08) | values
    return made | {"resampling": 0.0, **{f"bound_{key}": made[key] for key in ("low", "high", "low_any")}}


def judge(*rows):
    (found,) = evaluate([equivariance("run", list(rows))], RULES)
    return found


UNKNOWN = dict.fromkeys(("resampling", "bound_low", "bound_high", "bound_low_any"))


@pytest.mark.parametrize(
    ("rows", "verdict", "reason"),
    [
        ([bounded(0.08)], "pass", "ok"),
        ([bounded(0.1)], "inconclusive", "resampling-straddles-limit"),
        ([bounded(0.08, high=0.31)], "inconclusive", "interval-straddles-limit"),
        ([bounded(0.1, total=0.6, low=0.55, high=0.65, low_any=0.5)], "fail", "above-limit"),
        ([bounded(0.25, total=0.6, low=0.55, high=0.65, low_any=0.5)], "inconclusive", "resampling-straddles-limit"),
        ([bounded(0.02, degenerate=True)], "inconclusive", "degenerate"),
        ([exact(), bounded(0.05)], "pass", "ok"),
        ([exact(total=0.5, low=0.45, high=0.55, low_any=0.4), bounded(0.2)], "fail", "above-limit"),
        ([bounded(0.05), bounded(0.0) | UNKNOWN], "inconclusive", "inexact-pair"),
    ],
)
def test_truth_table(rows, verdict, reason):
    found = judge(*rows)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_what_straddles_is_said_and_what_to_do():
    why = " ".join(judge(bounded(0.1)).why)
    assert "the resampling distance 0.100" in why
    assert 'images = "fields"' in why


def test_the_interval_shown_is_that_of_the_defect():
    found = judge(bounded(0.08))
    assert (found.found, found.interval.low, found.interval.high) == (0.2, pytest.approx(0.11), pytest.approx(0.29))
    assert "resampling" in found.interval.method


def test_without_bounds_a_resampled_element_is_not_judged():
    assert judge(resampled()).reason == "inexact-pair"
    assert judge(resampled(total=0.9, low=0.9, high=0.9, low_any=0.9)).reason == "inexact-pair"


def test_several_layers_are_told_apart():
    layers = [exact() | {"layer": "layer1"}, exact(total=0.5, low=0.45, high=0.55, low_any=0.4) | {"layer": "layer2"}]
    assert judge(*layers).where == "90° of layer2"
    assert judge(layers[1]).where == "90°"
