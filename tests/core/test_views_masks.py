"""The masks of `views`: which surface a ray meets first, against the closed form for spheres, and against the pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl import data
from geomssl.data.raytrace import BACKGROUND, HALF_WIDTH, PART, backdrop, camera, owners, render


def spheres(centres: Tensor, radii: Tensor) -> Tensor:
    """Parts (1, K, PART): both exponents 1 make the unit ball of the 2-norm."""
    parts = torch.zeros(1, len(radii), PART, dtype=torch.float64)
    parts[0, :, :3], parts[0, :, 3:5], parts[0, :, 5:8] = radii[:, None], 1.0, centres
    parts[0, :, 8:] = 0.9
    return parts


def met(centres: Tensor, radii: Tensor, view: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first sphere on the ray of each pixel by the quadratic formula, -1 for none; and how near an edge is."""
    eye, forward, right, up = (vector[0] for vector in camera(view))
    line = ((torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1) * HALF_WIDTH
    down, across = torch.meshgrid(line, line, indexing="ij")
    rays = forward + across[..., None] * right - down[..., None] * up
    towards = eye - centres
    a = rays.square().sum(dim=-1)
    b = torch.einsum("hwc,kc->khw", rays, towards)
    c = towards.square().sum(dim=1) - radii.square()
    room = b.square() - a * c[:, None, None]
    depth = torch.where(room > 0, (-b - room.clamp(min=0).sqrt()) / a, torch.inf)
    first = torch.where(depth.isinf().all(dim=0), -1, depth.argmin(dim=0))
    return first, room.abs().amin(dim=0)


def test_spheres_are_met_where_the_quadratic_formula_says() -> None:
    """Two that overlap in the picture, one of them behind the other; pixels on an edge to rounding are left out."""
    draw = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(6):
        centres = torch.rand(3, 3, generator=draw, dtype=torch.float64) - 0.5
        radii = 0.2 + 0.3 * torch.rand(3, generator=draw, dtype=torch.float64)
        view = torch.tensor([[360.0, 60.0, 0.0, 0.0]], dtype=torch.float64) * torch.rand(1, 4, generator=draw)
        view[0, 2] = 4.0
        wanted, edge = met(centres, radii, view, 33)
        found = owners(spheres(centres, radii), view, 33)[0]
        clear = edge > 1e-3
        assert torch.equal(found[clear], wanted[clear])
        compared += len(wanted[clear].unique())
    assert compared > 12, "several spheres are seen"


def test_depth_decides_and_not_the_order_of_the_parts() -> None:
    centres = torch.tensor([[0.6, 0.0, 0.0], [-0.6, 0.0, 0.0]], dtype=torch.float64)
    parts = spheres(centres, torch.tensor([0.3, 0.3], dtype=torch.float64))
    front, back = (torch.tensor([[azimuth, 0.0, 4.0, 0.0]], dtype=torch.float64) for azimuth in (0.0, 180.0))
    assert owners(parts, front, 33)[0, 16, 16] == 0
    assert owners(parts, back, 33)[0, 16, 16] == 1


def test_outside_its_parts_a_picture_is_its_backdrop_and_inside_it_is_not() -> None:
    source = data.load("views", "test", n=24, size=32)
    rows = torch.arange(24)
    objects, view, grounds = source.objects.float(), source.view.float(), source.backgrounds.float()
    seen, picture = owners(objects, view, 32), render(objects, view, grounds, 32)
    assert grounds.shape[1] == BACKGROUND
    change = (picture - backdrop(grounds, 32)).abs().sum(dim=1)
    assert (change[seen < 0] < 1e-5).all(), "an edge fades on its inner side"
    assert (change[seen >= 0] > 1e-3).double().mean() > 0.97
    masks = source.masks(rows)
    assert torch.equal(masks > 0, seen >= 0)
    for i in rows.tolist():
        assert set(masks[i].unique().tolist()) <= {0, int(source.labels[i]) + 1}
    assert (masks > 0).flatten(1).any(dim=1).all(), "every object is in its picture"


def test_masks_go_with_their_images() -> None:
    source = data.load("views", "test", n=24, size=32)
    rows = torch.tensor([7, 0, 20])
    assert torch.equal(source.some(rows).masks(torch.tensor([2, 0])), source.masks(rows[[2, 0]]))
    assert source.some(rows).regions == source.regions == ("background", *(f"class {k}" for k in range(8)))


def test_many_pictures_are_the_same_as_few(monkeypatch) -> None:
    source = data.load("views", "test", n=24, size=32)
    objects, view = source.objects.float(), source.view.float()
    whole = owners(objects, view, 32)
    monkeypatch.setattr("geomssl.data.raytrace.CACHED", 5 * 32**2)
    assert torch.equal(owners(objects, view, 32), whole)
