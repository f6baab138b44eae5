"""equivariance: how far f(T_g x) is from the declared action Γ_g on f(x), per layer and element, with bounds of the defect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from geomssl.artifact import Artifact, Table
from geomssl.data.rendered import Rendered
from geomssl.encoders.base import Encoder
from geomssl.encoders.geometry import Geometry
from geomssl.encoders.geometry import geometry as located
from geomssl.errors import GeomsslError
from geomssl.probes import subject
from geomssl.probes.account import Account, account, sweep_table
from geomssl.probes.boundary import on_the_torus
from geomssl.probes.defect import CHANCE, Bounds, DefectBounds, EquivarianceError, evaluating, modules_of
from geomssl.probes.elements import elements, label, labels, spoken
from geomssl.probes.fitted import FittedAction, fit_action
from geomssl.probes.inputs import BANDWIDTHS, SPECTRUM, Inputs, like, natural, pictures, rendered
from geomssl.probes.judge import DEGENERATE, REFERENCES, Settings, croppable, judge, unmixed
from geomssl.probes.layers import Reader, declare, read, single
from geomssl.probes.scales import by_factors
from geomssl.registry import load_attribute
from geomssl.seeding import generator
from geomssl.sums import key
from geomssl.transforms.actions import Action, ActionFunction
from geomssl.transforms.base import Transform
from geomssl.transforms.groups import Scales, Translations

__all__ = [
    "Bounds", "DefectBounds", "EquivarianceError", "FittedAction", "NotEquivariant", "Options", "Prepared",
    "assert_equivariant", "elements", "equivariance_error", "equivariance_errors", "fit_action", "label", "prepare", "probe",
]

# Images that assert_equivariant draws; docs/equivariance.md says what they decide.
ENOUGH = 32

Model = Callable[[Tensor], Tensor]
Boundary = Literal["none", "crop", "circular"]
Declaration = str | ActionFunction | Action


def equivariance_error(
    model: Model,
    images: Tensor | Rendered,
    transform: Transform,
    params: Tensor,
    action: Declaration = "regular",
    *,
    geometry: Geometry | None = None,
    boundary: Literal["none", "crop"] = "none",
    reference: Rendered | None = None,
    clusters: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int = 256,
    share: float = DEGENERATE,
) -> EquivarianceError:
    """Equivariance error of a model for each element: how far f(T_g x) is from Γ_g f(x), over the features' own spread.

        total_g = sqrt(sum |f(T_g x) - Γ_g f(x)|^2 / sum |Γ_g f(x) - mean|^2),   sums over images, mean over images

    0: moves as declared; sqrt(2): no better than the features of another image; see EquivarianceError for the rest.
    model:  anything from images to features (n, ...), in the dtype of `images`. An Encoder is measured at its fibres; pass
            `encoder.forward` for h. Modules are put in eval mode (those that it is, is bound to or closes over) and back.
    images: (n, C, H, W) floats, n >= 2; or rendered pictures (geomssl.data.rendered), whose T_g is exact.
    params: (E, P): the elements, such as transform.elements()[1:].
    action: "regular", "spatial", "trivial", or your own; Γ_g is affine. geometry: for what is counted in pixels; None reads
            it off the layers. share: features whose variance is under this share of their squared norm are degenerate.
    boundary: "crop" judges only feature pixels that see the image alone. reference: pictures with the spectrum of the
            images (Fields.like), on which r is measured; None leaves r and the bounds NaN where something is resampled.
    clusters: values (n,); images with equal values are resampled together.
    Intervals: bootstrap over images (assurance.bootstrap_ratio) with the mean held. Raises GeomsslError for input that cannot
    be judged.
    """
    inputs = _given(model, images, transform, params, reference)
    f: Model = model.fibres if isinstance(model, Encoder) else model
    with evaluating(model), torch.no_grad():
        first = inputs.of(slice(0, 1))
        features = f(first)
        if geometry is None and isinstance(action, str) and features.dim() >= 4:
            geometry = located(f, first)
        reader = single(f, features, geometry)
        declared = [declare(action, transform, layer, getattr(model, "group", None))[0] for layer in reader.layers]
        settings = Settings(level, resamples, seed, batch_size, share)
        found, _ = judge(reader, inputs, transform, params, declared, boundary, clusters, settings)
        return found[0]


def equivariance_errors(
    model: nn.Module,
    images: Tensor | Rendered,
    transform: Transform,
    params: Tensor,
    action: Declaration = "auto",
    layers: Sequence[str] = ("all",),
    *,
    boundary: Literal["none", "crop"] = "none",
    reference: Rendered | None = None,
    clusters: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int = 256,
    share: float = DEGENERATE,
) -> dict[str, EquivarianceError]:
    """equivariance_error of many layers of a module, which runs once for all of them; by the name of the layer.

    layers: names from named_modules(), wild cards ("layer*"), "all"; "fibres" and "h" of an Encoder. Tokens (N, T, D) are
    read on their patch grid, those before the patches apart as "LAYER[prefix]". action "auto": regular where the encoder
    declares this group, else spatial for maps, trivial for vectors. low_any holds over elements and layers together.
    """
    inputs = _given(model, images, transform, params, reference)
    with evaluating(model), torch.no_grad():
        reader, _ = read(model, layers, inputs.of(slice(0, 1)))
        declared = [declare(action, transform, layer, getattr(model, "group", None))[0] for layer in reader.layers]
        settings = Settings(level, resamples, seed, batch_size, share)
        found, _ = judge(reader, inputs, transform, params, declared, boundary, clusters, settings)
    return {layer.name: one for layer, one in zip(reader.layers, found, strict=True)}


def _given(
    model: Any, images: Tensor | Rendered, transform: Transform, params: Tensor, reference: Rendered | None
) -> Inputs:
    """The inputs, once images and elements are known to be such as can be judged."""
    if params.dim() != 2 or params.shape[1] != len(transform.parameters) or not len(params):
        raise GeomsslError(
            f"params {tuple(params.shape)} of {transform.name}", f"(E, {len(transform.parameters)}), one row an element",
            reason="bad-parameters",
        )
    if isinstance(images, Rendered):
        weight = next((p for m in modules_of(model) for p in m.parameters()), torch.zeros(()))
        _admit(len(images), model, images.channels)
        return rendered(images, transform, weight.dtype, weight.device)
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < 2:
        raise GeomsslError(
            f"images {images.dtype} {tuple(images.shape)}", "float (n, C, H, W) of at least 2x2 pixels", reason="bad-images"
        )
    _admit(len(images), model, images.shape[1])
    return natural(lambda rows: images[rows], len(images), reference)


def _admit(n: int, model: Any, channels: int) -> None:
    if n < 2:
        raise GeomsslError("one image" if n else "no images", "at least 2", reason="too-few-images")
    expected = getattr(model, "in_channels", channels)
    if isinstance(model, Encoder) and expected != channels:
        raise GeomsslError(f"images of {channels} channels", f"{expected}, as the model", reason="bad-images")


class NotEquivariant(AssertionError):
    """What assert_equivariant raises. found: what was measured.  judged: False where nothing could be told from it."""

    def __init__(self, said: str, found: EquivarianceError, judged: bool) -> None:
        super().__init__(said)
        self.found, self.judged = found, judged


def assert_equivariant(
    model: Model,
    transform: Transform,
    tolerance: float,
    images: Tensor | Rendered | None = None,
    action: Declaration = "regular",
    params: Tensor | None = None,
    *,
    n: int = ENOUGH,
    in_channels: int | None = None,
    size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> EquivarianceError:
    """Raise NotEquivariant, an AssertionError, unless the upper bound of the defect is under `tolerance` for every element.

    The message names the limit, the worst element, its total error with the interval, and whether that holds the limit.
    images: None draws n seeded ones in [0, 1], half coarse and half fine noise, of in_channels (the model's own, else 3) and
    size (the model's own, else 32), in the model's dtype. params: None stands for every element but the identity of a finite
    group, else 16 seeded draws. options: those of equivariance_error. Degenerate features, and pairs that resample without a
    bound (see `reference`, or pass rendered images), are refused by it too (judged = False): nothing can be told from them.
    Returns what was measured.
    """
    if images is None:
        images = _noise(model, n, in_channels or int(getattr(model, "in_channels", 3)), size, seed)
    shape = (images.size, images.size) if isinstance(images, Rendered) else (images.shape[-2], images.shape[-1])
    params = elements(transform, shape, 16, seed) if params is None else params
    found = equivariance_error(model, images, transform, params, action, seed=seed, **options)
    names = labels(transform, params)
    for bad, why in (
        (found.degenerate, "the features hardly vary from image to image, so nothing can be told (a constant would pass)"),
        (
            found.bounds.high.isnan(),
            "the transform or its action resamples there, so the error is not the model's alone; pass rendered images, such "
            "as geomssl.data.rendered.Fields",
        ),
    ):
        if bool(bad.any()):
            where = ", ".join(name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad)
            said = f"equivariance under {transform.name} cannot be asserted at {where}: {why}"
            raise NotEquivariant(said, found, judged=False)
    worst = int(found.bounds.high.argmax())
    low, high, r = (float(v[worst]) for v in (found.bounds.low, found.bounds.high, found.resampling))
    if not high < tolerance:
        open_ = f"; its interval holds the limit: {'smoother pictures' if r > 0 else 'more images (n)'} may narrow it"
        raise NotEquivariant(
            f"not equivariant under {transform.name}: expected total error < {tolerance:g} at every element, found "
            f"{float(found.total[worst]):.3g} {'with the defect within ' if r > 0 else ''}[{low:.3g}, {high:.3g}] at "
            f"{names[worst]} (chance {CHANCE:.3g}, action size {float(found.action_size[worst]):.3g}, {found.n} images)"
            f"{open_ if low < tolerance else ''}", found, judged=True
        )
    return found


def _noise(model: Model, n: int, channels: int, size: int | None, seed: int) -> Tensor:
    side = size or int(getattr(model, "size", 32))
    draw = generator(seed, "assert-equivariant")
    coarse = torch.rand(n, channels, -(-side // 4), -(-side // 4), generator=draw)
    coarse = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    images = (coarse + torch.rand(n, channels, side, side, generator=draw)) / 2
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return images if weight is None else images.to(weight.device, weight.dtype)


class Options(subject.Options):
    """Settings of the equivariance probe."""

    transform: str = Field("c4", description='the transform: c4, d4, translations, "rotate(±30)", a policy, ...')
    action: str = Field(
        "auto",
        description="how features are declared to move: regular, spatial, trivial, or package.module:function of your own; "
        "auto: regular where the encoder has this group, matched scales where its fibres stand for them, else spatial for "
        "maps, else trivial",
    )
    layer: tuple[str, ...] = Field(
        ("fibres",), description="which features: fibres, h, names of modules, wild cards (layer*), or all; all in one pass"
    )
    images: Literal["data", "fields", "phantoms"] = Field(
        "data", description="natural images of the data set, or rendered pictures, on which every T_g is exact"
    )
    bandwidth: float = Field(0.25, gt=0, lt=0.5, description="highest frequency of rendered pictures, cycles per pixel")
    sweep: bool = Field(False, description="measure rendered fields of several bandwidths too")
    boundary: Boundary = Field(
        "none",
        description="none: all feature pixels; crop: those that see the image alone; circular: wrapped images and shifts",
    )
    references: int = Field(
        REFERENCES, ge=0, le=4096, description="rendered pictures on which r, what resampling does, is measured; 0: not at all"
    )
    cluster: str | None = Field(None, description="a factor of the data set, or label: resample whole clusters of images")
    draws: int = Field(16, ge=1, le=4096, description="elements to draw where there are more, or infinitely many")
    step: int = Field(1, ge=1, description="shifts are multiples of so many pixels")
    level: float = Field(0.95, gt=0, lt=1, description="two-sided level of the pointwise intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")
    share: float = Field(
        DEGENERATE, ge=0, lt=1, description="features with less variance than this share of their squared norm are degenerate"
    )

    @field_validator("layer", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Prepared:
    """A measurement that has only to be run: what the options make of a subject. reasons: why each layer has its action."""

    reader: Reader
    inputs: Inputs
    transform: Transform
    params: Tensor
    actions: list[Action]
    reasons: list[str]
    boundary: Boundary
    clusters: Tensor | None
    indices: Tensor | None
    settings: Settings
    remarks: list[str]

    def run(self, reader: Reader | None = None, **changes: Any) -> tuple[list[EquivarianceError], list[str]]:
        """Every layer, and remarks on r; or what another reader gives in its place. changes: of the settings."""
        return judge(
            reader or self.reader, self.inputs, self.transform, self.params, self.actions, self.boundary, self.clusters,
            replace(self.settings, **changes),
        )


def prepare(subject: subject.Subject, options: Options) -> Prepared:
    """Inputs, elements, layers and their actions. Call it, and run what it gives, in eval mode and without gradients."""
    transform, grid = spoken(options.transform)
    transform = on_the_torus(transform) if options.boundary == "circular" else transform
    scales = _own_scales(subject.encoder, options, transform)
    transform, grid = (transform, grid) if scales is None else (scales, None)
    inputs, clusters, indices = _inputs(subject, options, transform)
    params = elements(transform, inputs.size, options.draws, options.seed, options.step) if grid is None else grid
    settings = Settings(
        options.level, options.resamples, options.seed, subject.batch_size, options.share, subject.memory, options.references
    )
    reader, remarks = read(subject.encoder, options.layer, inputs.of(slice(0, 1)))
    if options.action in ("regular", "spatial") and not any(layer.maps for layer in reader.layers):
        raise GeomsslError(
            f"the {options.action} action on {reader.layers[0].name}, a vector", "action trivial, or layer fibres",
            reason="no-action",
        )
    chosen = load_attribute(options.action, "action") if ":" in options.action else options.action
    declared = [declare(chosen, transform, layer, getattr(subject.encoder, "group", None)) for layer in reader.layers]
    if scales is not None:
        reader, declared = by_factors(reader, declared, scales, inputs.size, options.boundary)
    actions = [act for act, _ in declared]
    if options.boundary == "crop":
        reader, actions, left = croppable(reader, actions, transform, params, inputs, options.layer)
        remarks += left
    return Prepared(
        reader, inputs, transform, params, actions, list(dict.fromkeys(why for _, why in declared)), options.boundary, clusters,
        indices, settings, remarks,
    )


def _own_scales(encoder: Any, options: Options, transform: Transform) -> Scales | None:
    """The factors for which the encoder's fibres stand, where "scales" are measured under the action "auto".

    The word alone is a policy elsewhere, and means the encoder's own list here.
    """
    own, alone = getattr(encoder, "scales", None), options.transform.strip().lower() == "scales"
    if not isinstance(own, Scales) or not (alone or isinstance(transform, Scales)) or options.action != "auto":
        return None
    if isinstance(transform, Scales) and transform.factors != own.factors:
        said = ", ".join(f"{factor:g}" for factor in own.factors)
        raise GeomsslError(
            f"--transform {options.transform} of an encoder whose fibres stand for {said}", "--transform scales",
            reason="no-action",
        )
    return own


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Equivariance error of an encoder's layers for every element of a transform, under a declared action of its features."""
    with evaluating(subject.encoder), torch.no_grad():
        ready = prepare(subject, options)
        found, unknown = ready.run()
        swept = None
        if options.sweep:
            swept = _sweep(
                subject, options, ready.reader, ready.transform, ready.params, ready.actions, ready.settings
            )
        inputs = ready.inputs
        apart = unmixed(ready.reader, inputs.of(slice(0, 1)), found)
    judged = [index for index, no in enumerate(apart) if not no]
    layers, actions = [ready.reader.layers[i] for i in judged], [ready.actions[i] for i in judged]
    rows = torch.arange(inputs.n) if ready.indices is None else ready.indices
    told = Account(
        ready.transform, ready.params.cpu(), labels(ready.transform, ready.params), layers, actions, ready.reasons,
        [found[i] for i in judged], inputs, options.boundary, options.level, options.share, [*ready.remarks, *unknown], swept,
        subject.dtype, key(rows, len(found[0].numerators)),
        [layer for layer, no in zip(ready.reader.layers, apart, strict=True) if no],
    )
    provenance = {
        **subject.provenance, "action": ", ".join(dict.fromkeys(act.name for act in actions)),
        "transform": options.transform, "images": inputs.name, "n": inputs.n, "layers": [layer.name for layer in layers],
    }
    if ready.indices is None:
        provenance["images_sha256"] = None
    return account(told, options.model_dump(mode="json"), provenance)


def _inputs(
    subject: subject.Subject, options: Options, transform: Transform
) -> tuple[Inputs, Tensor | None, Tensor | None]:
    """The inputs that the options name, the cluster of each, and the images' indices in the split where they are natural."""
    wraps = isinstance(transform, Translations) and transform.wrap
    if options.images != "data":
        if options.cluster is not None:
            raise GeomsslError(f"--cluster {options.cluster} of {options.images}", "--images data", reason="no-factor")
        made = pictures(
            options.images, options.n or 256, subject.channels, subject.source.size, options.bandwidth,
            wraps or options.boundary == "circular", options.seed,
        )
        return rendered(made, transform, subject.dtype, subject.device), None, None
    subject.need(2, "an equivariance error")
    if subject.source.size < 2:
        raise GeomsslError(
            f"images of {subject.source.size}x{subject.source.size} pixels", "at least 2x2 pixels", reason="bad-images"
        )
    indices = subject.choose(options)
    clusters = None if options.cluster is None else _factor(subject, options.cluster)[indices]
    exact = getattr(subject.source, "rendered", None)
    if exact is not None:
        return rendered(exact, transform, subject.dtype, subject.device, indices), clusters, indices
    spread = indices[:: max(1, len(indices) // SPECTRUM)]
    reference = like(subject.images(spread), options.references, wraps, options.seed) if options.references > 1 else None
    return natural(lambda rows: subject.images(indices[rows]), len(indices), reference), clusters, indices


def _factor(subject: subject.Subject, name: str) -> Tensor:
    known = dict(subject.source.factors)
    if subject.source.labels is not None:
        known["label"] = subject.source.labels
    if name not in known:
        raise GeomsslError(
            f"--cluster {name} of {subject.source.name}", f"one of {', '.join(known) or 'none: it has no factors'}",
            reason="no-factor",
        )
    return known[name]


def _sweep(
    subject: subject.Subject, options: Options, reader: Reader, transform: Transform, params: Tensor, actions: list[Action],
    settings: Settings,
) -> Table:
    """Rendered fields of several bandwidths: what remains when resampling no longer matters."""
    rows = []
    wraps = (isinstance(transform, Translations) and transform.wrap) or options.boundary == "circular"
    side = subject.source.size
    for bandwidth in BANDWIDTHS:
        if bandwidth * side < 2:
            continue
        made = pictures("fields", REFERENCES, subject.channels, side, bandwidth, wraps, options.seed)
        inputs = rendered(made, transform, subject.dtype, subject.device)
        few = replace(settings, resamples=min(settings.resamples, 1000))
        rows.append((bandwidth, judge(reader, inputs, transform, params, actions, options.boundary, None, few)[0]))
    if not rows:
        raise GeomsslError(f"--sweep on pictures of {side}x{side} pixels", "at least 5x5 pixels", reason="bad-images")
    return sweep_table(reader.layers, labels(transform, params), rows)
