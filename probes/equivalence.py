"""equivalence: A-SSL's and H-SSL's loss on the same draws, their gradients layer by layer, and what makes them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl import modes
from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.objectives.critics import BYOL, SimSiam
from geomssl.objectives.fibres import Space, draw_one
from geomssl.objectives.hssl import HSSL
from geomssl.probes import subject
from geomssl.probes.assurance import bootstrap_mean
from geomssl.progress import track
from geomssl.seeding import generator, seeded
from geomssl.transforms.groups import PointGroup

Mode = Literal["train", "eval"]
Pair = tuple[Tensor, ...]
# nodes of the Gauss-Legendre rule along the path; fewer batches than this say little of their own spread
NODES, FEWEST = 16, 5
# two losses this near, relative to their size, differ by rounding alone in float64
ROUNDING = 1e-10


class Bundles(NamedTuple):
    """What both losses compare, two views (N, |g0| C) each: a of f(T_g1 x), f(T_g2 x) at g0, h of f(x) at g^-1 g0."""

    a: Pair
    h: Pair


def bundles(objective: HSSL, encoder: Encoder, images: Tensor, draw: Tensor) -> Bundles:
    """Both bundles on the same draws (g0, g1, g2), draw (N, 3) uniform; f(T_g1 x) and f(T_g2 x) in one joint pass.

    Raises GeomsslError (reason "no-exact-form") where T_g and the move of the fibres do not belong together.
    """
    space: Space = objective.ahead(encoder, images)
    home, places = draw_one(draw[:, 0], len(space)), objective.pair(space, draw[:, 1:])
    moved = torch.cat([objective.moved(encoder, images, space, place) for place in places])
    augmented = objective.line(encoder.fibres(moved)).chunk(2)
    plain = objective.line(encoder.fibres(images))
    return Bundles(
        tuple(space.take(line, home) for line in augmented),
        tuple(space.take(plain, space.after(place, home)) for place in places),
    )


def explained(objective: HSSL, found: Bundles) -> Tensor:
    """What d = a - h does to the loss: the integral over t in [0, 1] of grad L(h + t d) . d, image by image, (N,).

    Gauss-Legendre with 16 nodes; its sum is L(a) - L(h) up to the rule's error. The head takes part as it stands, in train
    mode with the statistics of each point of the path.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    start = [h.detach() for h in found.h]
    ways = [a.detach() - h for a, h in zip(found.a, start, strict=True)]
    total = torch.zeros(len(start[0]), dtype=start[0].dtype, device=start[0].device)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        point = tuple((h + float(node) * d).requires_grad_() for h, d in zip(start, ways, strict=True))
        with torch.enable_grad():
            slopes = torch.autograd.grad(objective.critic(objective.over_bundles, point), point)
        total += float(weight) * torch.stack([(s * d).sum(dim=1) for s, d in zip(slopes, ways, strict=True)]).sum(dim=0)
    return total


class Compared(NamedTuple):
    """Of one batch in one mode. gradients_a, gradients_h: a layer's gradient, flat, by its name.

    gap = loss_a - loss_h = defect + rest. defect: `explained`, with the statistics of BatchNorm in the backbone frozen at those
    of the un-augmented pass (train) or the running ones (eval). moved: ||d|| / ||h - mean|| there.
    """

    loss_a: float
    loss_h: float
    defect: float
    moved: float
    gradients_a: dict[str, Tensor]
    gradients_h: dict[str, Tensor]

    @property
    def gap(self) -> float:
        return self.loss_a - self.loss_h

    @property
    def rest(self) -> float:
        return self.gap - self.defect


def compare(objective: HSSL, encoder: Encoder, images: Tensor, draw: Tensor, mode: Mode) -> Compared:
    """Both losses and their gradients on one batch; running statistics move in train mode, so call it inside `untouched`."""
    layers = _layers(objective, encoder)
    parameters = [p for group in layers.values() for p in group]
    for module in (encoder, objective):
        module.train(mode == "train")
    with torch.enable_grad():
        found = bundles(objective, encoder, images, draw)
        losses = [objective.critic(objective.over_bundles, pair) for pair in found]
        slopes = [torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True) for loss in losses]
    with torch.no_grad():
        if mode == "train":
            with _frozen(encoder, images):
                found = bundles(objective, encoder, images, draw)
        defect = explained(objective, found).sum()
        apart = torch.cat([a - h for a, h in zip(*found, strict=True)]).norm()
        spread = torch.cat([h - h.mean(dim=0) for h in found.h]).norm()
    by_layer = [_by_layer(layers, [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, of, strict=True)])
                for of in slopes]  # fmt: skip
    moved = float(apart / spread) if float(spread) > 0 else 0.0
    return Compared(float(losses[0].detach()), float(losses[1].detach()), float(defect), moved, *by_layer)


