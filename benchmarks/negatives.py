"""Nearest negatives of 20,480 anchors among 40,960 rows: ours against faiss, and against the bare matrix product."""

from __future__ import annotations

import torch
from harness import Row, duel

ANCHORS = 20_480


def main() -> list[Row]:
    import faiss

    from geomssl.probes.negatives import ROWS, nearest_negatives

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = []
    for width, share in ((128, "≥ 0.75"), (512, "≥ 0.9")):
        generator = torch.Generator().manual_seed(0)
        z1, z2 = (torch.nn.functional.normalize(torch.randn(ANCHORS, width, generator=generator)) for _ in range(2))
        both = torch.cat([z1, z2])
        index = faiss.IndexFlatIP(width)
        index.add(both.numpy())
        what = f"nearest negatives, {ANCHORS:,}×{width}"
        ours = lambda a=z1, b=z2: nearest_negatives(a, b)  # noqa: E731
        room = torch.empty(ROWS, 2 * ANCHORS)

        def product(a: torch.Tensor = z1, b: torch.Tensor = both, room: torch.Tensor = room) -> None:
            for chunk in a.split(ROWS):
                torch.mm(chunk, b.T, out=room[: len(chunk)])

        if width == 128:
            for k, why in ((3, "both views of i must be left out"), (1, "finds i itself")):
                search = lambda index=index, z=z1, k=k: index.search(z.numpy(), k)  # noqa: E731
                rows.append(duel(what, ours, f"faiss IndexFlatIP, k = {k} ({why})", search, rounds=3, target="≥ 1", warm=1))
        rows.append(duel(what, ours, "the bare float32 product", product, rounds=3, target=share, warm=1))
    return rows
