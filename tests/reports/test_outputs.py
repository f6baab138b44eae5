"""JUnit XML, Markdown and numbers: what machines and people read of a verdict."""

import dataclasses
import json
import math
from xml.etree import ElementTree as ET

import pytest
from report_samples import RUNS, equivariance, linear

from geomssl.artifact import Interval, Metric
from geomssl.errors import GeomsslError
from geomssl.reports import markdown
from geomssl.reports.gate import Rule, Rules, evaluate, exit_code, records
from geomssl.reports.junit import MESSAGE, TEXT, junit
from geomssl.reports.markdown import ANNOTATIONS, append_step_summary, summary, workflow_commands
from geomssl.reports.numbers import bounds, figure, number

RULES = Rules(rule=(
    Rule(name="turns", probe="equivariance", limit=0.01),
    Rule(name="accuracy | <b>", probe="linear", metric="accuracy", at_least=0.9),
    Rule(name="missing", probe="rank", metric="x", limit=1),
))


@pytest.fixture(scope="module")
def verdicts():
    return evaluate([make(run) for run in RUNS for make in (equivariance, linear)], RULES)


class TestJUnit:
    def test_failures_and_errors_are_told_apart(self, verdicts):
        suite = ET.fromstring(junit(verdicts)).find("testsuite")
        assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("7", "2", "2")
        kinds = {"pass": [], "fail": ["failure"], "inconclusive": ["error"]}
        for case, verdict in zip(suite.iter("testcase"), verdicts, strict=True):
            assert [c.tag for c in case if c.tag in ("failure", "error")] == kinds[verdict.verdict]
            assert (case.get("name"), case.get("classname")) == (verdict.rule, f"{verdict.probe}.{verdict.run}")
            float(case.get("time"))

    def test_properties_are_the_numbers(self, verdicts):
        for case, verdict in zip(ET.fromstring(junit(verdicts)).iter("testcase"), verdicts, strict=True):
            found = {p.get("name"): p.get("value") for p in case.iter("property")}
            assert float(found["limit"]) == verdict.limit
            if verdict.interval:
                shown = (verdict.found, verdict.interval.low, verdict.interval.high, verdict.n)
                assert tuple(float(found[k]) for k in ("found", "low", "high", "n")) == shown

    def test_a_failure_says_expected_found_and_interval(self, verdicts):
        failure = next(ET.fromstring(junit(verdicts)).iter("failure"))
        assert failure.get("type") == "above-limit"
        for part in ("total < 0.01", "0.939 [0.892, 0.986]", "270°"):
            assert part in failure.get("message")
            assert part in failure.text

    def test_names_that_xml_cannot_hold(self, verdicts):
        odd = dataclasses.replace(verdicts[0], rule="a\x00\x1b[31m<&\"\ud800", run="\ufffe")
        assert next(ET.fromstring(junit([odd]).encode()).iter("testcase")).get("name") == 'a��[31m<&"�'


    def test_messages_and_texts_are_bounded(self, verdicts):
        long = dataclasses.replace(verdicts[0], rule="r" * 9999, expected="x" * 9999, why=["y" * 99_999])
        (case,) = ET.fromstring(junit([long])).iter("testcase")
        assert len(case.get("name")) == MESSAGE
        failure = next(case.iter("failure"))
        assert len(failure.get("message")) == MESSAGE
        assert len(failure.text) <= TEXT
        assert failure.text.endswith("…")

    def test_look_baseline_and_power_are_properties(self, verdicts):
        look = {"number": 2, "of": 3, "images": 64, "budget": 128, "level": 0.99, "asked": {"level": 0.95}}
        full = dataclasses.replace(
            verdicts[0], look=look, baseline="main", max_increase=0.1, power=[{"injected": "2L", "rate": 0.98}]
        )
        (case,) = ET.fromstring(junit([full])).iter("testcase")
        found = {p.get("name"): p.get("value") for p in case.iter("property")}
        shown = {"look": "2 of 3", "level": "0.99", "baseline": "main", "max_increase": "0.1", "power 2L": "0.98"}
        assert shown.items() <= found.items()


class TestJSON:
    def test_says_what_the_exit_code_says_and_holds_every_verdict(self, verdicts):
        for how in ("error", "fail", "pass"):
            found = json.loads(json.dumps(records(verdicts, how), allow_nan=False))
            assert found["schema"] == 1
            assert found["exit_code"] == exit_code(verdicts, how)
        assert found["counts"] == {"fail": 2, "inconclusive": 2, "pass": 3}
        assert [v["rule"] for v in found["verdicts"]] == [v.rule for v in verdicts]
        assert found["verdicts"][0]["interval"]["high"] == verdicts[0].interval.high

    def test_what_is_not_finite_is_null(self, verdicts):
        odd = dataclasses.replace(verdicts[0], found=math.nan, options={"a": (math.inf, "b")})
        found = json.loads(json.dumps(records([odd]), allow_nan=False))["verdicts"][0]
        assert found["found"] is None
        assert found["options"] == {"a": [None, "b"]}


