"""Another data set than the one that is measured, brought to the size and channels of the encoder's own images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from geomssl import data
from geomssl.data.base import Source, Split
from geomssl.data.derived import fitted
from geomssl.probes.subject import Subject
from geomssl.registry import resolve


def source(name: str, split: Split, channels: int, size: int, download: bool = False) -> Source:
    """That split of NAME or NAME:PATH. A set that can be read at a size is read at that one; others are resized."""
    section = data.section(name)
    fields = resolve("dataset", section["name"]).Config.model_fields
    own: dict[str, Any] = {"size": size, "download": download}
    section |= {key: value for key, value in own.items() if key in fields}
    return fitted(data.load_config(data.configure(section, f"--to {name}"), split), channels, size)


def carried(subject: Subject, name: str) -> Subject:
    """The subject on another data set, its encoder and its random twin's the same."""
    channels, size = subject.source.channels, subject.source.size
    own, train = (source(name, split, channels, size) for split in (subject.source.split, "train"))
    about = {"dataset": own.name, "images_sha256": own.fingerprint}
    kept = {key: value for key, value in subject.provenance.items() if key != "images_left_out"}
    notes = {"images_left_out": list(own.notes)} if own.notes else {}
    return replace(subject, source=own, train=train, provenance={**kept, **about, **notes}, _cache={}, _spill=None)