def _layers(objective: HSSL, encoder: Encoder) -> dict[str, list[Tensor]]:
    """Trained tensors by the module that owns them, the encoder's first."""
    found: dict[str, list[Tensor]] = {}
    for prefix, module in (("encoder", encoder), ("head", objective.over_bundles), ("critic", objective.critic)):
        for name, parameter in module.named_parameters():
            found.setdefault(f"{prefix}.{name}".rpartition(".")[0], []).append(parameter)
    return found


def _by_layer(layers: dict[str, list[Tensor]], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    rest = iter(gradients)
    return {name: torch.cat([next(rest).flatten() for _ in group]) for name, group in layers.items()}


@contextmanager
def _frozen(encoder: Encoder, images: Tensor) -> Iterator[None]:
    """In eval mode, with every BatchNorm's statistics set to those that the un-augmented images have in train mode."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        axes = [0, *range(2, given[0].dim())]
        seen[module] = given[0].mean(dim=axes), given[0].var(dim=axes, correction=0)

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        encoder.fibres(images)
    finally:
        for handle in handles:
            handle.remove()
    for module, (mean, var) in seen.items():
        module.running_mean.copy_(mean)  # type: ignore[operator]
        module.running_var.copy_(var)  # type: ignore[operator]
    encoder.eval()
    yield
    encoder.train()


@contextmanager
def untouched(*modules: nn.Module, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """The modules in that dtype with gradients on; modes, flags, dtype and buffers are as before after it."""
    kinds = {module: next((p.dtype for p in module.parameters()), torch.get_default_dtype()) for module in modules}
    own = modes.of(*modules)
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    buffers = [(module, {k: v.clone() for k, v in module.named_buffers()}) for module in modules]
    try:
        for module in modules:
            module.to(dtype).requires_grad_(True)
        yield
    finally:
        for module, kind in kinds.items():
            module.to(kind)
        for module, kept in buffers:
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        modes.restore(own)


class Options(subject.Options):
    """Settings of the equivalence probe."""

    group: Literal["rotation", "translation", "scale", "p4"] | None = Field(
        None, description="transformation  [default: the run's own, else what the encoder's fibres carry]"
    )
    batch: int | None = Field(None, ge=2, description="images a batch  [default: the run's own, else 32; at most 32]")
    batches: int = Field(5, ge=1, le=10_000, description="batches at least; more passes, with new draws, where one has fewer")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Both losses of the run's own head on the same draws, in train and in eval mode, in float64."""
    subject.need(2, "a contrastive batch")
    notes: list[str] = []
    indices = subject.choose(options)
    dtype = torch.float32 if subject.device.type == "mps" else torch.float64
    with torch.no_grad():
        shape = tuple(subject.encoder.fibres(subject.images(indices[:2])).shape)
    with seeded(options.seed, "equivalence"):
        objective = measured(subject, options, shape, notes)
        rows: dict[str, list[Compared]] = {"train": [], "eval": []}
        modes: tuple[Mode, ...] = ("train", "eval")
        with untouched(subject.encoder, objective, dtype=dtype):
            for number, chosen in _batches(subject, indices, options):
                images = subject.images(chosen).to(dtype)
                draw = torch.rand(len(chosen), 3, generator=generator(options.seed, "equivalence-draw", number))
                for mode in modes:
                    rows[mode].append(compare(objective, subject.encoder, images, draw.to(subject.device), mode))
            space = objective.ahead(subject.encoder, images)
            exact = _exact(objective, subject.encoder, space, (images.shape[2], images.shape[3]))
    if not exact:
        notes.append("T_g resamples pixels for some elements of this group: there, no backbone can be exact.")
    return _artifact(subject, options, objective, rows, notes, dtype)


def measured(subject: subject.Subject, options: Options, shape: tuple[int, ...], notes: list[str]) -> HSSL:
    """The run's objective with matched draws: its own where it is H-SSL, else its projector under InfoNCE."""
    own = subject.objective if isinstance(subject.objective, HSSL) else None
    group: str = options.group or (own.config.group if own else _carried(subject.encoder, shape))
    if group == "scale":
        raise GeomsslError(
            "the equivalence for scale, which has no exact form", "rotation, translation or p4", reason="no-exact-form"
        )
    head = own.over_bundles if own else subject.need_projector("equivalence")
    if own is None:
        known = {k: v for k, v in subject.trained.items() if k in ("beta", "denominator")}
        settings: dict[str, Any] = {**known, "projector": (1,)}
        notes.append("The run is no H-SSL: its projector stands on single fibres here, under InfoNCE.")
    else:
        settings = own.config.model_dump()
    settings |= {"group": group, "draws": "matched", "positives": "both", "method": "infonce", "critic": "cosine", "wrap": True}
    if group != "translation":
        settings["base_counts"] = "total"
    objective = HSSL(HSSL.Config.model_validate(settings), subject.encoder, 0, subject.encoder.in_channels)
    if objective.config.fibres == 1:
        objective.projector = head
    else:
        objective.head = head
    if own is not None:
        objective.critic = own.critic
        if own.config.group == "translation" and not own.config.wrap:
            notes.append("The run kept its patches inside the map; here they go over the edges, or no shift were exact.")
    if isinstance(objective.critic, BYOL):
        copied = SimSiam(1, 1)
        copied.predictor, objective.critic = objective.critic.predictor, copied
        notes.append("BYOL is measured with its own predictor and the online network, without gradient, as the target.")
    return objective.to(subject.device)


def _carried(encoder: Any, shape: tuple[int, ...]) -> Literal["rotation", "translation", "scale"]:
    if getattr(encoder, "scales", None) is not None:
        return "scale"
    return "rotation" if isinstance(encoder.group, PointGroup) or shape[2] > 1 else "translation"


def _exact(objective: HSSL, encoder: Encoder, space: Space, size: tuple[int, int]) -> bool:
    group, params = objective.elements(encoder, size, space, torch.arange(len(space), device=space.bundles.device))
    return bool(group.is_exact(params.double(), size).all())


def _batches(subject: subject.Subject, indices: Tensor, options: Options) -> Iterator[tuple[int, Tensor]]:
    """Numbered batches of a seeded order, the last smaller one left out; pass after pass until there are enough."""
    size = min(options.batch or min(subject.trained.get("batch_size") or 32, 32), len(indices))
    per_pass = min(len(indices) // size, options.batches)
    for number in track(range(options.batches), "equivalence"):
        order = torch.randperm(len(indices), generator=generator(options.seed, "equivalence-order", number // per_pass))
        yield number, indices[order[number % per_pass * size :][:size]]


def _artifact(
    subject: subject.Subject, options: Options, objective: HSSL, rows: dict[str, list[Compared]], notes: list[str],
    dtype: torch.dtype,
) -> Artifact:
    group, train = objective.config.group, rows["train"]
    batch_rows = [
        {
            "batch": k + 1, "mode": mode, "loss_a": row.loss_a, "loss_h": row.loss_h, "gap": row.gap, "defect": row.defect,
            "rest": row.rest, "moved": row.moved, **_angles(_whole(row.gradients_a), _whole(row.gradients_h)),
        }
        for mode in rows for k, row in enumerate(rows[mode])
    ]
    layers = [_layer(name, rows, options.seed) for name in train[0].gradients_a]
    metrics = [m for mode in rows for m in _metrics(mode, [r for r in batch_rows if r["mode"] == mode], options.seed)]
    value = {m.name: m.value for m in metrics}
    largest = max(abs(row.gap) / max(1.0, abs(row.loss_h)) for of in rows.values() for row in of)
    cosine = value["gradient_cosine"]
    agree = "" if cosine is None else f"; the gradients' cosine is {cosine:.6f}"
    if largest <= ROUNDING and dtype == torch.float64:
        headline = (
            f"On the same draws of {group}, A-SSL's and H-SSL's losses are equal to rounding in train and eval mode "
            f"(relative difference at most {largest:.1g}){agree}."
        )
    else:
        headline = (
            f"On the same draws of {group}, A-SSL's loss {value['loss_a']:.4g} is {value['gap']:+.3g} from H-SSL's "
            f"{value['loss_h']:.4g}: the backbone's defect explains {value['defect']:+.3g}, BatchNorm and mode the rest "
            f"({value['rest']:+.3g}){agree}."
        )
    notes += [
        f"All in {str(dtype).removeprefix('torch.')}; the model is as it was afterwards, running statistics among it.",
        "Intervals tell of another draw of batches and of (g0, g1, g2); where the split holds fewer batches than there are, "
        "they hold its images fixed.",
    ]
    return Artifact(
        probe="equivalence",
        title="A-SSL against H-SSL on the same draws",
        headline=headline,
        definition=(
            "loss_a: the loss of f(T_g1 x)(g0) against f(T_g2 x)(g0), both in one joint pass; loss_h: of z(g1^-1 g0) against "
            "z(g2^-1 g0), z = f(x), one pass; the same g0, g1, g2. gap = loss_a - loss_h = defect + rest. defect: the integral "
            "of grad L . d along d = f(T_g x) - Gamma_g f(x), read at g0, with the backbone's BatchNorm frozen at the "
            "statistics of f(x) in train mode, at the running ones in eval mode. rest: what BatchNorm's other statistics and "
            "the mode (dropout) do. gradient_gap: ||grad L_A - grad L_H|| / ||grad L_H||. Both losses are equal for an exactly "
            "equivariant backbone (Keller et al., Eq. 2, 3)."
        ),
        metrics=metrics,
        tables=[
            Table("layers", "Gradients, layer by layer", {k: [row[k] for row in layers] for k in layers[0]},
                  "Means over batches; low and high bound the cosine in train mode. None where a gradient vanishes."),
            _curve(layers),
            Table("batches", "Every batch", {k: [row[k] for row in batch_rows] for k in batch_rows[0]},
                  "Both modes see the same images and draws."),
        ],
        figures=[
            Figure("cosine", "bar", "cos(grad L_A, grad L_H) layer by layer",
                   "1 everywhere: training by either loss takes the same step.", "curve", "layer", "cosine", "mode", "low",
                   "high", x_label="layer", y_label="cosine"),
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )  # fmt: skip


def _whole(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(gradients.values()))


def _angles(a: Tensor, h: Tensor, scale: float = 0.0) -> dict[str, float | None]:
    """Cosine and relative gap; None where one of them is rounding against `scale`, the size of the whole gradient."""
    sizes = [float(v.norm()) for v in (a, h)]
    if min(sizes) <= max(1e-12 * scale, 1e-300):
        return {"gradient_cosine": None, "gradient_gap": None}
    return {"gradient_cosine": float(a @ h) / (sizes[0] * sizes[1]), "gradient_gap": float((a - h).norm()) / sizes[1]}


def _layer(name: str, rows: dict[str, list[Compared]], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": name, "parameters": rows["train"][0].gradients_a[name].numel()}
    for mode, of in rows.items():
        each = [_angles(r.gradients_a[name], r.gradients_h[name], float(_whole(r.gradients_h).norm())) for r in of]
        for key, short in (("gradient_cosine", "cosine"), ("gradient_gap", "gap")):
            values = [one[key] for one in each if one[key] is not None]
            found[f"{short}_{mode}"] = sum(values) / len(values) if values else None  # type: ignore[arg-type]
            if key == "gradient_cosine":
                low, high = _interval(values, seed)
                found[f"low_{mode}"], found[f"high_{mode}"] = low, high
    return found


def _interval(values: Sequence[float | None], seed: int) -> tuple[float | None, float | None]:
    if len(values) < FEWEST:
        return None, None
    low, high = bootstrap_mean(torch.tensor(values, dtype=torch.float64), seed)
    return float(low), float(high)


def _curve(layers: list[dict[str, Any]]) -> Table:
    modes = ("train", "eval")
    columns: dict[str, list[Any]] = {
        "layer": [row["layer"] for _ in modes for row in layers], "mode": [mode for mode in modes for _ in layers],
    }
    for key in ("cosine", "low", "high"):
        columns[key] = [row[f"{key}_{mode}"] for mode in modes for row in layers]
    kept = [k for k, v in enumerate(columns["cosine"]) if v is not None]
    return Table("curve", "Cosine, layer by layer", {key: [values[k] for k in kept] for key, values in columns.items()})


# what each figure is, and which way is nearer to an exact backbone
ABOUT: dict[str, tuple[Literal["lower", "higher"] | None, str]] = {
    "loss_a": (None, "A-SSL's loss"),
    "loss_h": (None, "H-SSL's loss"),
    "gap": (None, "loss_a - loss_h"),
    "defect": (None, "what the backbone's defect explains of the gap"),
    "rest": (None, "what it does not: BatchNorm and mode (in eval mode, the error of the integral)"),
    "gradient_cosine": ("higher", "cos(grad L_A, grad L_H) of all weights"),
    "gradient_gap": ("lower", "||grad L_A - grad L_H|| / ||grad L_H||"),
    "moved": ("lower", "||f(T_g x) - Gamma_g f(x)|| at g0 against the spread of f(x), statistics frozen"),
}


def _metrics(mode: str, rows: list[dict[str, Any]], seed: int) -> list[Metric]:
    """Means over batches with their interval; names end in _eval in eval mode."""
    found = []
    for name, (better, about) in ABOUT.items():
        values = [row[name] for row in rows if row[name] is not None]
        label, text = name if mode == "train" else f"{name}_eval", f"{about}, {mode} mode"
        if not values:
            found.append(Metric(label, None, reason="a gradient vanishes", better=better, about=text))
            continue
        low, high = _interval(values, seed)
        interval = None if low is None or high is None else Interval(
            low, high, f"percentile bootstrap over {len(values)} batches, 95 %"
        )
        reason = None if interval else f"{len(values)} batches: too few for an interval over batches"
        found.append(Metric(label, sum(values) / len(values), len(values), interval, reason, better=better, about=text))
    return found
