"""Shares: which layer makes how much of a Lie derivative, all from one forward-mode and one backward pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomssl.artifact import Figure, Table
from geomssl.encoders.base import Encoder
from geomssl.encoders.capture import Capture
from geomssl.encoders.wrap import Wrapped
from geomssl.probes.assurance import interval, resampled_sums
from geomssl.probes.derivative import Task, declared_flow
from geomssl.probes.generators import Generator, forward_mode, pushed
from geomssl.probes.layers import BUILTIN, Layer

# How far the two ways through a cut may differ, over the product of norms, and how far the sum of shares may be from one.
CLOSE, SUM = 1e-3, 1e-2


@dataclass(frozen=True)
class Shares:
    """What is added to the artifact: one table and one figure, or none where no movement has shares."""

    tables: list[Table]
    figures: list[Figure]
    notes: list[str]


@dataclass
class _Tally:
    """Of one generator: <X_l, v_l> of every cut (the image first), and |d|^2, image by image; which cuts let something by."""

    pairings: list[list[Tensor]]
    square: list[Tensor]
    leaking: set[int]


def shares(encoder: nn.Module, task: Task, seed: int, level: float, resamples: int) -> Shares:
    """Each cut's share of the last layer's Lie derivative d, per generator.

    Between cuts l - 1 and l the defect is e_l = J_l X_{l-1} - X_l, X_l = d/dt Γ of what flows through cut l and X_0 the
    tangent of the image. Carried to the end it is d_l = J_{>l} e_l, and the sum of all is d. With v_l = J_{>l}^T d, from one
    backward pass,

        share_l = <d_l, d> / |d|^2 = (<X_{l-1}, v_{l-1}> - <X_l, v_l>) / |d|^2,     sums over images

    possibly negative, adding up to one. A layer is a cut only where all that reaches the end flows through it:
    <tangent of the layer, v_l> = <tangent of the end, d> for every image, else it is left out and named.
    """
    run, order = _runner(encoder, task)
    layers = sorted((one for one in task.reader.layers if one.source in order), key=lambda layer: order.index(layer.source))
    elsewhere = sorted({layer.source for layer in task.reader.layers} - set(order))
    sources = list(dict.fromkeys(layer.source for layer in layers))
    of = {source: [layer for layer in layers if layer.source == source] for source in sources}
    tallies = [_Tally([[] for _ in range(len(sources) + 1)], [], set()) for _ in task.generators]
    undefined: dict[int, set[str]] = {}
    for x, tangents in task.batches(task.generators):
        for g, (chosen, moving) in enumerate(zip(task.generators, tangents, strict=True)):
            raw, slopes = pushed(functools.partial(_chosen, run, sources), task.module, x, moving)
            flows = [_declared(task, chosen, of[s], values) for s, values in zip(sources, raw, strict=True)]
            undefined.setdefault(g, set()).update(s for s, f in zip(sources, flows, strict=True) if f is None)
            if flows[-1] is None:
                continue
            d = _flat(of[sources[-1]], slopes[-1]) - flows[-1]
            cotangents = _pulled(run, sources, of, x, d)
            _pair(tallies[g], moving, slopes, flows, cotangents, d, of, sources)
    found = _report(task, sources, tallies, undefined, seed, level, resamples)
    said = [f"Not cuts, since another forward pass makes them: {', '.join(elsewhere)}."] if elsewhere else []
    return Shares(found.tables, found.figures, [*said, *found.notes])


def _declared(task: Task, chosen: Generator, layers: list[Layer], raw: Tensor) -> Tensor | None:
    """d/dt Γ of all that one layer gives, flat; None where a part of it has no declared action."""
    how = (task.group, task.image_size, task.action, task.difference)
    parts = [declared_flow(layer.of(raw), layer, chosen, *how)[0] for layer in layers]
    known = [part.flatten(1) for part in parts if part is not None]
    return torch.cat(known, dim=1) if len(known) == len(parts) else None


def _chosen(run: Any, sources: list[str], images: Tensor) -> list[Tensor]:
    given = run(images)
    return [given[source] for source in sources]


def _runner(encoder: nn.Module, task: Task) -> tuple[Any, list[str]]:
    """images -> what every layer gives as it stands; and the layers in the order in which they finish."""
    root = encoder.module if isinstance(encoder, Wrapped) else encoder
    named = [layer.source for layer in task.reader.layers if layer.source not in BUILTIN]
    assert isinstance(root, nn.Module)
    capture = Capture(root, list(dict.fromkeys(named)))
    wanted = {layer.source for layer in task.reader.layers}

    def core(images: Tensor) -> dict[str, Any]:
        if isinstance(encoder, Encoder) and type(encoder).forward is Encoder.forward:
            fibres = encoder.fibres(images)
            return {"fibres": fibres, "h": encoder.pool(fibres)}
        if isinstance(encoder, Encoder) and wanted == {"fibres"}:
            return {"fibres": encoder.fibres(images)}
        return {"h": encoder(images)}

    def run(images: Tensor) -> dict[str, Any]:
        output, seen = capture(images, core)
        return {**seen, **{name: value for name, value in output.items() if name in wanted}}

    x, _ = next(iter(task.batches([])))
    with torch.no_grad():
        order = list(run(x[:1]))
    return run, order


def _flat(layers: list[Layer], raw: Tensor) -> Tensor:
    """All of a layer's output, in the order of its parts (patches, then prefix)."""
    return torch.cat([layer.of(raw).flatten(1) for layer in layers], dim=1)


