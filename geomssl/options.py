"""Flags made from settings: one click option for every field of a pydantic model."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def flags(model: type[BaseModel], skip: tuple[str, ...] = ("name",)) -> list[click.Option]:
    """One --option for every field but `skip`. Not given means not set: the model's own default stands."""
    return [_flag(name, field) for name, field in model.model_fields.items() if name not in skip]


def given(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parsed values that belong to the model and were given on the command line."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name in model.model_fields and value is not None and value != ()
    }


def _flag(name: str, field: FieldInfo) -> click.Option:
    kind = _plain(field.annotation)
    described = (field.description or "").strip()
    default = "" if field.is_required() or field.default is None else f"  [default: {_shown(field.default)}]"
    words: dict[str, Any] = {"help": described + default, "default": None}
    dashed = name.replace("_", "-")
    if kind is bool:
        return click.Option([f"--{dashed}/--no-{dashed}", name], **words)
    if get_origin(kind) is tuple:
        inner = next(a for a in get_args(kind) if a is not Ellipsis)
        return click.Option([f"--{dashed}", name], multiple=True, type=inner, **words)
    if get_origin(kind) is Literal:
        return click.Option([f"--{dashed}", name], type=click.Choice([str(a) for a in get_args(kind)]), **words)
    return click.Option([f"--{dashed}", name], type=kind if kind in (int, float, str) else str, **words)


def _plain(annotation: Any) -> Any:
    """The type without its `| None` and without Annotated."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [a for a in get_args(annotation) if a is not type(None)]
        return _plain(parts[0]) if len(parts) == 1 else str
    return annotation


def _shown(value: Any) -> str:
    return " ".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
