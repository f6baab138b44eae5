"""Schedule: which probes run while training, and after which epochs. The `[probes]` table of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from geomssl.config import Settings, parse
from geomssl.errors import GeomsslError, unknown
from geomssl.registry import names, resolve


class Schedule(Settings):
    """After which epochs to measure, what, and how.

    `[probes.rank] n = 256` sets options of one probe; they are kept in `options`. Probes are named as they are installed:
    a recipe that came out of a checkpoint never imports a module that it names itself. Raises GeomsslError for an unknown
    probe, for options of a probe that does not run, and for options that the probe does not take.
    """

    every: int = Field(0, ge=0, description="epochs between two looks, at initialisation and at the end too; 0 is off")
    at: tuple[int, ...] = Field((), description="epochs to look after, and the end")
    run: tuple[str, ...] = Field((), description="the probes, by name")
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="their options, by probe")

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, given: Any) -> Any:
        """Every table that is no field holds the options of the probe of that name."""
        if not isinstance(given, Mapping):
            return given
        of = {key: value for key, value in given.items() if isinstance(value, Mapping) and key not in cls.model_fields}
        plain = {key: value for key, value in given.items() if key not in of}
        return {**plain, "options": {**plain.get("options", {}), **of}} if of else plain

    @model_validator(mode="after")
    def _checked(self) -> Schedule:
        valid = names("probe")
        for name in (*self.run, *self.options):
            if name not in valid:
                raise unknown("probe", name, valid)
        for name, options in self.options.items():
            if name not in self.run:
                raise GeomsslError(
                    f"probes.{name} beside probes.run = {list(self.run)}", f"{name} in probes.run", reason="bad-value"
                )
            parse(resolve("probe", name).Options, options, f"probes.{name}")
        if (self.every or self.at) and not self.run:
            raise GeomsslError("probes without probes.run", 'names of probes, such as run = ["rank"]', reason="bad-value")
        if any(epoch < 0 for epoch in self.at):
            raise GeomsslError(f"probes.at = {list(self.at)}", "epochs from 0 on", reason="bad-value")
        return self

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to look after that epoch, of a training of `epochs`; epoch 0 is the initialisation."""
        if epoch in self.at:
            return True
        return bool(self.every and epoch % self.every == 0) or (epoch == epochs and bool(self.every or self.at))
