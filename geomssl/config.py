"""Settings: pydantic models are the only schema. Reads TOML, merges layers, and turns complaints into one line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from geomssl.errors import GeomsslError, nearest


class Settings(BaseModel):
    """Frozen, and every unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


S = TypeVar("S", bound=BaseModel)


def parse(model: type[S], data: Mapping[str, Any], where: str) -> S:
    """Validate `data`, or raise a GeomsslError that names the first bad key, what was expected and the nearest key."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        # a key that is misspelt is also a key that is missing: the first says more
        found = error.errors(include_url=False)
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        if first["type"] == "value_error" and isinstance(first.get("ctx", {}).get("error"), GeomsslError):
            raise first["ctx"]["error"] from None
        path = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            valid = list(model.model_fields)
            key = str(first["loc"][-1])
            raise GeomsslError(
                f"{where}: unknown key {path!r}", f"one of {', '.join(valid)}", nearest(key, valid), reason="unknown-key"
            ) from None
        missing = first["type"] == "missing"
        given = "nothing" if missing else repr(first["input"])
        message = "a value" if missing else first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise GeomsslError(f"{where}: {path or 'value'} = {given}", message, reason="bad-value") from None


def read_toml(path: Path | str) -> dict[str, Any]:
    """A TOML file as a dictionary; a GeomsslError names the file and, where it is broken, the line."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise GeomsslError(f"no such file: {path}", "a TOML file", nearest(path.name, beside), reason="no-file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GeomsslError(f"{path} is broken: {error}", "valid TOML", reason="bad-toml") from None
    except OSError as error:
        raise GeomsslError(f"cannot read {path}: {error.strerror}", "a readable TOML file", reason="no-file") from None


def assignments(pairs: Iterable[str], flag: str = "--set", form: str = "key=value, such as optim.lr=0.1") -> dict[str, Any]:
    """`--set optim.lr=0.1` and the like as a nested dictionary; a value is TOML where it parses, else text."""
    merged: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise GeomsslError(f"{flag} {pair}", form, reason="bad-value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        merged = merge(merged, nested)
    return merged


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; `above` wins. A section whose `name` changes starts afresh: its old options belong to the old name."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = "name" in value and "name" in old and value["name"] != old["name"]
            merged[key] = dict(value) if renamed else merge(old, value)
        else:
            merged[key] = value
    return merged


def canonical(data: Any) -> str:
    """JSON with sorted keys: equal settings give equal text."""
    if isinstance(data, BaseModel):
        data = data.model_dump(mode="json")
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
