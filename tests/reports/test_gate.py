"""The gate: the truth table of equivariance, metrics against limits, matching, exit codes, bad rules."""

import math

import pytest
from report_samples import element_rows, equivariance, linear, rank, row

from geomssl.artifact import Artifact, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.reports.gate import Rule, Rules, Verdict, describe, evaluate, exit_code, read_rules


def rules(**rule):
    return Rules(rule=(Rule(**({"name": "r", "probe": "equivariance", "limit": 0.1} | rule)),))


def judge(*rows, **rule):
    (verdict,) = evaluate([equivariance("run", list(rows))], rules(**rule))
    return verdict


GOOD = row(element="good", total=0.05, low=0.04, high=0.06, low_any=0.03)
BAD = row(element="bad", total=0.5, low=0.45, high=0.55, low_any=0.4)
TOUCHING = row(element="touching", total=0.1, low=0.09, high=0.11, low_any=0.08)
BARE = row(element="bare", total=0.05, low=None, high=None, low_any=None)
# above the limit point by point, but not when all elements are looked at together
LUCKY = row(element="lucky", total=0.12, low=0.101, high=0.14, low_any=0.095)


class TestEquivariance:
    @pytest.mark.parametrize(
        ("rows", "verdict", "reason", "where"),
        [
            ([GOOD], "pass", "ok", "good"),
            ([GOOD, GOOD | {"element": "worse", "high": 0.0999}], "pass", "ok", "worse"),
            ([GOOD, BAD], "fail", "above-limit", "bad"),
            ([GOOD, TOUCHING], "inconclusive", "interval-straddles-limit", "touching"),
            ([GOOD, LUCKY], "inconclusive", "interval-straddles-limit", "lucky"),
            ([TOUCHING, BAD, GOOD], "fail", "above-limit", "bad"),
            ([GOOD, GOOD | {"element": "flat", "degenerate": True}], "inconclusive", "degenerate", "flat"),
            ([BAD | {"degenerate": True, "element": "flat"}], "inconclusive", "degenerate", "flat"),
            ([GOOD, GOOD | {"element": "45°", "exact": False}], "inconclusive", "inexact-pair", "45°"),
            ([GOOD, BAD | {"element": "45°", "exact": False}], "inconclusive", "inexact-pair", "45°"),
            ([BAD, GOOD | {"element": "45°", "exact": False}], "fail", "above-limit", "bad"),
            ([BAD, GOOD | {"element": "flat", "degenerate": True}], "fail", "above-limit", "bad"),
            ([GOOD, BARE], "inconclusive", "no-interval", "bare"),
            ([GOOD | {"high": math.nan}], "inconclusive", "no-interval", "good"),
            ([GOOD | {"high": 0.1}], "inconclusive", "interval-straddles-limit", "good"),
            ([BAD | {"low_any": 0.1}], "inconclusive", "interval-straddles-limit", "bad"),
        ],
    )
    def test_truth_table(self, rows, verdict, reason, where):
        found = judge(*rows)
        assert (found.verdict, found.reason, found.where) == (verdict, reason, where)

    def test_rows_in_any_order_give_the_same_verdict(self):
        rows = [GOOD, BAD, TOUCHING, LUCKY]
        assert len({(judge(*rows[i:], *rows[:i]).verdict, judge(*rows[i:], *rows[:i]).found) for i in range(4)}) == 1

    def test_the_figure_shown_is_the_one_that_decided(self):
        found = judge(GOOD, BAD)
        assert (found.found, found.interval.low, found.interval.high, found.n) == (0.5, 0.45, 0.55, 360)

    def test_excess_and_floor_decide_nothing(self):
        assert judge(GOOD | {"excess": 9.0, "floor": 9.0}).verdict == "pass"
        assert judge(BAD | {"excess": 0.0, "floor": 9.0}).verdict == "fail"

    def test_a_point_estimate_decides_nothing(self):
        assert judge(GOOD | {"high": 0.2}).verdict == "inconclusive"
        assert judge(BAD | {"low": 0.05, "low_any": 0.01}).verdict == "inconclusive"

    def test_chance_and_the_size_of_the_action_stand_beside_it(self):
        why = " ".join(judge(GOOD | {"action_size": 1.2}).why)
        assert "1.41 (chance)" in why
        assert "1.20" in why
        assert "not trivial" in why

    def test_a_pass_that_an_invariant_network_would_get_says_so(self):
        assert "says little" in " ".join(judge(GOOD | {"action_size": 0.01}).why)
        assert "not trivial" not in " ".join(judge(GOOD | {"action_size": 0.01}).why)

    def test_a_trivial_action_is_called_invariance(self):
        assert "invariance" in " ".join(judge(GOOD | {"action_size": 0.0}).why)

    @pytest.mark.parametrize("tables", [[], [element_rows([])], [Table("elements", "", {"element": ["90°"], "total": [0.0]})]])
    def test_without_elements_there_is_no_pass(self, tables):
        bare = equivariance()
        empty = Artifact("equivariance", "", "", "", bare.metrics, tables, provenance=bare.provenance)
        (found,) = evaluate([empty], rules())
        assert (found.verdict, found.reason) == ("inconclusive", "no-elements")
        assert exit_code([found], "pass") == 2


