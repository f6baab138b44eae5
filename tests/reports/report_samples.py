"""Artifacts as the probes write them, made up: three runs, six probes; and where a browser is."""

import math
import random
import shutil
import struct
import zlib

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table

BOOT = "percentile bootstrap over images, 95 %"
RUNS = ("simclr-cnn", "hssl-c4-cnn", "ciper-cnn")


def browser():
    """The path of an installed browser, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def png(width, height, pixel):
    """A greyscale PNG whose value at (x, y) is pixel(x, y)."""
    rows = b"".join(b"\0" + bytes(pixel(x, y) for x in range(width)) for y in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def provenance(run):
    return {
        "run": run, "checkpoint": "3f9a0c1b77de", "dataset": "digits", "split": "test", "seed": 0, "n": 360,
        "geomssl": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "dtype": "float32", "device": "cpu",
        "command": f"geomssl probe all --checkpoint {run}.pt",
    }


def row(**values):
    return values


def element_rows(rows):
    """A table `elements` from dictionaries; what a row does not give is that of an exact, sound element."""
    default = row(element="90°", total=0.1, low=0.09, high=0.11, low_any=0.08, floor=0.0, excess=0.1,
                   action_size=1.2, exact=True, degenerate=False)
    rows = [default | given for given in rows]
    columns = list(dict.fromkeys(key for given in [default, *rows] for key in given))
    return Table("elements", "Error of each element", {key: [given.get(key) for given in rows] for key in columns})


def equivariance(run="run", rows=None, n=360, step=None, **options):
    if rows is None:
        size = 3.1e-7 if "c4" in run else 0.93
        rows = [row(element="0°", total=0.0, low=0.0, high=0.0, low_any=0.0, excess=0.0, action_size=0.0)] + [
            row(element=f"{a}°", total=size * k, low=size * k * 0.95, high=size * k * 1.05, low_any=size * k * 0.92,
                 floor=0.0, excess=size * k, action_size=1.1 + 0.02 * k)
            for a, k in ((90, 1.0), (180, 0.86), (270, 1.01))
        ]
    table = element_rows(rows)
    worst = max(range(len(table)), key=lambda i: table.columns["total"][i])
    total, low, high = (table.columns[c][worst] for c in ("total", "low", "high"))
    name = table.columns["element"][worst]
    return Artifact(
        "equivariance", "Equivariance error", f"The worst turn, {name}, leaves an error of {total:.3g}; chance is 1.414.",
        "total_g = √( Σ‖f(T_g x) − Γ_g f(x)‖² / Σ‖Γ_g f(x) − mean‖² )\n"
        "Two unrelated features score √2. The error of an exact pair is the defect of the network itself.",
        [Metric("total", total, n, Interval(low, high, BOOT), better="lower", about="worst element"),
         Metric("action_size", 1.12, n, Interval(1.08, 1.16, BOOT))],
        [table],
        [Figure("errors", "bar", "Error of each element", "Whiskers are pointwise 95 % intervals; chance is 1.414.", "elements",
                "element", "total", low="low", high="high", log_y=True, x_label="turn", y_label="total error")],
        options={"transform": "c4", "layer": "fibres", "n": None, "seed": 0} | options, provenance=provenance(run), step=step,
    )


def rank(run, projector=True):
    spread = {"simclr-cnn": 0.6, "hssl-c4-cnn": 1.0, "ciper-cnn": 0.8}.get(run, 0.9)
    taus = [10 ** (-6 + 6 * i / 48) for i in range(49)]
    columns = {"threshold": [], "rank": [], "object": []}
    for name, width in (("encoder h", 64), ("projector z", 32))[: 2 if projector else 1]:
        columns["threshold"] += taus
        columns["rank"] += [max(1, round(width * spread * (1 - (i / 48) ** 2))) for i in range(49)]
        columns["object"] += [name] * 49
    why = "a rank has no valid bootstrap: resampling lowers it"
    return Artifact(
        "rank", "Rank", "At τ = 10⁻³ the encoder's features span 58 directions, the projector's 29.",
        "rank(τ) = #{ σ_i ≥ τ · σ_1 } of the centred features",
        [Metric("effective_rank_h", 31.4 * spread, 360, None, why, better="higher"),
         Metric("effective_rank_z", 12.9 * spread, 360, None, why, better="higher"),
         Metric("stable_rank_h", 3.07, 360, Interval(2.91, 3.2, "subsampling, 95 %"))],
        [Table("curve", "Rank against threshold", columns)],
        [Figure("rank", "line", "Rank against the threshold", "A curve that falls early has few strong directions.", "curve",
                "threshold", "rank", series="object", log_x=True, x_label="threshold τ, relative to σ₁", y_label="rank")],
        notes=["Estimators disagree: effective rank 31.4 against stable rank 3.07."] if run == "simclr-cnn" else [],
        options={"tau": 1e-3, "n": None, "seed": 0}, provenance=provenance(run),
    )


def tangent(run):
    k = {"simclr-cnn": 0.31, "hssl-c4-cnn": 0.22, "ciper-cnn": 0.12}.get(run, 0.2)
    p = [0, 4, 8, 16, 24, 32]
    curve = [math.exp(-i / 12) * (1 - k) + k for i in p]
    return Artifact(
        "tangent", "Tangent space", f"The projector leaves {k:.0%} of the variance of δh unexplained.",
        "δh = h(2) − h*;  unexplained = Σ min_t ‖δh − W t‖² / Σ‖δh‖²",
        [Metric("unexplained_variance", k, 360, Interval(k - 0.02, k + 0.02, BOOT), better="lower"),
         Metric("label_match", 0.61, 360, Interval(0.56, 0.66, BOOT))],
        [Table("curve", "Unexplained by the leading directions", {"directions": p, "unexplained": curve,
               "low": [v - 0.02 for v in curve], "high": [min(1, v + 0.02) for v in curve]})],
        [Figure("curve", "line", "Unexplained variance by leading directions", "", "curve", "directions", "unexplained",
                low="low", high="high", x_label="leading directions of W", y_label="unexplained share")],
        options={"n": None, "seed": 0}, provenance=provenance(run),
    )


def linear(run):
    accuracy = {"simclr-cnn": 0.913, "hssl-c4-cnn": 0.948, "ciper-cnn": 0.931}.get(run, 0.9)
    values = [accuracy, 0.842, 0.894]
    low, high = [v - 0.03 for v in values], [v + 0.025 for v in values]
    return Artifact(
        "linear", "Linear classifier", f"A linear classifier reads {accuracy:.1%} of the labels; raw pixels give 89.4 %.",
        "share of test images whose label a logistic regression on frozen features predicts",
        [Metric("accuracy", accuracy, 360, Interval(low[0], high[0], "Wilson, 95 %"), better="higher"),
         Metric("knn_accuracy", accuracy - 0.02, 360, Interval(low[0] - 0.02, high[0] - 0.02, "Wilson"), better="higher")],
        [Table("accuracy", "Accuracy", {"features": ["encoder", "random encoder", "raw pixels"], "accuracy": values,
                                        "low": low, "high": high})],
        [Figure("accuracy", "bar", "Accuracy beside its baselines", "Top-1 on the test split.", "accuracy", "features",
                "accuracy", low="low", high="high", x_label="features", y_label="accuracy")],
        options={"n": None, "seed": 0, "k": 20}, provenance=provenance(run),
    )


def embed(run, n=360, label=str):
    draw = random.Random(run)
    labels = [i % 10 for i in range(n)]
    columns = {
        "x": [4 * math.cos(c * 0.63) + draw.gauss(0, 0.7) for c in labels],
        "y": [4 * math.sin(c * 0.63) + draw.gauss(0, 0.7) for c in labels],
        "label": [label(c) for c in labels], "index": list(range(n)),
    }
    tile, across = 16, 24
    sprite = png(tile * across, tile * -(-n // across), lambda x, y: (x * 7 + y * 13 + (x // tile) * 31) % 256)
    return Artifact(
        "embed", "Map of the features", "Near neighbours stay near: trustworthiness is 0.962.",
        "trustworthiness(k): 1 − share of false neighbours on the map, k = 12",
        [Metric("trustworthiness", 0.962, n, Interval(0.958, 0.965, "range over 3 seeds"), better="higher")],
        [Table("map", "Points", columns)],
        [Figure("map", "scatter", "PaCMAP of h", "Point at a dot to see its image.", "map", "x", "y", series="label",
                x_label="PaCMAP 1", y_label="PaCMAP 2", sprite="sprite.png", sprite_columns=across)],
        options={"n": None, "seed": 0}, provenance=provenance(run), files={"sprite.png": sprite},
    )


def saliency(run):
    residual = [abs(math.sin(i)) * 4e-7 for i in range(24)]
    return Artifact(
        "saliency", "FullGrad", "The terms add up to the class score to 4e-7.",
        "f(x) = ⟨∇f, x⟩ + Σ_l ⟨∇_b f, b⟩;  residual = |f − terms| / Σ|terms|",
        [Metric("residual_max", max(residual), 24, None, "completeness is exact arithmetic, not a sample", better="lower")],
        [Table("residual", "Residual of each image", {"image": list(range(24)), "residual": residual})],
        [Figure("maps", "image", "FullGrad maps", "Image above, map below.", "residual", file="maps.png")],
        options={"n": 24, "seed": 0}, provenance=provenance(run),
        files={"maps.png": png(320, 96, lambda x, y: (x * y) // 7 % 256)},
    )


def everything(run):
    return [equivariance(run), rank(run), tangent(run), linear(run), embed(run), saliency(run)]
