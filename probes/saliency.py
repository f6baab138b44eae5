"""saliency: maps of the class that a linear classifier reads from the features, by FullGrad or another method, and how true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import attribution, checks, pictures, subject
from geomssl.probes.assurance import METHOD, bootstrap_mean, bootstrap_ratio
from geomssl.probes.fullgrad import FullGradient, fullgrad
from geomssl.probes.linear import check_frozen, fit, train_sample
from geomssl.progress import track
from geomssl.seeding import generator

__all__ = ["FullGradient", "Options", "fullgrad", "probe"]

MOST = 256
# far above float32 rounding, far below what anyone sees on a map
COMPLETE = 1e-4
# the sum over a path is not exact: this much may be missing before a note asks for more steps
INTEGRATED = 0.05
UNSIGNED = {"fullgrad", "saliency", "gradcam"}
CAUTION = "A map tells where the output is sensitive, scaled image by image; it does not tell that a place is a cause."
QUALITY = (
    "infidelity = E (b <I, a> - (f(x) - f(x - I)))^2 / E (f(x) - f(x - I))^2 for Gaussian I, with the best factor b of each "
    "image. max-sensitivity = max ||a(x + d) - a(x)|| / ||a(x)|| over 10 draws of d (Yeh et al. 2019)."
)


class Length(nn.Module):
    """||h||: what is explained where there are no classes. Homogeneous, so that it adds no bias of its own."""

    def forward(self, h: Tensor) -> Tensor:
        return h.square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny).sqrt()


COLUMNS = 5

class Options(subject.Options):
    """Settings of the saliency probe."""

    method: str = Field("fullgrad", description=", ".join(attribution.METHODS))
    target: Literal["predicted", "label"] = Field("predicted", description="whose logit to explain: predicted or true class")
    show: int = Field(10, ge=1, le=40, description="images in the picture, one of each class before a second of any")
    side: int = Field(64, ge=8, le=256, description="pixels of a tile in the picture")
    train_n: int | None = Field(None, ge=2, description="training images for the classifier; all of them when not given")
    judged: int = Field(32, ge=0, description="images for infidelity and max-sensitivity; 0 leaves both out")
    noise: float = Field(0.1, gt=0, description="standard deviation of the noise of infidelity, in pixel values")
    radius: float = Field(0.02, gt=0, description="largest change of a pixel for max-sensitivity")
    baseline: float = Field(0.0, ge=0, le=1, description="pixel of the baseline (integrated-gradients, occlusion)")
    steps: int = Field(50, ge=1, description="steps of the path (integrated-gradients)")
    window: int | None = Field(None, ge=1, description="side of the square  [default: an eighth of the image] (occlusion)")
    layer: str | None = Field(None, description="layer of the maps  [default: the last that has any] (gradcam)")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        return attribution.check(method)

    def settings(self) -> attribution.Settings:
        # the network that is explained is (encoder, classifier)
        layer = None if self.layer is None else f"0.{self.layer}"
        return attribution.Settings(self.baseline, self.steps, self.window, layer)


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Maps through the encoder and a linear classifier fitted on its frozen features, for at most 256 images.

    The classifier is the one of the linear probe. Without labels the length of h is explained in its place.
    """
    check_frozen(subject.encoder)
    subject.need(1, "a saliency map")
    notes: list[str] = []
    indices = _indices(subject, options, notes)
    labels = None if subject.source.labels is None else subject.source.labels.cpu()[indices]
    model, classes = _explained(subject, options, notes)
    if options.method == "gradcam" and options.layer is not None:
        # refused by the name that the encoder knows it by
        attribution.map_layer(subject.encoder, subject.images(indices[:1]), options.layer)
    targets, values = _targets(subject, model, classes, labels, indices, options)
    quality = _quality(subject, model, targets, indices, options, notes)
    shown = _shown(labels, len(indices), options.show)
    if options.method != "fullgrad":
        return _by_captum(subject, model, classes, labels, targets, values, indices, shown, quality, options, notes)
    gathered = _gathered([
        fullgrad(model, images, targets[rows])
        for rows, images in _batches(subject, indices, "full gradients")
    ])
    worst, middle = float(gathered.residual.max()), float(gathered.residual.median())
    if worst > COMPLETE:
        notes.append(
            f"The parts leave out up to {worst:.2g} of the function: some operation between the modules adds a constant "
            "that no module owns. The maps miss that part."
        )
    notes.append(CAUTION)
    picture = _picture(subject.images(indices[shown]), gathered.saliency[shown], options.side)
    terms = gathered.input_term.abs() + gathered.bias_terms.abs().sum(dim=1)
    share = gathered.input_term.abs() / terms.clamp_min(1e-300)
    what = _what(classes, options)
    return Artifact(
        probe="saliency",
        title="FullGrad maps",
        headline=(
            f"FullGrad accounts for {what} of {len(indices)} images up to a relative residual of {worst:.1e} "
            f"(median {middle:.1e}), spread over {len(gathered.layers)} biases and the input."
        ),
        definition=(
            "f(x) = <df/dx, x> + sum_l <df/dy_l, b_l> with b_l = y_l - J_l x_l, the implicit bias of every module call. "
            "residual = |f - the sum of all parts| / the sum of their sizes: rounding, where the maps are complete. "
            "map = psi(df/dx x) + sum_l psi(df/dy_l b_l), psi(v) = sum over channels of |v| scaled to [0, 1] over one image's "
            "channels and places, enlarged bilinearly. " + QUALITY
        ),
        metrics=[
            _identity("residual_max", worst, len(indices), "largest relative residual over the images"),
            _identity("residual_median", middle, len(indices), "median relative residual over the images"),
            _share_metric(share, options.seed),
            *quality,
        ],
        tables=[_images_table(gathered, terms, indices, labels, targets, classes, subject), _layers_table(gathered, terms)],
        figures=[
            _maps_figure(indices, labels, targets, shown, classes, subject),
            Figure(
                "shares", "bar", "Where the output comes from", "Mean share of the sizes of all parts, by module call.",
                "layers", "part", "share", x_label="part", y_label="mean share",
            ),
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
        files={"maps.png": picture},
    )


def _indices(subject: subject.Subject, options: Options, notes: list[str]) -> Tensor:
    if options.n is None and len(subject.source) > MOST:
        notes.append(f"Maps of {MOST} images, drawn from {len(subject.source)}; --n asks for more.")
        options = options.model_copy(update={"n": MOST})
    return subject.choose(options)


def _explained(subject: subject.Subject, options: Options, notes: list[str]) -> tuple[nn.Module, Tensor | None]:
    """The network that is explained, and the class of each of its outputs; None where it gives the length of h."""
    if subject.source.labels is None:
        notes.append(f"{subject.source.name} has no labels: the maps explain the length of h, not a class.")
        return nn.Sequential(subject.encoder, Length()), None
    known = train_sample(subject, options.train_n, options.seed)
    labels = subject.need_labels("a classifier", "train").cpu()[known]
    classifier = fit(subject.features(known, "h", "train"), labels, options.seed)
    return nn.Sequential(subject.encoder, classifier.module().to(subject.device, subject.dtype)), classifier.classes


def _what(classes: Tensor | None, options: Options) -> str:
    of = "true" if options.target == "label" else "predicted"
    return "the length of h" if classes is None else f"the logit of the {of} class"


def _targets(
    subject: subject.Subject, model: nn.Module, classes: Tensor | None, labels: Tensor | None, indices: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """The output column that is explained for each image, and its value, (n,) both."""
    head = model[1]  # type: ignore[index]
    h = subject.features(indices).to(subject.device, subject.dtype)
    with torch.no_grad():
        outputs = head(h).cpu()
    targets = outputs.argmax(dim=1)
    if classes is not None and options.target == "label":
        assert labels is not None
        unseen = int((~torch.isin(labels, classes)).sum())
        if unseen:
            given = f"{unseen} images of classes that the training split does not have"
            raise GeomsslError(given, "--target predicted", reason="unseen-class")
        targets = torch.searchsorted(classes, labels)
    return targets, outputs.gather(1, targets[:, None])[:, 0]


def _batches(subject: subject.Subject, indices: Tensor, what: str) -> Iterator[tuple[slice, Tensor]]:
    """(rows, images) batch by batch."""
    start = 0
    for chunk, images in subject.batches(indices, what):
        yield slice(start, start + len(chunk)), images
        start += len(chunk)


def _quality(
    subject: subject.Subject, model: nn.Module, targets: Tensor, indices: Tensor, options: Options, notes: list[str]
) -> list[Metric]:
    """Infidelity and max-sensitivity of the method, over a seeded draw of the images."""
    if not options.judged:
        return []
    n = min(options.judged, len(indices))
    rows = torch.randperm(len(indices), generator=generator(options.seed, "saliency-judged"))[:n].sort().values
    left: list[Tensor] = []
    blank: list[Tensor] = []
    moved: list[Tensor] = []
    for number, part in enumerate(track(rows.split(subject.batch_size), "infidelity and sensitivity")):
        images, aim = subject.images(indices[part]), targets[part]
        given, seed = options.settings(), options.seed + number
        found = attribution.attribution(options.method, model, images, aim, given)
        for where, values in ((left, found), (blank, torch.zeros_like(found))):
            where.append(attribution.infidelity(
                options.method, model, images, aim, values, noise=options.noise, seed=seed
            ))
        moved.append(attribution.max_sensitivity(
            options.method, model, images, aim, given, radius=options.radius, seed=seed
        ))
    if options.method in UNSIGNED:
        notes.append("The map is never negative: what raises the output and what lowers it look alike; infidelity shows it.")
    if n < len(indices):
        notes.append(f"Infidelity and max-sensitivity are of {n} of the {len(indices)} images.")
    return _quality_metrics(torch.cat(left), torch.cat(blank), torch.cat(moved), options.seed)


def _quality_metrics(left: Tensor, blank: Tensor, moved: Tensor, seed: int) -> list[Metric]:
    n = len(left)
    about = "share of the output's response to noise in the pixels that the map leaves unexplained; a blank map leaves 1"
    what = "largest relative change of the map under a small change of the pixels, mean over images"
    method = "percentile bootstrap over images, the noise held fixed, 95 %"
    share = interval = None
    if n > 1 and float(blank.sum()) > 0:
        low, high = bootstrap_ratio(left[:, None], blank[:, None], seed)
        if bool(torch.isfinite(low + high).all()):
            interval = Interval(float(low[0]) ** 2, float(high[0]) ** 2, f"{METHOD}, the noise held fixed, 95 %")
    if float(blank.sum()) > 0:
        share = float(left.sum() / blank.sum())
    spread = None
    if n > 1:
        least, most = bootstrap_mean(moved, seed)
        spread = Interval(float(least), float(most), method)
    return [
        Metric(
            "infidelity", share, n, interval, None if interval else
            "one image" if n == 1 else "the output does not answer to noise", better="lower", about=about,
        ),
        Metric("max_sensitivity", float(moved.mean()), n, spread, None if spread else "one image", better="lower", about=what),
    ]


def _by_captum(
    subject: subject.Subject, model: nn.Module, classes: Tensor | None, labels: Tensor | None, targets: Tensor, values: Tensor,
    indices: Tensor, shown: Tensor, quality: list[Metric], options: Options, notes: list[str],
) -> Artifact:
    """The artifact of a method other than FullGrad."""
    sums, sizes, maps = [], [], []
    for rows, images in _batches(subject, indices, options.method):
        found = attribution.attribution(options.method, model, images, targets[rows], options.settings()).double().cpu()
        checks.matrix(found.flatten(1), f"maps of {options.method}")
        sums.append(found.sum(dim=(1, 2, 3)))
        sizes.append(found.abs().sum(dim=(1, 2, 3)))
        maps.append(found.abs().sum(dim=1).float())
    total, size = torch.cat(sums), torch.cat(sizes)
    metrics, headline = [], ""
    columns = _identified(indices, labels, targets, classes, subject)
    columns |= {"value": values.double().tolist(), "sum": total.tolist(), "sum_of_sizes": size.tolist()}
    if options.method == "integrated-gradients":
        with torch.no_grad():
            base = model(torch.full_like(subject.images(indices[:1]), options.baseline)).cpu().double()[0]
        residual = (values.double() - base[targets] - total).abs() / size.clamp_min(1e-300)
        columns["residual"] = residual.tolist()
        worst = float(residual.max())
        metrics.append(_identity("residual_max", worst, len(indices), "largest relative residual of completeness"))
        headline = f", complete up to a relative residual of {worst:.1e}"
        if worst > INTEGRATED:
            notes.append(f"{options.steps} steps leave out up to {worst:.2g} of the sum of sizes: use more --steps.")
    if quality and quality[0].value is not None:
        headline += f"; they leave {quality[0].value:.0%} of its response to noise unexplained"
    notes.append(CAUTION)
    return Artifact(
        probe="saliency",
        title="Attribution maps",
        headline=f"Maps of {_what(classes, options)} by {options.method}, for {len(indices)} images{headline}.",
        definition=f"{options.method}: {attribution.METHODS[options.method]}. "
        "The map is the size of the attributions, summed over channels. " + QUALITY,
        metrics=[*metrics, *quality],
        tables=[Table("images", "Every image", columns, "sum: of the attributions; sum_of_sizes: of their sizes.")],
        figures=[_maps_figure(indices, labels, targets, shown, classes, subject)],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
        files={"maps.png": _picture(subject.images(indices[shown]), torch.cat(maps)[shown], options.side)},
    )


def _gathered(parts: list[FullGradient]) -> FullGradient:
    """One decomposition of all batches, on the CPU. A bias that is zero for a whole batch has no column there."""
    layers = tuple(dict.fromkeys(name for part in parts for name in part.layers))
    columns = [
        torch.stack([
            part.bias_terms[:, part.layers.index(name)] if name in part.layers else torch.zeros_like(part.value)
            for name in layers
        ], dim=1) if layers else part.bias_terms
        for part in parts
    ]
    joined = {
        key: torch.cat([getattr(part, key) for part in parts]).cpu() for key in ("saliency", "input_term", "residual", "value")
    }
    for key, values in joined.items():
        checks.matrix(values.flatten(1) if values.dim() > 1 else values[:, None], f"FullGrad's {key.replace('_', ' ')}")
    return FullGradient(bias_terms=torch.cat(columns).cpu(), layers=layers, **joined)


def _shown(labels: Tensor | None, n: int, show: int) -> Tensor:
    """Positions of the images in the picture: the first of each class, then the second of each, and so on."""
    if labels is None:
        return torch.linspace(0, n - 1, min(show, n)).round().long()
    order = labels.argsort(stable=True)
    _, counts = labels.unique(return_counts=True)
    within = torch.cat([torch.arange(int(c)) for c in counts])
    return order[torch.argsort(within * (int(labels.max()) + 1) + labels[order], stable=True)][:show]


def _picture(images: Tensor, maps: Tensor, side: int) -> bytes:
    """Rows of COLUMNS images, under each row the maps laid over them, as PNG."""
    import matplotlib

    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    scaled = torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-30), 0)
    above = pictures.squares(images, side).expand(-1, 3, -1, -1)
    heat = pictures.squares(scaled[:, None], side)[:, 0]
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](heat.numpy())[..., :3]).permute(0, 3, 1, 2)
    below = 0.3 * above + 0.7 * colours.to(above)
    columns = min(COLUMNS, len(images))
    empty = above.new_zeros(-len(images) % columns, *above.shape[1:])
    rows = [torch.cat([tiles, empty]).unflatten(0, (-1, columns)) for tiles in (above, below)]
    return pictures.png(pictures.grid(torch.stack(rows, dim=1).flatten(0, 2), columns))


