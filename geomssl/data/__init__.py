"""Sources of images. `load("digits", "train")`, `load("folder:PATH", "test")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomssl.config import Settings, parse
from geomssl.data.base import Resident, Source, Split, to_unit
from geomssl.errors import GeomsslError
from geomssl.registry import resolve

__all__ = ["Resident", "Source", "Split", "configure", "load", "load_config", "section", "to_unit"]


def section(name: str, root: str | None = None, **options: Any) -> dict[str, Any]:
    """The settings of a data set from its short name: "folder:PATH" is name "folder", root PATH."""
    head, colon, tail = name.partition(":")
    if colon and head == "folder":
        if not tail:
            raise GeomsslError(f"--dataset {name}", "folder:PATH", reason="bad-value")
        name, root = "folder", tail
    return {"name": name, **({"root": root} if root is not None else {}), **options}


def configure(data: Mapping[str, Any], where: str = "dataset") -> Settings:
    """Validated settings of the data set that `data["name"]` names; Config of a class found through the registry."""
    return parse(resolve("dataset", str(data.get("name"))).Config, data, where)


def load_config(config: Settings, split: Split) -> Source:
    """The split of the data set that those settings describe."""
    if split not in ("train", "val", "test"):
        raise GeomsslError(f"split {split!r}", "train, val or test", reason="unknown-name")
    return resolve("dataset", config.name).load(config, split)  # type: ignore[attr-defined]


def load(name: str, split: Split, root: str | None = None, **options: Any) -> Source:
    """One split of a data set by its short name."""
    return load_config(configure(section(name, root, **options)), split)
