"""`core50`: 50 objects of 10 classes, held in the hand, filmed in 11 sessions; the session is a factor.

Layout: core50_128x128/s<1-11>/o<1-50>/C_<session>_<object>_<frame>.png; five objects a class, in the order of
extras/core50_labels.txt of github.com/vlomonaco/core50. Lomonaco and Maltoni, CORe50, CoRL 2017.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from geomssl.data.base import Source, Split
from geomssl.data.layouts import Layout, Listing, OnDisk, index, listed, need, read
from geomssl.errors import GeomsslError

SESSIONS, OBJECTS, EACH = 11, 50, 5
CLASSES = (
    "plug adapters", "mobile phones", "scissors", "light bulbs", "cans", "glasses", "balls", "markers", "cups",
    "remote controls",
)
NAME = re.compile(r"C_(\d+)_(\d+)_(\d+)\.png")


class CORe50(Layout):
    """Train and val from `train_sessions`, test from the other sessions; the last `val` of every clip's frames is val."""

    name, inside, images = "core50", ("core50_128x128",), "164,866"
    url = "https://vlomonaco.github.io/core50"

    class Config(OnDisk):
        name: Literal["core50"] = "core50"
        train_sessions: tuple[int, ...] = Field(
            (1, 2), description="sessions to train on, 2 of 11 in CIPER (which two it does not say); all others are test"
        )
        val: float = Field(0.1, ge=0, lt=1, description="share of each clip, its last frames, that is val")
        labels: Literal["class", "object", "session"] = Field("class", description="what the labels are")
        only: Literal["all", "unseen"] = Field(
            "all", description="unseen: all splits from the sessions not trained on, 60/20/20 of each clip in order"
        )
        every: int = Field(1, ge=1, description="use every so many frames (they were taken 20 a second)")

        @field_validator("train_sessions")
        @classmethod
        def _some(cls, given: tuple[int, ...]) -> tuple[int, ...]:
            if not given or len(set(given)) < len(given) or not set(given) < set(range(1, SESSIONS + 1)):
                raise GeomsslError(
                    f"dataset.train_sessions = {list(given)}", f"some of the sessions 1 to {SESSIONS}, not all",
                    reason="bad-value",
                )
            return given

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = CORe50.folder(config.root)
        trained = set(config.train_sessions)
        unseen = config.only == "unseen" or split == "test"
        sessions = [s for s in range(1, SESSIONS + 1) if (s in trained) != unseen]
        shares = (0.6, 0.8) if config.only == "unseen" else (1 - config.val, 1.0) if split != "test" else (0.0, 0.0)
        found = Listing(classes=_names(config.labels))
        for session in range(1, SESSIONS + 1):
            need(base / f"s{session}", f"the sessions s1 to s{SESSIONS} of core50_128x128")
        for session in sessions:
            for number in range(1, OBJECTS + 1):
                folder = base / f"s{session}" / f"o{number}"
                frames = listed(folder, "C_*.png", f"the frames of objects o1 to o{OBJECTS} of each session")
                first, second = (round(share * len(frames)) for share in shares)
                found.like = frames[0]
                part = {"train": frames[:first], "val": frames[first:second], "test": frames[second:]}[split]
                for path in part[:: config.every]:
                    matched = NAME.fullmatch(path.name)
                    if matched is None or [int(g) for g in matched.groups()[:2]] != [session, number]:
                        raise GeomsslError(
                            f"{path}", f"C_{session:02d}_{number:02d}_<frame>.png, as the release names it", reason="bad-layout"
                        )
                    label = {"class": (number - 1) // EACH, "object": number - 1, "session": session - 1}[config.labels]
                    found.add(
                        path, label, session=session - 1, object=number - 1, sequence=(session - 1) * OBJECTS + number - 1,
                        frame=int(matched.group(3)) // config.every,
                    )
        found.parameters = tuple(index(name, values) for name, values in found.factors.items())
        return read("core50", split, found, base, config)


def _names(labels: str) -> tuple[str, ...]:
    if labels == "session":
        return tuple(f"s{s}" for s in range(1, SESSIONS + 1))
    return CLASSES if labels == "class" else tuple(f"o{o}" for o in range(1, OBJECTS + 1))
