"""The boundary: which feature pixels see the image alone, in f(T_g x) and in Γ_g f(x), not padding nor what moves in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geomssl.encoders.geometry import Geometry
from geomssl.errors import GeomsslError
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.compose import Compose
from geomssl.transforms.geometric import Geometric
from geomssl.transforms.groups import CyclicRotations, Dihedral, Flips, Translations
from geomssl.transforms.photometric import Photometric
from geomssl.transforms.sampling import frame

# Slack for coordinates that are whole but for rounding.
SLACK = 1e-6


def clean(
    action: Action, geometry: Geometry, params: Tensor, feature_size: Size, image_size: Size, framed: bool = True
) -> Tensor:
    """bool (E, h, w): the feature pixels u that are judged under `--boundary crop`.

    u is clean where (a) the receptive field at u stays on the image, so that f(T_g x)(u) sees no padding; (b) so does that
    of every feature pixel that Γ_g f(x) reads for u; (c) the field at u, carried back by g, stays on the image, so that
    T_g x has moved nothing in there. (c) falls away on rendered pictures (framed=False), which have no frame, and
    for wrapped shifts. GeomsslError where the receptive field or the places that Γ reads are not known.
    """
    if geometry.source != "layers":
        raise GeomsslError(
            "--boundary crop where the layers do not tell the receptive field", "--boundary none, or another layer",
            reason="no-field",
        )
    places = action.places(params, feature_size, image_size)
    if places is None:
        raise GeomsslError(
            f"--boundary crop under the action {action.name}", "the regular or the spatial action, which say where they read",
            reason="no-field",
        )
    params = params.double()
    y, x = frame(feature_size, params)
    (top, bottom), (left, right) = (geometry.clean(feature_size[a], image_size[a], a) for a in (0, 1))
    kept = ((y >= top) & (y <= bottom) & (x >= left) & (x <= right)).expand(len(params), -1, -1)
    for at, first, last in ((places[0], top, bottom), (places[1], left, right)):
        kept = kept & ((at + SLACK).floor() >= first) & ((at - SLACK).ceil() <= last)
    if not framed or (isinstance(action.transform, Translations) and action.transform.wrap):
        return kept
    if not all(math.isfinite(r) for r in geometry.reach):
        return kept
    for down in (-geometry.reach[0], geometry.reach[0]):
        for across in (-geometry.reach[1], geometry.reach[1]):
            corner = torch.stack(
                torch.broadcast_tensors(
                    geometry.offset[0] + geometry.stride[0] * y + down, geometry.offset[1] + geometry.stride[1] * x + across
                ),
                dim=-1,
            )
            came = _pulled(action.transform, corner.expand(len(params), -1, -1, -1), params, image_size)
            for axis in (0, 1):
                kept = kept & (came[..., axis] >= -SLACK) & (came[..., axis] <= image_size[axis] - 1 + SLACK)
    return kept


def refusal(layer: str, element: str, geometry: Geometry, image_size: Size) -> GeomsslError:
    """What is said where no feature pixel of a layer is clean."""
    reach = max(geometry.reach)
    sees = "every feature pixel sees the whole image"
    expected = "--boundary none, or a layer with a receptive field"
    if math.isfinite(reach):
        field = round(2 * reach + 1)
        sees = f"a feature pixel sees {field} pixels of {image_size[0]}x{image_size[1]}"
        expected = (
            f"images of more than {field} pixels ({math.ceil(field * math.sqrt(2))} where turned by 45°), an earlier layer, or "
            "--boundary none"
        )
    return GeomsslError(f"--boundary crop leaves nothing of {layer} at {element}: {sees}", expected, reason="no-field")


def on_the_torus(transform: Transform) -> Transform:
    """The transform of wrapped images that `--boundary circular` measures; GeomsslError where the torus has none such.

    Shifts wrap; turns by right angles and mirrors are maps of the torus as they are.
    """
    shifts = isinstance(transform, Translations) or transform.name == "translate"
    if shifts:
        return Translations(wrap=True)
    right = isinstance(transform, (CyclicRotations, Dihedral)) and transform.order in (1, 2, 4, 8)
    eighth = isinstance(transform, CyclicRotations) and transform.order == 8
    if isinstance(transform, (Flips, Photometric)) or (right and not eighth):
        return transform
    raise GeomsslError(
        f"--boundary circular under {transform.name}", "translations, c4, d4, flips or colour, which act on wrapped images",
        reason="no-torus",
    )


def _pulled(transform: Transform, coordinates: Tensor, params: Tensor, size: Size) -> Tensor:
    """Where output points (E, h, w, 2) come from; parts that move nothing leave them."""
    whole = Compose([transform])
    for part, columns in zip(reversed(whole.parts), reversed(whole.slices), strict=True):
        if isinstance(part, Geometric):
            coordinates = part.pull(coordinates, params[:, columns], size)
    return coordinates