def measured(value, low, high, better=None, n=100):
    metric = Metric("m", value, n, None if low is None else Interval(low, high, "bootstrap"), "none was taken", better=better)
    return Artifact("linear", "", "", "", [metric], provenance={"run": "a"})


class TestMetrics:
    @pytest.mark.parametrize(
        ("side", "low", "high", "verdict", "reason"),
        [
            ("limit", 0.1, 0.4, "pass", "ok"),
            ("limit", 0.6, 0.9, "fail", "above-limit"),
            ("limit", 0.4, 0.6, "inconclusive", "interval-straddles-limit"),
            ("at_least", 0.6, 0.9, "pass", "ok"),
            ("at_least", 0.5, 0.9, "pass", "ok"),
            ("at_least", 0.1, 0.4, "fail", "below-limit"),
            ("at_least", 0.4, 0.6, "inconclusive", "interval-straddles-limit"),
            ("limit", None, None, "inconclusive", "no-interval"),
            ("limit", math.nan, math.nan, "inconclusive", "no-interval"),
        ],
    )
    def test_interval_against_limit(self, side, low, high, verdict, reason):
        rule = {"limit": None} | {side: 0.5}
        (found,) = evaluate([measured(0.5, low, high)], rules(probe="linear", metric="m", **rule))
        assert (found.verdict, found.reason, found.n) == (verdict, reason, 100)

    def test_the_reason_for_no_interval_is_said(self):
        (found,) = evaluate([rank("a")], rules(probe="rank", metric="effective_rank_h", limit=None, at_least=10))
        assert "no valid bootstrap" in found.why[0]

    @pytest.mark.parametrize(("better", "side"), [("higher", "limit"), ("lower", "at_least")])
    def test_the_wrong_side_is_refused(self, better, side):
        with pytest.raises(GeomsslError, match=f"better when {better}"):
            evaluate([measured(0.5, 0.4, 0.6, better)], rules(probe="linear", metric="m", **({"limit": None} | {side: 0.5})))

    def test_an_unknown_metric_names_the_nearest(self):
        with pytest.raises(GeomsslError, match="did you mean 'accuracy'"):
            evaluate([linear("a")], rules(probe="linear", metric="acuracy", limit=None, at_least=0.5))


class TestMatching:
    def test_every_run_is_judged(self):
        found = evaluate([equivariance("a", [GOOD]), equivariance("b", [BAD])], rules())
        assert [(v.run, v.verdict) for v in found] == [("a", "pass"), ("b", "fail")]

    def test_two_runs_of_one_name_are_both_judged(self):
        assert [v.verdict for v in evaluate([equivariance("a", [GOOD]), equivariance("a", [BAD])], rules())] == ["pass", "fail"]

    def test_the_same_artifact_twice_is_judged_once(self):
        assert len(evaluate([equivariance("a", [GOOD]), equivariance("a", [GOOD])], rules())) == 1

    def test_one_run(self):
        assert [v.run for v in evaluate([equivariance("a", [GOOD]), equivariance("b", [BAD])], rules(run="b"))] == ["b"]

    def test_options_must_agree(self):
        artifacts = [equivariance("a", [GOOD], transform="c4"), equivariance("a", [BAD], transform="c8")]
        assert [v.verdict for v in evaluate(artifacts, rules(options={"transform": "c8"}))] == ["fail"]
        assert [v.verdict for v in evaluate(artifacts, rules(options={"transform": "c4", "seed": 0.0}))] == ["pass"]

    @pytest.mark.parametrize("options", [{"transform": "d4"}, {"seed": 1}, {"seed": False}, {"transfrom": "c4"}])
    def test_no_match_is_never_a_pass(self, options):
        found = evaluate([equivariance("a", [GOOD])], rules(options=options))
        assert [(v.verdict, v.reason) for v in found] == [("inconclusive", "no-artifact")]
        assert [exit_code(found, how) for how in ("error", "fail", "pass")] == [2, 1, 2]

    def test_no_match_says_what_is_nearest(self):
        assert "did you mean 'transform'" in evaluate([equivariance()], rules(options={"transfrom": "c4"}))[0].why[0]
        assert "transform = 'c4'" in evaluate([equivariance()], rules(options={"transform": "d4"}))[0].why[0]
        assert "did you mean 'equivariance'" in evaluate([equivariance()], rules(probe="equivarance", metric="x"))[0].why[0]

    def test_lists_are_tuples_and_true_is_not_one(self):
        artifact = equivariance("a", [GOOD], sizes=(1, 2), flag=True)
        assert evaluate([artifact], rules(options={"sizes": [1, 2], "flag": True}))[0].verdict == "pass"
        assert evaluate([artifact], rules(options={"flag": 1}))[0].reason == "no-artifact"

    def test_the_last_state_is_judged(self):
        first, last = equivariance("a", [BAD], step=9), equivariance("a", [GOOD], step=10)
        assert [v.verdict for v in evaluate([last, first], rules())] == ["pass"]
        assert [v.verdict for v in evaluate([last, equivariance("a", [BAD])], rules())] == ["fail"]

    def test_nothing_to_judge_is_an_error(self):
        with pytest.raises(GeomsslError, match="no artifacts"):
            evaluate([], rules())