def _pulled(run: Any, sources: list[str], of: dict[str, list[Layer]], x: Tensor, d: Tensor) -> list[Tensor]:
    """v_l = J_{>l}^T d for the image and every cut, flat; zero where the end does not depend on it."""
    with torch.enable_grad(), forward_mode():
        image = x.detach().clone().requires_grad_()
        # A model may overwrite its input, and a leaf may not be overwritten.
        given = run(image + 0)
        values = [image, *(given[source] for source in sources)]
        end = _flat(of[sources[-1]], values[-1])
        gradients = torch.autograd.grad(end, values, d.to(end), allow_unused=True)
    found = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)]
    return [found[0].flatten(1), *(_flat(of[s], g) for s, g in zip(sources, found[1:], strict=True))]


def _pair(
    tally: _Tally, moving: Tensor, slopes: Any, flows: list[Tensor | None], cotangents: list[Tensor], d: Tensor,
    of: dict[str, list[Layer]], sources: list[str],
) -> None:
    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() * b.double()).sum(dim=1).cpu()

    tally.square.append(dot(d, d))
    tally.pairings[0].append(dot(moving.flatten(1), cotangents[0]))
    end = _flat(of[sources[-1]], slopes[-1])
    whole, size = dot(end, d), (dot(end, end) * dot(d, d)).sqrt()
    for i, source in enumerate(sources):
        flown, pulled = _flat(of[source], slopes[i]), cotangents[i + 1]
        here, scale = dot(flown, pulled), size + (dot(flown, flown) * dot(pulled, pulled)).sqrt()
        if bool(((here - whole).abs() > CLOSE * scale).any()):
            tally.leaking.add(i)
        declared = flows[i]
        tally.pairings[i + 1].append(torch.zeros(len(d), dtype=torch.float64) if declared is None else dot(declared, pulled))


def _report(
    task: Task, sources: list[str], tallies: list[_Tally], undefined: dict[int, set[str]], seed: int, level: float,
    resamples: int,
) -> Shares:
    columns: dict[str, list[Any]] = {name: [] for name in ("movement", "layer", "share", "low", "high")}
    notes = []
    for g, (chosen, tally) in enumerate(zip(task.generators, tallies, strict=True)):
        without = undefined.get(g, set())
        if sources[-1] in without:
            notes.append(f"No shares for {chosen.name}: {sources[-1]} has no declared action of it.")
            continue
        square = torch.cat(tally.square)
        cuts = [i for i, s in enumerate(sources) if i not in tally.leaking and s not in without]
        if not float(square.sum()) > 0:
            notes.append(f"No shares for {chosen.name}: the derivative of {sources[-1]} is zero.")
            continue
        if leaks := [sources[i] for i in sorted(tally.leaking)]:
            notes.append(f"Not cuts for {chosen.name}, since something reaches the end around them: {', '.join(leaks)}.")
        if without:
            notes.append(f"Not cuts for {chosen.name}, since no action is declared there: {', '.join(sorted(without))}.")
        pairings = torch.stack([torch.cat(tally.pairings[i]) for i in (0, *(c + 1 for c in cuts))], dim=1)
        parts = pairings[:, :-1] - pairings[:, 1:]
        total = _added(parts, square, chosen)
        drawn = resampled_sums(torch.cat([parts, square[:, None]], dim=1), seed, resamples)
        low, high = interval(drawn[:, :-1] / drawn[:, -1:], level)
        for i, cut in enumerate(cuts):
            values = (chosen.name, sources[cut], float(total[i]), float(low[i]), float(high[i]))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    about = (
        "A layer's share is what is lost between the cut before it (the image first) and itself; negative where it undoes what "
        "others did. The shares of a movement add up to one."
    )
    table = Table("shares", f"Shares of the derivative of {sources[-1]}", columns, about)
    figure = Figure(
        "shares", "bar", f"Where the derivative of {sources[-1]} is made",
        f"{about} {level:.0%} percentile bootstrap over images.",
        "shares", "layer", "share", "movement", "low", "high", x_label="layer", y_label="share",
    )
    return Shares([table], [figure], notes) if len(table) else Shares([], [], notes)


def _added(parts: Tensor, square: Tensor, chosen: Generator) -> Tensor:
    """The shares, once it is clear that they add up to one: that is forward mode against backward mode."""
    total = parts.sum(dim=0) / square.sum()
    if not abs(float(total.sum()) - 1) < SUM * max(1.0, float(total.abs().max())):
        raise ArithmeticError(f"shares of {chosen.name} add up to {float(total.sum()):.6g}, not to one")
    return total