def _identity(name: str, value: float, n: int, about: str) -> Metric:
    return Metric(name, value, n, reason="an identity checked on every image, not an estimate", better="lower", about=about)


def _share_metric(share: Tensor, seed: int) -> Metric:
    about = "mean share of the input's own term in the sizes of all terms"
    if len(share) < 2:
        return Metric("input_share", float(share.mean()), len(share), reason="one image", about=about)
    low, high = bootstrap_mean(share, seed)
    interval = Interval(float(low), float(high), "percentile bootstrap over images, 95 %")
    return Metric("input_share", float(share.mean()), len(share), interval, about=about)


def _maps_figure(
    indices: Tensor, labels: Tensor | None, targets: Tensor, shown: Tensor, classes: Tensor | None, subject: subject.Subject
) -> Figure:
    return Figure(
        "maps", "image", "Images and their maps",
        "Above the image, below it the map laid over it (bright: sensitive), each scaled to its own range. "
        + _caption(indices[shown], labels, targets, shown, classes, subject),
        file="maps.png",
    )


def _caption(
    indices: Tensor, labels: Tensor | None, targets: Tensor, shown: Tensor, classes: Tensor | None,
    subject: subject.Subject,
) -> str:
    if labels is None or classes is None:
        return f"Images {', '.join(str(i) for i in indices.tolist())}."
    true, explained = subject.class_names(labels[shown]), subject.class_names(classes[targets[shown]])
    pairs = zip(indices.tolist(), true, explained, strict=True)
    return "Row by row (image: class, explained): " + "; ".join(f"{i}: {t}, {e}" for i, t, e in pairs) + "."