class TestAnnotations:
    def test_failures_are_errors_and_come_first_and_passes_are_silent(self, verdicts):
        lines = workflow_commands(verdicts)
        assert [line.split(" ")[0] for line in lines] == ["::error"] * 2 + ["::warning"] * 2
        assert lines[0].startswith("::error title=geomssl gate%3A turns (simclr-cnn)::fail: expected total < 0.01")

    def test_there_are_at_most_ten_and_the_last_counts_the_rest(self, verdicts):
        failed = [v for v in verdicts if v.verdict == "fail"]
        assert len(workflow_commands(failed * 5)) == ANNOTATIONS == 10
        lines = workflow_commands(failed * 6)
        assert len(lines) == ANNOTATIONS
        assert lines[-1] == "::error title=geomssl gate::3 more rules did not pass: see the summary"
        assert workflow_commands([v for v in verdicts if v.verdict == "pass"]) == []

    def test_a_name_cannot_end_the_command_or_start_another(self, verdicts):
        odd = dataclasses.replace(verdicts[0], rule="a::b,c\n::error::x %", expected="1\r\n::warning::y")
        (line,) = workflow_commands([odd])
        assert "\n" not in line
        assert "\r" not in line
        title = line.split("::")[1]
        assert title == "error title=geomssl gate%3A a%3A%3Ab%2Cc%0A%3A%3Aerror%3A%3Ax %25 (simclr-cnn)"


def cells(line):
    return line.replace(r"\|", "").count("|")


class TestMarkdown:
    def test_failures_come_first_and_every_row_has_its_cells(self, verdicts):
        lines = summary(verdicts, [linear("a")]).splitlines()
        assert lines[0] == "## geomssl gate: 2 fail, 2 inconclusive, 3 pass"
        rows = [line for line in lines if line.startswith("|")]
        kinds = [line.split()[2] for line in rows[2:9]]
        assert kinds == ["fail"] * 2 + ["inconclusive"] * 2 + ["pass"] * 3
        assert {cells(line) for line in rows[:9]} == {6}
        assert {cells(line) for line in rows[9:]} == {5}

    def test_markup_in_names_is_shown_not_read(self, verdicts):
        text = summary(verdicts, [])
        assert r"accuracy \| &lt;b&gt;" in text
        assert "<b>" not in text

    def test_a_newline_in_a_name_does_not_end_the_row(self, verdicts):
        odd = dataclasses.replace(verdicts[0], rule="a\n| b | c |\n# d")
        assert all(cells(x) == 6 for x in summary([odd], []).splitlines() if x.startswith("|"))

    def test_stays_small_and_says_what_is_left_out(self, verdicts):
        text = summary(list(verdicts) * 2000, [])
        assert len(text.encode()) < markdown.ROOM + 200
        assert "lines left out" in text.splitlines()[-1]

    def test_a_metric_without_interval_says_why(self):
        artifact = dataclasses.replace(linear("a"), metrics=[Metric("m", 1.5, reason="only one seed")])
        assert "no interval: only one seed" in summary([], [artifact])

    def test_is_appended_to_the_steps_summary(self, tmp_path, monkeypatch):
        path = tmp_path / "summary.md"
        path.write_text("before\n")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
        assert append_step_summary("one")
        assert append_step_summary("two\n")
        assert path.read_text() == "before\none\ntwo\n"

    def test_without_the_variable_nothing_is_written(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for value in (None, ""):
            if value is None:
                monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
            else:
                monkeypatch.setenv("GITHUB_STEP_SUMMARY", value)
            assert not append_step_summary("one")
        assert list(tmp_path.iterdir()) == []

    def test_a_full_summary_is_left_alone(self, tmp_path, monkeypatch):
        path = tmp_path / "summary.md"
        path.write_text("x" * (2**20 - 10))
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
        assert not append_step_summary("a" * 20)
        assert path.stat().st_size == 2**20 - 10

    def test_a_summary_that_cannot_be_written_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "summary.md"))
        with pytest.raises(GeomsslError, match="GITHUB_STEP_SUMMARY"):
            append_step_summary("one")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9134, "0.913"), (0.9, "0.900"), (12.34, "12.3"), (123.4, "123"), (1797, "1797"), (1797.4, "1797"),
        (3.13e-7, "3.1e-7"),
        (0.0, "0"), (0, "0"), (-0.5, "-0.500"), (0.001, "0.00100"), (2.5e6, "2.5e6"), (None, "–"), (True, "yes"), (1.0, "1.00"),
        ("digits", "digits"), (float("nan"), "not finite"), (12345678, "12345678"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_figure_has_its_interval_its_unit_and_n():
    assert figure(Metric("m", 0.9134, 360, Interval(0.88, 0.9412, "x"))) == "0.913 [0.880, 0.941], n=360"
    assert figure(Metric("m", 31.4, None, None, "why", unit="dimensions")) == "31.4 dimensions"
    assert figure(Metric("m", None, None, None, "why", unit="dimensions")) == "–"
    assert bounds(None) == ""
