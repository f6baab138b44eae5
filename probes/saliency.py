"""saliency: FullGrad maps of the class that a linear classifier reads from the features, with what they leave out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import checks, pictures, subject
from geomssl.probes.assurance import bootstrap_mean
from geomssl.probes.fullgrad import FullGradient, fullgrad
from geomssl.probes.linear import check_frozen, fit, train_sample

__all__ = ["FullGradient", "Options", "fullgrad", "probe"]

MOST = 256
# far above float32 rounding, far below what anyone sees on a map
COMPLETE = 1e-4


class Length(nn.Module):
    """||h||: what is explained where there are no classes. Homogeneous, so that it adds no bias of its own."""

    def forward(self, h: Tensor) -> Tensor:
        return h.square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny).sqrt()


COLUMNS = 5

class Options(subject.Options):
    """Settings of the saliency probe."""

    target: Literal["predicted", "label"] = Field("predicted", description="whose logit to explain: predicted or true class")
    show: int = Field(10, ge=1, le=40, description="images in the picture, one of each class before a second of any")
    side: int = Field(64, ge=8, le=256, description="pixels of a tile in the picture")
    train_n: int | None = Field(None, ge=2, description="training images for the classifier; all of them when not given")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """FullGrad through the encoder and a linear classifier fitted on its frozen features, for at most 256 images.

    The classifier is the one of the linear probe. Without labels the length of h is explained in its place.
    """
    check_frozen(subject.encoder)
    subject.need(1, "a saliency map")
    notes: list[str] = []
    indices = _indices(subject, options, notes)
    labels = None if subject.source.labels is None else subject.source.labels.cpu()[indices]
    model, classes = _explained(subject, options, notes)
    parts, targets = _run(subject, model, classes, labels, indices, options)
    gathered = _gathered(parts)
    worst, middle = float(gathered.residual.max()), float(gathered.residual.median())
    if worst > COMPLETE:
        notes.append(
            f"The parts leave out up to {worst:.2g} of the function: some operation between the modules adds a constant "
            "that no module owns. The maps miss that part."
        )
    notes.append("A map tells where the output is sensitive, scaled image by image; it does not tell that a place is a cause.")
    shown = _shown(labels, len(indices), options.show)
    picture = _picture(subject.images(indices[shown]), gathered.saliency[shown], options.side)
    terms = gathered.input_term.abs() + gathered.bias_terms.abs().sum(dim=1)
    share = gathered.input_term.abs() / terms.clamp_min(1e-300)
    of = "true" if options.target == "label" else "predicted"
    what = "the length of h" if classes is None else f"the logit of the {of} class"
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
            "channels and places, enlarged bilinearly."
        ),
        metrics=[
            _identity("residual_max", worst, len(indices), "largest relative residual over the images"),
            _identity("residual_median", middle, len(indices), "median relative residual over the images"),
            _share_metric(share, options.seed),
        ],
        tables=[_images_table(gathered, terms, indices, labels, targets, classes, subject), _layers_table(gathered, terms)],
        figures=[
            Figure(
                "maps", "image", "Images and their maps",
                "Above the image, below it the map laid over it (bright: sensitive), each scaled to its own range. "
                + _caption(indices[shown], labels, targets, shown, classes, subject),
                file="maps.png",
            ),
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


def _run(
    subject: subject.Subject, model: nn.Module, classes: Tensor | None, labels: Tensor | None, indices: Tensor, options: Options
) -> tuple[list[FullGradient], Tensor | None]:
    """FullGrad batch by batch, and the output column that was explained for each image."""
    targets = None
    if classes is not None:
        head = model[1]  # type: ignore[index]
        h = subject.features(indices)
        with torch.no_grad():
            targets = head(h.to(head.weight)).argmax(dim=1).cpu()
        if options.target == "label":
            assert labels is not None
            unseen = int((~torch.isin(labels, classes)).sum())
            if unseen:
                given = f"{unseen} images of classes that the training split does not have"
                raise GeomsslError(given, "--target predicted", reason="unseen-class")
            targets = torch.searchsorted(classes, labels)
    parts, start = [], 0
    for chunk, images in subject.batches(indices, "full gradients"):
        chosen = None if targets is None else targets[start : start + len(chunk)]
        parts.append(fullgrad(model, images, chosen))
        start += len(chunk)
    return parts, targets


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


def _caption(
    indices: Tensor, labels: Tensor | None, targets: Tensor | None, shown: Tensor, classes: Tensor | None,
    subject: subject.Subject,
) -> str:
    if labels is None or targets is None or classes is None:
        return f"Images {', '.join(str(i) for i in indices.tolist())}."
    true, explained = subject.class_names(labels[shown]), subject.class_names(classes[targets[shown]])
    pairs = zip(indices.tolist(), true, explained, strict=True)
    return "Row by row (image: class, explained): " + "; ".join(f"{i}: {t}, {e}" for i, t, e in pairs) + "."


def _images_table(
    found: FullGradient, terms: Tensor, indices: Tensor, labels: Tensor | None, targets: Tensor | None, classes: Tensor | None,
    subject: subject.Subject,
) -> Table:
    columns: dict[str, list[Any]] = {"index": indices.tolist()}
    if labels is not None and targets is not None and classes is not None:
        columns["label"] = subject.class_names(labels)
        columns["explained"] = subject.class_names(classes[targets])
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
