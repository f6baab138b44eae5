"""Verdicts as JUnit XML: a failed rule is a failure, an inconclusive one an error, so that CI tells them apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from geomssl.reports.verdict import Verdict, describe

# Some readers cut or refuse longer ones: an attribute, and the text of an element.
MESSAGE, TEXT = 1000, 20_000
# What XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(verdicts: Sequence[Verdict], suite: str = "geomssl gate") -> str:
    """One test case a verdict, with limit, found, low, high and n as properties. The gate measures nothing: time is 0.

    Well-formed whatever the names hold; a message has at most MESSAGE characters, a text at most TEXT.
    """
    counts = {
        "tests": len(verdicts),
        "failures": sum(v.verdict == "fail" for v in verdicts),
        "errors": sum(v.verdict == "inconclusive" for v in verdicts),
        "skipped": 0,
    }
    shown = {key: str(value) for key, value in counts.items()} | {"time": "0"}
    root = ET.Element("testsuites", {"name": suite, **shown})
    cases = ET.SubElement(root, "testsuite", {"name": suite, **shown})
    for verdict in verdicts:
        cases.append(_case(verdict))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(verdict: Verdict) -> ET.Element:
    name = {"classname": _legal(f"{verdict.probe}.{verdict.run}", MESSAGE), "name": _legal(verdict.rule, MESSAGE), "time": "0"}
    case = ET.Element("testcase", name)
    properties = ET.SubElement(case, "properties")
    interval = verdict.interval
    for key, value in {
        "verdict": verdict.verdict, "reason": verdict.reason, "metric": verdict.metric, "limit": verdict.limit,
        "found": verdict.found, "low": interval and interval.low, "high": interval and interval.high, "n": verdict.n,
        "where": verdict.where or None, "max_increase": verdict.max_increase, "max_ratio": verdict.max_ratio,
        "baseline": verdict.baseline, "look": verdict.look and f"{verdict.look['number']} of {verdict.look['of']}",
        "level": verdict.look and verdict.look["level"],
        **{f"power {row['injected']}": row["rate"] for row in verdict.power},
    }.items():
        if value is not None:
            ET.SubElement(properties, "property", {"name": key, "value": _legal(str(value), MESSAGE)})
    text = _legal(describe(verdict), TEXT)
    if verdict.verdict == "pass":
        ET.SubElement(case, "system-out").text = text
    else:
        tag = "failure" if verdict.verdict == "fail" else "error"
        message = _legal(f"expected {verdict.expected}; found {verdict.found_text}", MESSAGE)
        ET.SubElement(case, tag, {"type": verdict.reason, "message": message}).text = text
    return case


def _legal(text: str, most: int) -> str:
    text = _ILLEGAL.sub("\ufffd", text)
    return text if len(text) <= most else text[: most - 1] + "…"
