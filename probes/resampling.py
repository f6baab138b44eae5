"""r: how far resampling alone can move an equivariance error, measured where the exact transform is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from geomssl.data.rendered import Rendered
from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.defect import Distance, compare, precise, squares
from geomssl.progress import track
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.sinc import Window


@torch.no_grad()
def distances(
    features: Callable[[Tensor], list[Tensor]],
    pictures: Rendered,
    n: int,
    transform: Transform,
    params: Tensor,
    actions: Sequence[Action],
    masks: Sequence[Tensor | None],
    windows: Sequence[Window | None],
    exact: Sequence[Tensor],
    *,
    resampled: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Distance]:
    """r of every layer and element, on the first n rendered pictures x.

        r_g^2 = sum |[f(T~_g x) - f(T_g x)] - [Γ_g f(x) - Γ*_g f(x)]|^2 / sum |Γ_g f(x) - mean|^2

    T~ resamples pixels, T is rendered; Γ reads features bilinearly, Γ* by windowed sinc (Action.precise). With total
    measured by T~ and Γ, and the defect defined by T and Γ*, f(T~x) - Γf = [f(Tx) - Γ*f] + what stands above, so on these
    pictures |total - defect| <= r (triangle inequality in L2 over images). resampled: whether the images were (natural
    images); else the first bracket is zero. windows: the feature pixels that Γ* may read. exact: the elements (E,) of each
    layer at which nothing is resampled: r = 0.
    The limits are upper ends of intervals at (1 + level) / 2, so that total and r share the tail; high_any divides it by
    the number of elements of all layers. Raises GeomsslError (reason no-rendering) where T cannot be rendered.
    """
    count, n = len(params), min(n, len(pictures))
    if n < 2:
        raise GeomsslError(f"{n} rendered pictures", "at least 2", reason="too-few-images")
    size: Size = (pictures.size, pictures.size)
    needed = ~torch.stack([e.cpu() for e in exact]).all(dim=0)
    permutes = transform.is_exact(params, size).cpu()
    numerators = [torch.zeros(count, n, dtype=torch.float64) for _ in actions]
    denominators = [torch.ones(count, n, dtype=torch.float64) for _ in actions]

    def render(rows: Tensor, row_params: Tensor | None = None) -> Tensor:
        moving = None if row_params is None else transform
        return pictures.images(rows, moving, row_params, dtype=dtype, device=device)

    batches = torch.arange(n).split(batch_size)
    first = [features(render(rows)) for rows in batches]
    means = [
        torch.stack([fx.sum(dim=0, keepdim=True, dtype=torch.float64) for fx in layer]).sum(dim=0) / n
        for layer in zip(*first, strict=True)
    ]
    for rows, fx in zip(track(batches, "resampling"), first, strict=True):
        x = render(rows)
        for g in needed.nonzero().flatten().tolist():
            one, each = params[g : g + 1].to(x.device), params[g : g + 1].expand(len(rows), -1).to(x.device)
            gaps: list[Tensor] | None = None
            if resampled and not bool(permutes[g]):
                pairs = zip(features(transform(x, each)), features(render(rows, each.cpu())), strict=True)
                gaps = [precise(a) - precise(b) for a, b in pairs]
            for layer, (act, values, mean, mask, window) in enumerate(zip(actions, fx, means, masks, windows, strict=True)):
                if bool(exact[layer][g]):
                    continue
                spread = compare(act, values, mean, one, size, None if mask is None else mask[g : g + 1].to(x.device))
                off = precise(act.precise(values, each, size, window)) - spread.declared
                off = off if gaps is None else off + gaps[layer]
                numerators[layer][g, rows] = squares(spread.kept(off)).cpu()
                denominators[layer][g, rows] = spread.values.cpu()
    above, below = torch.cat(numerators).T.contiguous(), torch.cat(denominators).T.contiguous()
    share, columns = (1 + level) / 2, above.shape[1]
    high = bootstrap_ratio(above, below, seed, share, resamples)[1]
    high_any = bootstrap_ratio(above, below, seed, 1 - (1 - share) / columns, resamples)[1]
    r = (above.sum(dim=0) / below.sum(dim=0)).sqrt()
    return [Distance(*(values[a : a + count] for values in (r, high, high_any))) for a in range(0, columns, count)]
