"""The rules of a gate: what to judge, and the limits; read from TOML, with one line for every mistake."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from geomssl.config import Settings, parse, read_toml
from geomssl.errors import GeomsslError, nearest
from geomssl.registry import names

CHANCE = math.sqrt(2)
LIMITS = ("limit", "at_least", "max_increase", "max_ratio")


class Rule(Settings):
    """One demand on one figure: `limit` (pass below it) or `at_least`, and `max_increase` or `max_ratio` over a baseline."""

    name: str = Field(min_length=1, description="what the rule is called in every output")
    probe: str = Field(min_length=1, description="the probe whose artifact is judged")
    metric: str | None = Field(None, description="the figure; total, over all elements, when the probe is equivariance")
    limit: float | None = Field(None, allow_inf_nan=False, description="pass when the figure is below this")
    at_least: float | None = Field(None, allow_inf_nan=False, description="pass when the figure is at least this")
    max_increase: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="pass when the figure is less than this above the baseline's"
    )
    max_ratio: float | None = Field(
        None, gt=1, allow_inf_nan=False, description="pass when the figure is less than so many times the baseline's"
    )
    run: str | None = Field(None, description="the run to judge; every run when not given")
    options: dict[str, Any] = Field(default_factory=dict, description="how it must have been measured")

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        here = f"rule {self.name!r}"
        if all(getattr(self, key) is None for key in LIMITS):
            raise GeomsslError(
                f"{here} has neither limit nor at_least, max_increase or max_ratio", "a limit, or a baseline's increase",
                reason="bad-value",
            )
        if self.limit is not None and self.at_least is not None:
            raise GeomsslError(f"{here} has both limit and at_least", "one of them", reason="bad-value")
        if self.at_least is not None and self.compares:
            raise GeomsslError(
                f"{here} has at_least beside {'max_increase' if self.max_ratio is None else 'max_ratio'}",
                "limit beside it: an increase is bounded where lower is better", reason="bad-value",
            )
        if self.per_element:
            self._between("limit", self.limit if self.at_least is None else math.nan, here)
            self._between("max_increase", self.max_increase, here)
        elif self.metric is None:
            known = names("probe")
            near = None if self.probe in known else nearest(self.probe, known)
            raise GeomsslError(
                f"{here} names no metric of {'' if self.probe in known else 'the unknown probe '}{self.probe}",
                "metric = \"...\"" if near is None else "a probe that exists", near, reason="bad-value",
            )
        elif self.probe == "equivariance" and self.metric in ("excess", "floor"):
            raise GeomsslError(
                f"{here}: metric = {self.metric!r}", "total: floor and excess describe resampling and judge nothing",
                reason="bad-value",
            )
        return self

    def _between(self, key: str, value: float | None, here: str) -> None:
        if value is not None and not 0 < value < CHANCE:
            given = f"{key} = {value}" if self.at_least is None else f"at_least = {self.at_least}"
            raise GeomsslError(
                f"{here}: {given}", f"a {key} between 0 and √2, which is what unrelated features score", reason="bad-value"
            )

    @property
    def per_element(self) -> bool:
        """Is this judged element by element, from the table `elements`?"""
        return self.probe == "equivariance" and self.metric in (None, "total")

    @property
    def compares(self) -> bool:
        """Does this need a baseline?"""
        return self.max_increase is not None or self.max_ratio is not None


class Rules(Settings):
    """A rules file: one [[rule]] or more, and nothing else."""

    rule: tuple[Rule, ...] = Field(description="the rules, in the order in which they are reported")

    @model_validator(mode="after")
    def _distinct(self) -> Rules:
        if not self.rule:
            raise GeomsslError("rules without a single [[rule]]", "at least one", reason="no-rules")
        called = [rule.name for rule in self.rule]
        for name in called:
            if called.count(name) > 1:
                raise GeomsslError(f"two rules called {name!r}", "a name of its own for each", reason="bad-value")
        return self


def read_rules(path: Path | str) -> Rules:
    """The rules in a TOML file. GeomsslError names the file and the first bad key, value or rule."""
    data = read_toml(path)
    for key in data.keys() - {"rule"}:
        raise GeomsslError(f"{path}: unknown key {key!r}", "[[rule]] only", nearest(key, ["rule"]), reason="unknown-key")
    if not data.get("rule"):
        raise GeomsslError(f"{path} has no rule", "at least one [[rule]]", reason="no-rules")
    tables = data["rule"]
    if not isinstance(tables, list):
        raise GeomsslError(f"{path}: [rule], or rule = ...", "[[rule]], in double brackets", reason="bad-value")
    # one by one, so that a complaint names the rule
    for index, table in enumerate(tables, 1):
        if isinstance(table, dict):
            parse(Rule, table, f"{path}: rule {table.get('name', index)}")
    return parse(Rules, data, str(path))
