"""What the artifact of `equivariance` says: its tables, figures, metrics, headline and notes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.probes.assurance import METHOD
from geomssl.probes.defect import CHANCE, EquivarianceError
from geomssl.probes.elements import doing
from geomssl.probes.inputs import Inputs
from geomssl.probes.layers import Layer
from geomssl.sums import FILE, Sums, pack
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Transform

# Under this total the headline says "as declared"; no verdict rests on it.
CLOSE = 1e-3
SMALL_ACTION = 0.05


@dataclass(frozen=True)
class Account:
    """Everything that was measured, and how: one entry of layers, actions and found for each layer.

    rows: the digest of what the sums are of, see geomssl.sums.  unmixed: layers whose tokens have not met the image.
    """

    transform: Transform
    params: Tensor
    names: list[str]
    layers: list[Layer]
    actions: list[Action]
    why: list[str]
    found: list[EquivarianceError]
    inputs: Inputs
    boundary: str
    level: float
    share: float
    remarks: list[str]
    sweep: Table | None
    dtype: torch.dtype
    rows: str
    unmixed: Sequence[Layer] = ()

    def flat(self, key: str) -> Tensor:
        """A figure of every layer and element, layer by layer; key may be dotted ("bounds.high")."""
        values: list[Any] = list(self.found)
        for part in key.split("."):
            values = [getattr(value, part) for value in values]
        return torch.cat(values)

    @property
    def places(self) -> list[str]:
        """Where each of these figures was found: "90°", or "90° of layer2"."""
        if len(self.layers) == 1:
            return self.names
        return [f"{name} of {layer.name}" for layer in self.layers for name in self.names]


def account(told: Account, options: dict[str, Any], provenance: dict[str, Any]) -> Artifact:
    """The artifact."""
    declared = list(dict.fromkeys(act.name for act in told.actions))
    shapes = "; ".join(f"{layer.name} of shape {layer.shape}" for layer in told.layers[:3])
    shapes += f"; and {len(told.layers) - 3} more" if len(told.layers) > 3 else ""
    tables = [_elements(told), _layers(told), _parameters(told)]
    tables += [_unmixed(told)] if told.unmixed else []
    figures = [_by_element(told)] if len(told.layers) <= 8 else []
    if len(told.layers) > 1:
        figures.append(
            Figure(
                "layers", "bar", f"Worst equivariance error of each layer under {told.transform.name}",
                f"Total error at the layer's worst element with its {told.level:.0%} interval. Chance is {CHANCE:.3g}.",
                "layers", "layer", "total", low="low", high="high", x_label="layer", y_label="total error", log_y=True,
            )
        )
    if told.sweep is not None:
        tables.append(told.sweep)
        figures.append(
            Figure(
                "sweep", "line", f"What remains on smooth pictures under {told.transform.name}",
                "Total error of rendered fields against their bandwidth, at each layer's worst element: as it falls, "
                "resampling of features matters less, and what stays is the model's.",
                "sweep", "bandwidth", "total", series="layer", low="bound_low", high="bound_high",
                x_label="bandwidth (cycles per pixel)", y_label="total error",
            )
        )
    kept = pack(_sums(told))
    return Artifact(
        probe="equivariance",
        title=f"Equivariance under {told.transform.name}",
        headline=_headline(told),
        definition=(
            "total = √(Σ‖f(T_g x) − Γ_g f(x)‖² / Σ‖Γ_g f(x) − mean‖²) over images: 0 where features move as declared, "
            f"√2 = {CHANCE:.3g} where they are unrelated. The true defect lies within total ± resampling, which is 0 where "
            "nothing is resampled. floor² = ½ Σ‖f(T_g⁻¹T_g x) − f(x)‖² over the same denominator, plus "
            "‖Γ_g⁻¹Γ_g f − f‖² where Γ resamples; excess = √max(0, total² − floor²). action size = √(Σ‖Γ_g f − f‖² / same). "
            f"Here f gives {shapes}; T is {told.transform.name}, on {told.inputs.name}, and Γ is the "
            f"{' or the '.join(declared)} action. Judge by the bounds."
        ),
        metrics=_metrics(told),
        tables=tables,
        figures=figures,
        notes=[*told.why, *_notes(told)],
        options=options,
        provenance=provenance,
        files={} if kept is None else {FILE: kept},
    )


def _sums(told: Account) -> Sums:
    """Image by image, a column for every row of the table of elements; what a paired comparison needs."""
    above, below = (torch.cat([getattr(f, key) for f in told.found], dim=1) for key in ("numerators", "denominators"))
    return Sums(above, below, told.rows, told.found[0].units.lstrip("0123456789 "))


def _elements(told: Account) -> Table:
    count = len(told.names)
    columns: dict[str, list[Any]] = {
        "layer": [layer.name for layer in told.layers for _ in range(count)],
        "element": told.names * len(told.layers),
        **{
            name: _plain(told.flat(key))
            for name, key in (
                ("total", "total"), ("low", "interval.low"), ("high", "interval.high"), ("low_any", "low_any"),
                ("resampling", "resampling"), ("bound_low", "bounds.low"), ("bound_high", "bounds.high"),
                ("bound_low_any", "bounds.low_any"), ("floor", "floor"), ("excess", "excess"), ("action_size", "action_size"),
            )
        },
        "exact": told.flat("exact").tolist(),
        "degenerate": told.flat("degenerate").tolist(),
    }
    return Table(
        "elements", "Every layer and element", columns,
        "[low, high] is the pointwise interval of total, [bound_low, bound_high] that of the true defect, total ± resampling; "
        "low_any and bound_low_any hold for all elements of all layers at once.",
    )


def _layers(told: Account) -> Table:
    """One row a layer: what it gives, how it is declared to move, and its worst element."""
    worst = [int(found.total.nan_to_num(nan=-1.0).argmax()) for found in told.found]
    at = list(zip(told.found, worst, strict=True))
    placed = [layer.geometry for layer in told.layers]
    return Table(
        "layers", "Every layer",
        {
            "layer": [layer.name for layer in told.layers],
            "features": [layer.form.kind if not layer.apart else "tokens apart" for layer in told.layers],
            "shape": ["x".join(map(str, layer.shape)) for layer in told.layers],
            "action": [act.name for act in told.actions],
            "stride": [None if g is None else g.stride[0] for g in placed],
            "field": [None if g is None or not math.isfinite(max(g.reach)) else 2 * max(g.reach) + 1 for g in placed],
            "worst": [told.names[w] for w in worst],
            "total": _plain(torch.stack([f.total[w] for f, w in at])),
            "low": _plain(torch.stack([f.interval.low[w] for f, w in at])),
            "high": _plain(torch.stack([f.interval.high[w] for f, w in at])),
            "bound_low_any": _plain(torch.stack([_largest(f.bounds.low_any) for f in told.found])),
            "bound_high": _plain(torch.stack([_bounded(f.bounds.high) for f in told.found])),
            "kept": _plain(torch.stack([f.kept.min() for f in told.found])),
        },
        "Worst element, largest bounds, and the least share of feature pixels that is judged. field: side of the receptive "
        "field in pixels; empty where a feature sees the whole image or it is not known.",
    )


def _unmixed(told: Account) -> Table:
    return Table(
        "unmixed", "Tokens before mixing",
        {"layer": [layer.name for layer in told.unmixed], "shape": ["x".join(map(str, layer.shape)) for layer in told.unmixed]},
        "Tokens that have not met the image yet: constant by construction, and judged by nothing.",
    )


def _parameters(told: Account) -> Table:
    columns = {
        f"{p.name} ({p.unit})" if p.unit else p.name: told.params[:, i].tolist()
        for i, p in enumerate(told.transform.parameters)
    }
    return Table("parameters", "Parameters of every element", {"element": told.names, **columns})


def _by_element(told: Account) -> Figure:
    several = len(told.layers) > 1
    return Figure(
        "errors", "bar", f"Equivariance error under {told.transform.name}",
        f"Total error of each element with its {told.level:.0%} interval. Unrelated features score {CHANCE:.3g}.",
        "elements", "element", "total", series="layer" if several else None, low="low", high="high", x_label="element",
        y_label="total error", log_y=True,
    )


def sweep_table(layers: Sequence[Layer], names: Sequence[str], swept: Sequence[tuple[float, list[EquivarianceError]]]) -> Table:
    """Bandwidth by bandwidth and layer by layer, the worst element on rendered fields."""
    rows: dict[str, list[Any]] = {
        key: [] for key in ("bandwidth", "layer", "element", "total", "resampling", "bound_low", "bound_high", "n")
    }
    for bandwidth, errors in swept:
        for layer, found in zip(layers, errors, strict=True):
            worst = int(found.total.nan_to_num(nan=-1.0).argmax())
            figures = (found.total, found.resampling, found.bounds.low, found.bounds.high)
            row = [bandwidth, layer.name, names[worst], *_plain(torch.stack([f[worst] for f in figures])), found.n]
            for column, value in zip(rows.values(), row, strict=True):
                column.append(value)
    return Table(
        "sweep", "Rendered fields of several bandwidths", rows,
        "total at the worst element; the true defect on fields of that bandwidth lies within [bound_low, bound_high].",
    )


def _plain(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _largest(values: Tensor) -> Tensor:
    known = values[values.isfinite()]
    return known.max() if len(known) else values.new_tensor(math.nan)


def _bounded(values: Tensor) -> Tensor:
    """The largest upper bound; NaN where one is not known, since it could be any."""
    return values.max() if bool(values.isfinite().all()) else values.new_tensor(math.nan)


def _metrics(told: Account) -> list[Metric]:
    total, low_any, high = told.flat("total"), told.flat("low_any"), told.flat("interval.high")
    count, n = len(total), told.found[0].n
    constant = "the features do not vary at all, so there is nothing to compare with"
    usable = total.isfinite()
    worst = int(total.nan_to_num(nan=-1.0).argmax())
    over = f"{count} elements" if len(told.layers) == 1 else f"{count} elements of {len(told.layers)} layers"
    method = METHOD.replace("images", told.found[0].units, 1)
    interval = None
    if bool(usable.any()):
        interval = Interval(
            float(low_any[usable].max()), float(high[usable].max()),
            f"{method}, {told.level:.0%}: from the largest simultaneous lower bound to the largest pointwise upper bound of "
            f"{over}",
        )

    def single(name: str, key: str, missing: str, about: str) -> Metric:
        value = float(told.flat(key)[worst])
        given = value if math.isfinite(value) else None
        reason = missing if given is None else "describes the total error beside it and is no basis of a verdict"
        return Metric(name, given, n=n, reason=reason, about=about)

    no_floor = "the transform has no inverse" if bool(usable.any()) else constant
    # Features that do not vary have no defect to bound; the notes name them.
    below, above = math.nan, math.nan
    if bool(usable.any()):
        below, above = float(_largest(told.flat("bounds.low_any"))), float(_bounded(told.flat("bounds.high")[usable]))
    known = math.isfinite(below) and math.isfinite(above)
    unknown = "what resampling does is not known at some element" if bool(usable.any()) else constant
    return [
        Metric(
            "total", float(total[worst]) if interval else None, n=n, interval=interval,
            reason=None if interval else constant, better="lower", about="total error at the worst element",
        ),
        Metric(
            "defect", above if known else None, n=n, better="lower", reason=None if known else unknown,
            interval=Interval(below, above, f"total ± resampling, half of the tail each; {method}, {told.level:.0%}, of {over}")
            if known else None,
            about="upper bound of the true defect at every element",
        ),
        single("action_size", "action_size", constant, "how much the declared action moves the features there"),
        single("floor", "floor", no_floor, "what resampling there and back does to the features there"),
        single("excess", "excess", no_floor, "total without the floor, in squares; never the basis of a verdict"),
        Metric("chance", CHANCE, reason="a constant: what unrelated features score", about="total error of unrelated features"),
        Metric(
            "exact", float(told.flat("exact").double().mean()), n=n, reason="a property of the elements, not of a sample",
            about=f"share of the {over} whose pair of actions only permutes",
        ),
        Metric(
            "variance_share", float(told.flat("variance_share").min()), n=n,
            reason=f"compared with a stated share only: under {told.share:g} the features are degenerate",
            about="variance of the features over their squared norm, at the element where it is least",
        ),
    ]


def _headline(told: Account) -> str:
    layers = told.layers
    only = {"fibres": "fibres", "h": "vectors h"}.get(layers[0].name, f"features {layers[0].name}")
    features = only if len(layers) == 1 else f"features of {len(layers)} layers"
    degenerate, known = told.flat("degenerate"), told.flat("bounds.high").isfinite()
    if bool(degenerate.all()):
        name = told.transform.name
        return f"The {features} hardly vary from image to image: nothing can be told about how {name} moves them."
    judged = known & ~degenerate
    total = told.flat("total").nan_to_num(nan=-1.0)
    worst = int((total.masked_fill(~judged, -1.0) if bool(judged.any()) else total).argmax())
    does, places, value = doing(told.transform), told.places, float(total[worst])
    if not bool(judged.any()):
        return (
            f"{does} puts the {features} {value:.2g} of their spread from the declared place, at {places[worst]} "
            f"(chance {CHANCE:.3g}); nothing is merely permuted there, so this is no verdict on the model."
        )
    count = "" if bool(judged.all()) else f" of the {int(judged.sum())} elements in {len(places)} that can be judged"
    low, high = float(told.flat("bounds.low")[worst]), float(told.flat("bounds.high")[worst])
    if not bool(told.flat("exact")[worst]) and float(told.flat("resampling")[worst]) > 0:
        return (
            f"{does} puts the {features} {value:.2g} of their spread from the declared place{count}, at {places[worst]} "
            f"(chance {CHANCE:.3g}); resampling aside, the model's own defect there lies between {low:.2g} and {high:.2g}."
        )
    kept = value < CLOSE
    if {act.name for act in told.actions} == {"trivial"}:
        said = f"{does} {'leaves' if kept else 'does not leave'} the {features} as they are"
    else:
        said = f"{does} {'moves' if kept else 'does not move'} the {features} as declared"
    return f"{said}: worst error {value:.2g} of the features' spread{count}, at {places[worst]} (chance {CHANCE:.3g})."


def _notes(told: Account) -> list[str]:
    size, places = told.inputs.size, told.places
    exact, resampling = told.flat("exact"), told.flat("resampling")
    notes = [f"Features were computed in {str(told.dtype).removeprefix('torch.')} and summed in float64.", *told.remarks]
    if told.inputs.moved is not None:
        notes.append(
            f"The inputs are rendered ({told.inputs.name}): T_g is evaluated, not resampled, so total is the model's defect "
            "up to what Γ itself resamples."
        )
    if told.unmixed:
        notes.append(
            f"Tokens before mixing: constant by construction, and not judged: {_some([layer.name for layer in told.unmixed])}. "
            "Class tokens and registers before the first attention have not met the image, so that nothing in them could move."
        )
    degenerate = told.flat("degenerate")
    if bool(degenerate.any()):
        where = _some([place for place, bad in zip(places, degenerate.tolist(), strict=True) if bad])
        notes.append(f"Degenerate at {where}: the features hardly vary, so a small error would mean nothing. Never a pass.")
    moved = told.flat("action_size").nan_to_num(nan=0.0)
    if all(act.name == "trivial" for act in told.actions):
        notes.append("The trivial action asks for invariance: a network that keeps nothing of the image meets it too.")
    else:
        asked = torch.cat([torch.full((len(told.names),), act.name != "trivial") for act in told.actions])
        least = int(moved.masked_fill(~asked, math.inf).argmin())
        if float(moved[least]) < SMALL_ACTION:
            notes.append(
                f"At {places[least]} the declared action moves the features by only {float(moved[least]):.2g} of their "
                "spread: an invariant network meets it trivially."
            )
    if not bool(exact.all()):
        notes.append(
            f"{int((~exact).sum())} of {len(places)} elements are not exact: the image or the features are resampled there, "
            "and total mixes the model's defect with that. The floor describes resampling there and back; it is no bound."
        )
    if told.inputs.moved is None and bool((resampling > 0).any()):
        reference = told.inputs.reference
        notes.append(
            f"What resampling does (resampling, at most {float(resampling.nan_to_num(nan=0.0).max()):.2g}) was measured on "
            f"rendered {'' if reference is None else reference.name} with the power spectrum, mean and contrast of these "
            "images, at random phases. The bounds hold as far as it does the same to the images; judge on rendered inputs "
            "(--images fields) where it decides."
        )
    if float(told.flat("total").nan_to_num(nan=0.0).max()) > 1.1 * CHANCE:
        notes.append(
            "A total above chance means that the mean of the features over images does not move as declared either: what all "
            "images share is put in the wrong place."
        )
    if bool(told.flat("floor").isnan().all()) and bool(told.flat("total").isfinite().any()):
        notes.append(f"{told.transform.name} has no inverse, so there is no floor and no excess.")
    notes += _boundary(told)
    if any(p.unit == "pixels" for p in told.transform.parameters):
        notes += _strides(told, size)
    if told.found[0].units != "images":
        notes.append(f"Intervals resample {told.found[0].units}, {told.found[0].n} images in all.")
    return notes


def _boundary(told: Account) -> list[str]:
    if told.boundary == "none":
        return []
    if told.boundary == "circular":
        return [
            "Boundary circular: images are taken as wrapped and shifts wrap. The model's own padding is as it is: where it "
            "pads by zeros, what that does at the seam counts as its error."
        ]
    kept = torch.cat([f.kept for f in told.found])
    return [
        "Boundary crop: only feature pixels whose receptive field stays on the image, before and after, are judged: "
        f"{float(kept.min()):.0%} to {float(kept.max()):.0%} of them. What padding does near the border is not in these "
        "figures; vectors have no places and are judged whole."
    ]


def _strides(told: Account, size: tuple[int, int]) -> list[str]:
    notes = []
    placed = [(layer, act.geometry) for layer, act in zip(told.layers, told.actions, strict=True) if act.name == "spatial"]
    for layer, here in placed[:1] if len({g and (g.stride, g.source) for _, g in placed}) == 1 else placed:
        if here is None or (here.source == "layers" and here.stride == (1.0, 1.0)):
            continue
        of = "" if len(told.layers) == 1 else f" of {layer.name}"
        stride = here.stride[0]
        notes.append(
            f"A feature pixel{of} is {stride:g} image pixels, as the layers say: only multiples of {stride:g} are whole (see "
            "step)."
            if here.source == "layers"
            else f"The layers do not tell the stride{of}; the ratio of sizes stands in, {size[0]} / {layer.size[0]} = "
            f"{stride:.3g} pixels, no shift counts as exact, and there are no bounds of the defect."
        )
    return notes if len(notes) <= 4 else [*notes[:3], f"And so for {len(notes) - 3} more layers: see the table layers."]


def _some(places: list[str]) -> str:
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