def verdict(outcome, reason="interval-straddles-limit"):
    return Verdict("r", "a", outcome, "x < 1", reason, ["Because."], "linear", "x", 1.0)


@pytest.mark.parametrize(
    ("outcomes", "codes"),
    [
        (["pass", "pass"], [0, 0, 0]),
        (["pass", "fail"], [1, 1, 1]),
        (["pass", "inconclusive"], [2, 1, 0]),
        (["fail", "inconclusive"], [1, 1, 1]),
        ([], [2, 2, 2]),
    ],
)
def test_exit_codes(outcomes, codes):
    assert [exit_code([verdict(o) for o in outcomes], how) for how in ("error", "fail", "pass")] == codes


@pytest.mark.parametrize("reason", ["degenerate", "no-artifact", "no-elements"])
def test_what_showed_nothing_never_passes(reason):
    assert exit_code([verdict("inconclusive", reason)], "pass") == 2


def test_describe_prints_expected_found_and_interval():
    text = describe(judge(GOOD, BAD))
    assert text.splitlines()[0].startswith("FAIL")
    for part in ("total < 0.1 for every element of c4", "0.500 [0.450, 0.550] at bad, n=360", "lower bound"):
        assert part in text
    assert "nothing to judge" in describe(evaluate([equivariance()], rules(run="elsewhere"))[0])


RULE = '[[rule]]\nname = "turns"\nprobe = "equivariance"\nlimit = 0.01\n'


class TestFile:
    def read(self, tmp_path, text):
        path = tmp_path / "gate.toml"
        path.write_text(text)
        return read_rules(path)

    def test_a_rule_is_read(self, tmp_path):
        found = self.read(tmp_path, RULE + '[rule.options]\ntransform = "c4"\n')
        assert found.rule[0] == Rule(name="turns", probe="equivariance", limit=0.01, options={"transform": "c4"})

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "has no rule"),
            ("rule = []", "has no rule"),
            (RULE.replace("limit", "limt"), "did you mean 'limit'"),
            (RULE.replace("rule]]", "rules]]"), "did you mean 'rule'"),
            (RULE + "at_least = 0.5\n", "both limit and at_least"),
            (RULE.replace("limit = 0.01", ""), "neither limit nor at_least"),
            (RULE.replace("0.01", "1.5"), "between 0 and √2"),
            (RULE.replace("0.01", "0"), "between 0 and √2"),
            (RULE.replace("0.01", "nan"), "limit"),
            (RULE.replace("0.01", "'small'"), "'turns'|turns.*limit"),
            (RULE.replace("limit", "at_least"), "between 0 and √2"),
            (RULE.replace("equivariance", "linear"), "names no metric"),
            (RULE.replace("equivariance", "equivarance"), "unknown probe equivarance; .* mean 'equivariance'"),
            (RULE.replace("[[rule]]", "[rule]"), "double brackets"),
            (RULE + 'metric = "excess"\n', "describe resampling"),
            (RULE + RULE, "two rules called 'turns'"),
            (RULE.replace('name = "turns"\n', ""), "name = nothing"),
            (RULE + "[more]\n", "unknown key 'more'"),
            ("[[rule]\n", "broken"),
        ],
    )
    def test_bad_rules_are_one_line(self, tmp_path, text, said):
        with pytest.raises(GeomsslError, match=said) as caught:
            self.read(tmp_path, text)
        assert "\n" not in str(caught.value)

    def test_no_file(self, tmp_path):
        (tmp_path / "gate.toml").write_text(RULE)
        with pytest.raises(GeomsslError, match=r"did you mean 'gate\.toml'"):
            read_rules(tmp_path / "gates.toml")