def _identified(
    indices: Tensor, labels: Tensor | None, targets: Tensor, classes: Tensor | None, subject: subject.Subject
) -> dict[str, list[Any]]:
    """The first columns of a table of images: which it is, and what is explained."""
    columns: dict[str, list[Any]] = {"index": indices.tolist()}
    if labels is not None and classes is not None:
        columns["label"] = subject.class_names(labels)
        columns["explained"] = subject.class_names(classes[targets])
    return columns


def _images_table(
    found: FullGradient, terms: Tensor, indices: Tensor, labels: Tensor | None, targets: Tensor, classes: Tensor | None,
    subject: subject.Subject,
) -> Table:
    columns = _identified(indices, labels, targets, classes, subject)
    columns |= {
        "value": found.value.tolist(),
        "input_term": found.input_term.tolist(),
        "bias_terms": found.bias_terms.sum(dim=1).tolist(),
        "sum_of_sizes": terms.tolist(),
        "residual": found.residual.tolist(),
    }
    about = "value = input_term + bias_terms, up to residual times sum_of_sizes."
    return Table("images", "The parts of every image", columns, about)


def _layers_table(found: FullGradient, terms: Tensor) -> Table:
    scale = terms.clamp_min(1e-300)
    parts = [("input", found.input_term), *zip(found.layers, found.bias_terms.T, strict=True)]
    return Table(
        "layers", "The parts by module call",
        {
            "part": [name for name, _ in parts],
            "share": [float((values.abs() / scale).mean()) for _, values in parts],
            "mean": [float(values.mean()) for _, values in parts],
        },
        "share: mean over images of |term| / sum of sizes. mean: mean of the term itself, in units of the output.",
    )
