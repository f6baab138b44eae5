"""geomssl features: features, labels and factors of a split as plain arrays, for work outside of geomssl."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from geomssl import files
from geomssl.commands.model import model_options, option, subject_of
from geomssl.errors import GeomsslError, nearest
from geomssl.progress import shown

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = ("h", "z", "fibres", "pixels")
BLOCK = 2**24
# numpy's names to those of the safetensors format
KINDS = {"float32": "F32", "float64": "F64", "int64": "I64"}


def gather(
    subject: Any, indices: Tensor, layers: tuple[str, ...], views: int = 0, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays by name, and what is to be known of them.

    h, z, fibres, pixels: features of the plain images.  view<k>_<layer>, view<k>_params: of view k = 1, 2, ... by the
    training's policy, and its parameters, one row an image.  indices: places in the split.  labels; factor_<name>: where
    the data set has them. All that is large lies in the subject's cache, on disk beyond its memory.
    """
    notes: list[str] = []
    found = {layer: subject.features(indices, layer) for layer in layers}
    about: dict[str, Any] = {"split": subject.source.split, "provenance": subject.provenance}
    if views:
        policy = subject.training_policy(notes)
        about["view_parameters"] = [p.name for p in policy.parameters]
        about["view_policy"] = policy.name
        for number in range(1, views + 1):
            view = (policy, seed, number)
            found |= {f"view{number}_{layer}": subject.features(indices, layer, view=view) for layer in layers}
            found[f"view{number}_params"] = subject.view_params(indices, "own", view)
    found["indices"] = indices
    if subject.source.labels is not None:
        found["labels"] = subject.source.labels.cpu()[indices]
        about["classes"] = [str(name) for name in subject.source.classes]
    found |= {f"factor_{name}": values.cpu()[indices] for name, values in subject.source.factors.items()}
    return found, {**about, "notes": notes + subject.projector_remarks()}


def write_npz(file: BinaryIO, arrays: dict[str, Tensor], about: dict[str, Any]) -> None:
    """numpy's own format: the arrays, `split`, lists of names as text, and `about` as JSON text. Nothing is pickled."""
    import numpy as np

    text = {key: np.array(value) for key, value in about.items() if isinstance(value, str | list) and value}
    plain = {name: values.numpy() for name, values in arrays.items()} | text | {"about": np.array(json.dumps(about))}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, values in plain.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(values), allow_pickle=False)


def write_safetensors(file: BinaryIO, arrays: dict[str, Tensor], about: dict[str, Any]) -> None:
    """safetensors: the arrays, and `about` as text in the header.

    Written here because the library's own writer holds a second copy of every tensor in memory.
    """
    header: dict[str, Any] = {"__metadata__": {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}}
    plain = {name: values.contiguous().numpy() for name, values in arrays.items()}
    end = 0
    for name, values in plain.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": KINDS[str(values.dtype)], "shape": list(values.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(struct.pack("<Q", len(head)) + head)
    for values in plain.values():
        flat = values.reshape(-1)
        step = max(1, BLOCK // values.itemsize)
        for start in range(0, flat.size, step):
            file.write(flat[start : start + step].astype(values.dtype.newbyteorder("<"), copy=False).tobytes())


WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}


def _features(**values: Any) -> None:
    from geomssl.probes.subject import Options

    out = Path(values["file"])
    if out.suffix not in WRITERS:
        said = f"a file name ending in {' or '.join(WRITERS)}"
        guess = nearest(out.suffix, WRITERS)
        raise GeomsslError(f"-o {out}", said, f"{out.stem}{guess}" if guess else None, reason="bad-value")
    files.check(out)
    with shown(not values["quiet"]):
        subject, _ = subject_of({**values, "out": str(out.parent)})
        layers = values["layers"] or (("h", "z") if subject.projector is not None else ("h",))
        indices = subject.choose(Options(n=values["n"], seed=values["seed"]))
        arrays, about = gather(subject, indices, tuple(dict.fromkeys(layers)), values["views"], values["seed"])
        with files.replacing(out) as file:
            WRITERS[out.suffix](file, arrays, about)
    for name, found in arrays.items():
        click.echo(f"  {name:<20} {' x '.join(map(str, found.shape))}  {str(found.dtype).removeprefix('torch.')}")
    for note in about["notes"]:
        click.echo(f"  note: {note}")
    click.echo(f"features: {out}")


features = click.Command(
    "features", callback=_features,
    params=[
        option("-o", "--out", "file", required=True, metavar="FILE", help="the file, .npz or .safetensors"),
        option(
            "--layer", "layers", multiple=True, type=click.Choice(LAYERS),
            help="what to write, may be repeated  [default: h, and z where there is a projector]",
        ),
        option("--views", type=click.IntRange(min=0), default=0, show_default=True,
               help="views of each image by the training's policy, with their parameters"),
        option("--n", type=click.IntRange(min=2), help="images to use  [default: all of the split]"),
        option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="seed of every draw"),
        *model_options(),
    ],
    help="Write the features of a split as plain arrays, with labels, factors, indices and provenance.\n\n"
    "Nothing in the file is pickled: numpy.load(FILE) and safetensors read it.\n\n\b\nExamples:\n"
    "  geomssl features --checkpoint run.pt -o f.npz\n"
    "  geomssl features --checkpoint run.pt -o f.safetensors --layer fibres --views 2",
)
