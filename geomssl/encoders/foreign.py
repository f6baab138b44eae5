"""Weights that others trained: a state dict read without executing anything, and mapped onto a module of ours or the user's."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geomssl.encoders.base import Normalise
from geomssl.errors import GeomsslError, nearest

# Where a file keeps its state dict, the first that is there. DINO evaluates its teacher.
PLACES = ("state_dict", "model_state_dict", "teacher", "model", "student", "encoder", "network", "net")
# A copy that follows another by averaging: taken only where nothing else fits as well.
FOLLOWERS = re.compile(r"(^|[._])(momentum|ema|target|offline|encoder_k|key_encoder)", re.IGNORECASE)

# Parts of a transformer that stand at the top: a built-in encoder that lacks one does not compute what the file's did.
TOKENS = {"pos_embed", "cls_token", "dist_token", "reg_token", "register_tokens"}

State = Mapping[str, Tensor]
Renaming = list[tuple[str, str]]

_SHORTCUT = (r"\.shortcut\.", ".downsample.")


def _indexed(first: int) -> Renaming:
    """Names of the children of a residual network, stage 1 being child `first`; not those inside a block's shortcut."""
    outside = r"(?<!downsample)(?<!shortcut)(^|\.)"
    return [
        (outside + r"0\.weight$", r"\1conv1.weight"),
        (outside + r"1\.(weight|bias|running_\w+|num_batches_tracked)$", r"\1bn1.\2"),
        *[(rf"(^|\.){first + k}\.(\d+)\.(?=conv|bn|downsample|shortcut)", rf"\1layer{1 + k}.\2.") for k in range(4)],
        _SHORTCUT,
    ]


