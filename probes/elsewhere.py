"""Another data set than the one that is measured, brought to the size and channels of the encoder's own images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from geomssl import data
from geomssl.config import assignments
from geomssl.data.base import Source, Split
from geomssl.data.derived import fitted
from geomssl.errors import GeomsslError, unknown
from geomssl.probes.subject import Subject
from geomssl.registry import resolve


def settings(to: Sequence[str], given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What --to-set NAME.KEY=VALUE says of each data set of --to, by its short name; a set's own schema judges the keys.

    Raises GeomsslError for anything else, and for a set that is not carried to.
    """
    heads = [str(data.section(name)["name"]) for name in to]
    found = assignments(given, "--to-set", f"NAME.KEY=VALUE, such as {heads[0] if heads else 'dtd'}.seed=1")
    for head, values in found.items():
        if head not in heads:
            raise unknown("data set of --to-set", head, heads)
        if not isinstance(values, dict):
            raise GeomsslError(f"--to-set {head}={values}", f"{head}.KEY=VALUE", reason="bad-value")
    return found


def source(
    name: str, split: Split, channels: int, size: int, download: bool = False,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> Source:
    """That split of NAME or NAME:PATH. A set that can be read at a size is read at that one; others are resized.

    chosen: further settings by short name, of `settings`; the side is the encoder's all the same.
    """
    section = data.section(name)
    section |= (chosen or {}).get(section["name"], {})
    fields = resolve("dataset", section["name"]).Config.model_fields
    own: dict[str, Any] = {"size": size, "download": download}
    section |= {key: value for key, value in own.items() if key in fields}
    return fitted(data.load_config(data.configure(section, f"--to {name}"), split), channels, size)


def carried(subject: Subject, name: str, given: Sequence[str] = ()) -> Subject:
    """The subject on another data set, its encoder and its random twin's the same. given: --to-set, of `settings`."""
    channels, size, chosen = subject.source.channels, subject.source.size, settings((name,), given)
    own, train = (source(name, split, channels, size, chosen=chosen) for split in (subject.source.split, "train"))
    about = {"dataset": own.name, "images_sha256": own.fingerprint}
    kept = {key: value for key, value in subject.provenance.items() if key != "images_left_out"}
    notes = {"images_left_out": list(own.notes)} if own.notes else {}
    return replace(subject, source=own, train=train, provenance={**kept, **about, **notes}, _cache={}, _spill=None)
