"""Recipe: the whole of a training run as settings. One schema for TOML, flags, --set and the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from geomssl.config import Settings, canonical, merge, parse, read_toml
from geomssl.errors import GeomsslError, nearest
from geomssl.registry import known, resolve
from geomssl.schedule import Schedule

if TYPE_CHECKING:
    from geomssl.data.base import Source

# section of a recipe -> kind in the registry
SECTIONS = {"dataset": "dataset", "encoder": "encoder", "objective": "objective", "optim": "optimizer"}
DEFAULTS: dict[str, Any] = {
    "dataset": {"name": "digits"},
    "encoder": {"name": "cnn"},
    "objective": {"name": "simclr"},
    "optim": {"name": "sgd"},
}
# what merely rounds differently, and where the images lie (that they are the same is seen by their fingerprint): a resumed
# run may change these, as it may change device and number of processes
MACHINE = {"channels_last", "compile", "dataset.root", "dataset.memory", "dataset.cache", "dataset.download"}


class Recipe(Settings):
    """Everything that decides a run but the device and the number of processes."""

    seed: int = Field(0, ge=0, description="seed of every draw")
    epochs: int = Field(60, ge=1, description="epochs of the whole training")
    batch_size: int = Field(128, ge=2, description="images a step; the last, smaller batch of an epoch is left out")
    checkpoint_every: int = Field(1, ge=1, description="epochs between two writes of run.pt")
    precision: Literal["float32", "tf32", "bf16", "fp16"] = Field(
        "float32", description="bf16 and fp16 by autocast, tf32 on cuda; losses stay in float32"
    )
    channels_last: bool = Field(False, description="keep images and filters channels-last")
    compile: bool = Field(False, description="torch.compile of the encoder")
    micro_batch: int | None = Field(None, ge=2, description="images a pass of the encoder: gradient caching for large batches")
    train_share: float = Field(
        1.0, gt=0, le=1, description="share of the training images the run sees, drawn by class; small ones lie in large ones"
    )
    classifier_lr: float = Field(0.1, gt=0, description="learning rate of the detached online classifier")
    dataset: SerializeAsAny[Settings]
    encoder: SerializeAsAny[Settings]
    objective: SerializeAsAny[Settings]
    optim: SerializeAsAny[Settings]
    probes: Schedule = Field(
        default_factory=lambda: Schedule.model_validate({}), description="which probes run while training, and when"
    )

    @field_validator("dataset", "encoder", "objective", "optim", mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> Any:
        if not isinstance(value, Settings):
            raise ValueError("a table with a name")
        return value

    def plain(self) -> dict[str, Any]:
        """Nested dictionaries, lists, numbers and text only."""
        return self.model_dump(mode="json")


def build(layers: Sequence[Mapping[str, Any]], where: str = "recipe") -> Recipe:
    """The recipe that the layers describe, later ones winning. Raises GeomsslError for an unknown name, key or type."""
    merged: dict[str, Any] = dict(DEFAULTS)
    for layer in layers:
        for section in SECTIONS:
            if section in layer and not isinstance(layer[section], Mapping):
                raise GeomsslError(
                    f"{where}: {section} = {layer[section]!r}", f"a table, such as {section}.name", f"{section}.name",
                    reason="bad-value",
                )
        merged = merge(merged, layer)
    for key in merged:
        if key not in Recipe.model_fields:
            valid = list(Recipe.model_fields)
            raise GeomsslError(
                f"{where}: unknown key {key!r}", f"one of {', '.join(valid)}", nearest(key, valid), reason="unknown-key"
            )
    for section, kind in SECTIONS.items():
        chosen = resolve(kind, str(merged[section].get("name")))
        merged[section] = parse(chosen.Config, merged[section], f"{where}: {section}")
    if "probes" in merged:
        merged["probes"] = _schedule(merged["probes"], where)
    recipe = parse(Recipe, merged, where)
    late = [epoch for epoch in recipe.probes.at if epoch > recipe.epochs]
    if late:
        raise GeomsslError(
            f"{where}: probes.at = {late[0]} in a training of {recipe.epochs} epochs", f"0 to {recipe.epochs}",
            reason="bad-value",
        )
    return recipe


def seen(recipe: Recipe, source: Source) -> Source:
    """What a run sees of the training split: train_share of it, drawn by the recipe's seed, whatever else the recipe says."""
    from geomssl.data.derived import share

    return share(source, recipe.train_share, recipe.seed)


def _schedule(given: Any, where: str) -> Schedule:
    if not isinstance(given, Mapping):
        raise GeomsslError(f"{where}: probes = {given!r}", "a table, such as probes.every", "probes.every", reason="bad-value")
    return parse(Schedule, given, f"{where}: probes")


def read(path: Path | str) -> dict[str, Any]:
    """A recipe file, or an installed recipe by its name (digits-simclr, hssl/mnist-rotation), as a dictionary."""
    return read_toml(located(path))


def located(path: Path | str) -> Path:
    """The TOML file that was meant: the file itself, or an installed one by its name without .toml."""
    path = Path(path)
    if path.is_file() or path.suffix == ".toml":
        return path
    found = installed()
    if str(path) in found:
        return found[str(path)]
    raise GeomsslError(
        f"no recipe {str(path)!r}", f"a TOML file, or one of {', '.join(found)}", nearest(str(path), found), reason="no-file"
    )


def installed() -> dict[str, Path]:
    """Every TOML file that comes with geomssl, by its path without .toml; those in sub-folders last."""
    from importlib.resources import files

    folder = Path(str(files("geomssl.recipes")))
    names = sorted((path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.toml")), key=_depth)
    return {name: folder / f"{name}.toml" for name in names}


def _depth(name: str) -> tuple[int, str]:
    return name.count("/"), name


def differing(was: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What two plain recipes differ in, as "optim.lr = 0.1 (was 0.03)"; what merely rounds differently (MACHINE) aside."""
    old, new = flat(was), flat(wanted)
    keys = sorted(key for key in (old.keys() | new.keys()) - MACHINE if old.get(key) != new.get(key))
    return [f"{key} = {new.get(key)} (was {old.get(key)})" for key in keys]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"optim.lr": "0.03", ...}, values as JSON text."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = canonical(value)
    return found


def refuse_strangers(config: Mapping[str, Any], repeated: Sequence[Mapping[str, Any]], where: str) -> None:
    """A name inside a file never imports user code: raise unless it is built in, installed, or in a `repeated` layer."""
    for section, kind in SECTIONS.items():
        name = str(config.get(section, {}).get("name"))
        trusted = any(layer.get(section, {}).get("name") == name for layer in repeated)
        if not known(kind, name) and not trusted:
            raise GeomsslError(
                f"{where} names the {kind} {name!r}, your own code", f"the same name on the command line (--{kind} {name})",
                reason="untrusted-name",
            )