_TORCHVISION_VIT: Renaming = [
    (r"class_token$", "cls_token"), (r"conv_proj\.", "patch_embed.proj."), (r"encoder\.pos_embedding$", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."), (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
]

# layout -> how its names become torchvision's (residual networks) or timm's (transformers), which ours are
LAYOUTS: dict[str, Renaming] = {
    "plain": [],
    "shortcut": [_SHORTCUT],
    # conv1, bn1, relu, maxpool, layer1, ...; and conv1, bn1, layer1, ...
    "children of torchvision's resnet": _indexed(4),
    "children of lightly's resnet": _indexed(2),
    "torchvision's transformer": _TORCHVISION_VIT,
}


@dataclass(frozen=True)
class Loaded:
    """What a load did: the layout and the prefix that fitted, how many tensors it took, and what it left, by first part."""

    layout: str
    prefix: str
    tensors: int
    ignored: dict[str, int]

    def __str__(self) -> str:
        left = ", ".join(f"{name} ({count})" for name, count in self.ignored.items())
        prefix = f"prefix {self.prefix!r}" if self.prefix else "no prefix"
        return f"{self.tensors} tensors loaded ({self.layout} names, {prefix}); ignored: {left or 'nothing'}"


def read(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a safetensors file, or in a .pt, .pth, .ckpt or .tar of torch, on the CPU; nothing in it is executed.

    It lies at the top or under state_dict, model_state_dict, teacher, model, student, encoder, network or net. Raises
    GeomsslError for no such file, one that is cut short or damaged, one with a pickled object, and one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise GeomsslError(f"no such file: {path}", "a file of weights", nearest(path.name, beside), reason="no-file")
    whole = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    found = _tensors(whole)
    places = [_tensors(whole.get(place)) for place in PLACES] if isinstance(whole, Mapping) else []
    if len(found) <= max(map(len, places), default=0):
        found = next((place for place in places if place), found)
    if not found:
        kind = ", ".join(map(str, list(whole)[:6])) if isinstance(whole, Mapping) else f"a {type(whole).__name__}"
        raise GeomsslError(
            f"{path} holds no state dict ({kind or 'nothing'})", f"one at the top, or under {', '.join(PLACES)}",
            reason="no-weights",
        )
    return found


def load(module: nn.Module, path: Path | str, prefix: str = "auto", builtin: bool = False) -> Loaded:
    """Read the file and load the module's weights from it: all of them, or nothing.

    prefix: "auto" tries every layout and every prefix that the file's own names offer (also where the module wraps its
    encoder under one name) and takes what fits the most names; "none" the names as they stand; else what stands before
    them. What the module lacks (heads, averaged copies) is left, but not what belongs to a deeper or another encoder: with
    `builtin` (an encoder of ours) any part of the trunk, else another item of a list that the module has. Raises
    GeomsslError naming the first missing name and its nearest, or the first shape that differs, with `builtin` also the
    settings that would fit; the module is then unchanged.
    """
    state = read(path)
    # the normalisation of the images is a setting, which files of others do not hold
    settings = {name for name, part in module.named_modules() if isinstance(part, Normalise)}
    wanted = {k: v for k, v in module.state_dict().items() if k.rpartition(".")[0] not in settings}
    if not wanted:
        given = f"{path} for a {type(module).__name__} without weights"
        raise GeomsslError(given, "a module with weights", reason="bad-weights")
    layout, before, own, renamed = _best(state, wanted, prefix)
    found = {own + name[len(before) :]: key for name, key in renamed.items() if name.startswith(before)}
    names = [k for k in wanted if not k.endswith("num_batches_tracked")]
    missing = [k for k in names if k not in found]
    said = f"{path}, {layout} names" + (f" under {before!r}" if before else "")
    if missing:
        raise _missing(said, missing, names, found, state, prefix)
    wrong = [k for k in names if state[found[k]].shape != wanted[k].shape]
    if wrong:
        raise _mismatch(str(path), wrong[0], found[wrong[0]], state, wanted, found, builtin)
    strangers = [n for n in found if n not in wanted and not n.endswith("num_batches_tracked") and _belongs(n, names, builtin)]
    if strangers:
        raise GeomsslError(
            f"{said} holds {found[strangers[0]]}, which the encoder does not have", "weights of the same encoder",
            reason="bad-weights",
        )
    taken = {k: state[key] for k, key in found.items() if k in wanted}
    module.load_state_dict(taken, strict=False)
    ignored: dict[str, int] = {}
    for key in state.keys() - {found[k] for k in taken}:
        first = key.partition(".")[0]
        ignored[first] = ignored.get(first, 0) + 1
    return Loaded(layout, before, len(taken), dict(sorted(ignored.items())))


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise GeomsslError(f"{path} is cut short or damaged: {said}", "a whole safetensors file", reason="damaged") from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # what it warns of (the protocol of the pickle) is refused below or does not matter
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        # a pickle of a newer protocol than torch writes is refused at an operand, before any name is read
        if named is None and not (_head(path)[:1] == b"\x80" and "Unsupported operand" in str(error)):
            raise _damaged(path) from None
        raise GeomsslError(
            f"{path} holds a pickled object{f' ({named[1]})' if named else ''}, which was not executed",
            "tensors and plain types only, such as its state dict saved alone", reason="pickled-object",
        ) from None
    except Exception:
        # what a file cut at any byte raises in torch's readers is of many kinds
        raise _damaged(path) from None


def _damaged(path: Path) -> GeomsslError:
    said = "is cut short or damaged" if _head(path) in (b"PK", b"\x80\x02") else "is no file of weights"
    return GeomsslError(f"{path} {said}", "a whole .safetensors, or a .pt, .pth or .ckpt of torch", reason="damaged")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _tensors(found: Any) -> dict[str, Tensor]:
    """The tensors of a mapping of names; nothing where it is none."""
    if not isinstance(found, Mapping):
        return {}
    return {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _best(state: State, wanted: State, prefix: str) -> tuple[str, str, str, dict[str, str]]:
    """(layout, prefix in the file, prefix in the module, renamed name -> name in the file) that fit the most names."""
    owns = {"", _shared(wanted)}
    best: tuple[tuple[int, int, int], str, str, str, dict[str, str]] | None = None
    for order, (layout, renaming) in enumerate(LAYOUTS.items()):
        renamed = {_renamed(key, renaming): key for key in state}
        if len(renamed) < len(state):
            continue
        for own in sorted(owns):
            for before, fitting in _prefixes(renamed, wanted, own, prefix).items():
                score = (fitting, -bool(FOLLOWERS.search(before)), -order)
                if best is None or score > best[0]:
                    best = score, layout, before, own, renamed
    assert best is not None
    return best[1:]


def _prefixes(renamed: Iterable[str], wanted: State, own: str, prefix: str) -> dict[str, int]:
    """Prefixes in the file -> how many of the module's names they give."""
    if prefix != "auto":
        before = "" if prefix == "none" else prefix.removesuffix(".") + "."
        return {before: sum(before + name[len(own) :] in renamed for name in wanted if name.startswith(own))}
    # the last part of a name finds those of the module's names that it may end with
    by_end: dict[str, list[str]] = {}
    for name in wanted:
        by_end.setdefault(".".join(name.split(".")[-2:]), []).append(name[len(own) :])
    found: dict[str, int] = {"": 0}
    for name in renamed:
        for end in by_end.get(".".join(name.split(".")[-2:]), []):
            if name == end or name.endswith("." + end):
                before = name[: len(name) - len(end)]
                found[before] = found.get(before, 0) + 1
    return found


def _shared(wanted: State) -> str:
    """The first part that all names share, as "model." of a module that wraps one; "" where there is none."""
    firsts = {name.partition(".")[0] for name in wanted}
    return f"{firsts.pop()}." if len(firsts) == 1 and all("." in name for name in wanted) else ""


def _renamed(key: str, renaming: Renaming) -> str:
    for pattern, replacement in renaming:
        key = re.sub(pattern, replacement, key)
    return key


def _missing(
    said: str, missing: list[str], names: list[str], given: Mapping[str, str], state: State, prefix: str
) -> GeomsslError:
    """The line for names of the encoder that the file does not have."""
    near = nearest(missing[0], given) or nearest(missing[0], state)
    count = len(names) - len(missing)
    expected = "every weight of the encoder"
    if not count and prefix not in ("auto", "none"):
        firsts = sorted({key.rpartition(".")[0].partition(".")[0] + "." for key in state if "." in key})
        expected = f"a prefix of the file's names ({', '.join(firsts[:8])}), none or auto"
        return GeomsslError(f"--prefix {prefix}: {said} has no weight of the encoder", expected, reason="bad-weights")
    return GeomsslError(
        f"{said}: {count} of {len(names)} weights of the encoder are there, {missing[0]} is not", expected,
        given.get(near, near) if near else None, reason="bad-weights",
    )


def _mismatch(
    path: str, name: str, key: str, state: State, wanted: State, given: Mapping[str, str], builtin: bool
) -> GeomsslError:
    """The line for a shape that differs, with the settings of a built-in encoder that would fit."""
    found, expected = tuple(state[key].shape), tuple(wanted[name].shape)
    hint = ", ".join(_hints(state, wanted, given)) if builtin else ""
    return GeomsslError(
        f"{path}: {key} has shape {found}", f"{expected}" + (f"; {hint} would fit" if hint else ""), reason="bad-weights"
    )


def _hints(state: State, wanted: State, given: Mapping[str, str]) -> list[str]:
    """The settings of a built-in encoder, and the channels of the data, that the file's shapes ask for and that differ."""
    found = []
    stems = {3: "encoder.stem=small", 7: "encoder.stem=imagenet"}
    for name, square in (("conv1.weight", stems), ("patch_embed.proj.weight", {})):
        if name not in given or name not in wanted or state[given[name]].dim() != wanted[name].dim():
            continue
        theirs, ours = state[given[name]].shape, wanted[name].shape
        if theirs[0] != ours[0]:
            found.append(f"encoder.width={theirs[0]}")
        if theirs[1] != ours[1]:
            found.append(f"images of {theirs[1]} channels")
        if theirs[2] != ours[2]:
            found.append(square.get(theirs[2], f"encoder.patch={theirs[2]}" if not square else ""))
        if "pos_embed" in given and "pos_embed" in wanted and not square:
            side = math.isqrt(state[given["pos_embed"]].shape[1] - ("cls_token" in given)) * theirs[2]
            if theirs[2] != ours[2] or state[given["pos_embed"]].shape[1] != wanted["pos_embed"].shape[1]:
                found.append(f"encoder.size={side}")
    return [hint for hint in found if hint]


def _belongs(name: str, names: Iterable[str], builtin: bool) -> bool:
    """Whether a name that the module lacks is part of an encoder like it, and no head."""
    if builtin:
        first = name.partition(".")[0]
        return first in TOKENS or first in {own.partition(".")[0] for own in names}
    item = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
    return "#" in item and item in {re.sub(r"(?<=\.)\d+(?=\.)", "#", own) for own in names}
