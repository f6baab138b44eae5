"""Sources of images. `load("digits", "train")`, `load("cifar10", "val", root=DIR)`, `load("folder:PATH", "test")`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from geomssl.config import Settings, parse
from geomssl.data.base import Presence, Resident, Source, Split, to_unit
from geomssl.errors import GeomsslError
from geomssl.registry import names, resolve
from geomssl.seeding import generator

__all__ = [
    "Presence", "Resident", "Source", "Split",
    "configure", "load", "load_config", "presence", "same_images", "section", "to_unit",
]


def section(name: str, root: str | None = None, **options: Any) -> dict[str, Any]:
    """The settings of a data set from its short name: "folder:PATH" is name "folder", root PATH; so is "cifar10:PATH"."""
    head, colon, tail = name.partition(":")
    if colon and head in names("dataset"):
        if not tail:
            raise GeomsslError(f"--dataset {name}", f"{head}:PATH", reason="bad-value")
        name, root = head, tail
    return {"name": name, **({"root": root} if root is not None else {}), **options}


def configure(data: Mapping[str, Any], where: str = "dataset") -> Settings:
    """Validated settings of the data set that `data["name"]` names; Config of a class found through the registry."""
    return parse(resolve("dataset", str(data.get("name"))).Config, data, where)


def load_config(config: Settings, split: Split) -> Source:
    """The split of the data set that those settings describe."""
    if split not in ("train", "val", "test"):
        raise GeomsslError(f"split {split!r}", "train, val or test", reason="unknown-name")
    source: Source = resolve("dataset", config.name).load(config, split)  # type: ignore[attr-defined]
    limit = getattr(config, "limit", None)
    if limit is not None and isinstance(source, Resident) and limit < len(source):
        drawn = torch.randperm(len(source), generator=generator(config.seed, f"limit-{split}"))  # type: ignore[attr-defined]
        source = source.some(drawn[:limit].sort().values)
    if os.environ.get("RANK", "0") == "0":
        for note in [*source.notes, *_absent(source)]:
            print(f"geomssl: {source.name}/{split}: {note}", file=sys.stderr)
    return source


def _absent(source: Source) -> list[str]:
    """A sentence on the classes that have no image in a split that has some."""
    if source.labels is None or not len(source):
        return []
    named = source.labels.bincount(minlength=len(source.classes))[: len(source.classes)]
    gone = (named == 0).nonzero()[:, 0].tolist()
    if not gone:
        return []
    return [f"{len(gone)} of {len(source.classes)} classes have no image here; the first: {source.classes[gone[0]]}"]


def same_images(one: Settings, other: Settings) -> bool:
    """Whether two settings describe the same images: all of them are equal but where the files lie and how they are kept."""
    name = one.name  # type: ignore[attr-defined]
    machine: frozenset[str] = getattr(resolve("dataset", name), "machine", frozenset())
    return type(one) is type(other) and one.model_dump(exclude=set(machine)) == other.model_dump(exclude=set(machine))


def presence(name: str, root: str | None = None) -> Presence:
    """Whether a data set is here, by a cheap look. A class without a method `presence` needs no files."""
    look = getattr(resolve("dataset", name), "presence", None)
    return look(root) if look is not None else Presence(True, "", "made when it is asked for")


def load(name: str, split: Split, root: str | None = None, **options: Any) -> Source:
    """One split of a data set by its short name."""
    return load_config(configure(section(name, root, **options)), split)
