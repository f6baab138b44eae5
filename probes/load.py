"""From what a person names (a checkpoint, an encoder with others' weights, a factory of their own) to a Subject."""

from __future__ import annotations

import copy
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geomssl
from geomssl import checkpoint, data
from geomssl.config import Settings, merge, parse
from geomssl.data.base import Source, Split
from geomssl.encoders import for_images, foreign, wrap
from geomssl.encoders.base import Encoder
from geomssl.encoders.capture import Capture, submodule
from geomssl.encoders.wrap import channels_of
from geomssl.errors import GeomsslError
from geomssl.probes.subject import Subject
from geomssl.recipe import Recipe, build, refuse_strangers, seen
from geomssl.registry import BUILTIN, load_attribute, resolve
from geomssl.seeding import seeded
from geomssl.training import build_encoder, initialise

# data sets whose pictures are formulas: they have whatever size and channels they are asked for
RENDERED = ("fields", "phantoms")


def from_checkpoint(
    path: Path | str,
    dataset: Mapping[str, Any] | None = None,
    split: Split = "test",
    repeated: Sequence[Mapping[str, Any]] = (),
    **how: Any,
) -> Subject:
    """The subject of a run.pt on a split of its own data set, or of another with the same channels.

    dataset: settings laid over those of the run's own data set; another name starts afresh. repeated: settings spelled
    out by the caller; only they may name user code. how: device, dtype, batch_size, memory.
    """
    path = checkpoint.located(path)
    state = checkpoint.load(path)
    refuse_strangers(state["config"], repeated, str(path))
    recipe = build([state["config"]], str(path))
    section = data.configure(merge(recipe.dataset.model_dump(mode="json"), dataset or {}))
    same = data.same_images(section, recipe.dataset)
    trained_on = data.load_config(section if same else recipe.dataset, "train")
    source = data.load_config(section, split)
    train = trained_on if same else data.load_config(section, "train")
    if source.channels != trained_on.channels:
        raise GeomsslError(
            f"{source.name} has {source.channels} channels", f"{trained_on.channels}, as the encoder of {path}",
            reason="bad-shape",
        )
    return of_run(
        recipe, state["weights"], trained_on, source, train,
        {
            "run": path.stem, "checkpoint": path.name, "checkpoint_sha256": checkpoint.digest(path), "epoch": state["epoch"],
        },
        **how,
    )


def of_run(
    recipe: Recipe, weights: Mapping[str, Tensor], trained_on: Source, source: Source, train: Source | None,
    provenance: Mapping[str, Any], **how: Any,
) -> Subject:
    """The subject of a run's weights: its modules are made anew from the recipe, so that a training's own stay as they are.

    trained_on: the run's whole training split, whose shape the encoder has. source, train: what is measured. how: of Subject.
    """
    # a library's own weights would be fetched only to be replaced
    recipe = recipe.model_copy(update={"encoder": _random(recipe.encoder)})
    learner = initialise(recipe, trained_on.channels, trained_on.size, len(trained_on.classes), seen(recipe, trained_on))
    learner.load_state_dict(weights)

    def untrained() -> Encoder:
        with seeded(recipe.seed, "initialise"):
            return build_encoder(recipe, trained_on.channels, trained_on.size)

    known = recipe.objective.model_dump()
    return Subject(
        learner.encoder, source, projector=learner.objective.projector,
        projector_note=learner.objective.projector_note, train=train, policy=learner.objective.policy,
        untrained=untrained, objective=learner.objective, **how,
        trained={"batch_size": recipe.batch_size} | {k: known[k] for k in ("beta", "denominator") if k in known},
        provenance={
            **provenance,
            "objective": recipe.objective.name,  # type: ignore[attr-defined]
            "encoder": recipe.encoder.name,  # type: ignore[attr-defined]
            "seed": recipe.seed,
            **_about(source, how),
        },
    )


def from_encoder(
    name: str,
    options: Mapping[str, Any],
    dataset: Mapping[str, Any],
    split: Split = "test",
    weights: Path | str | None = None,
    prefix: str = "auto",
    **how: Any,
) -> Subject:
    """The subject of an encoder by its name (built in, timm:NAME, torchvision:NAME, your own), with others' weights or random.

    options: settings of the encoder. weights, prefix: a file and how to read its names, see encoders.foreign.load.
    """
    section = data.configure(dataset)
    source, train = data.load_config(section, split), data.load_config(section, "train")
    config = parse(resolve("encoder", name).Config, {"name": name, **options}, f"encoder {name}")

    def built(settings: Settings) -> Encoder:
        with seeded(0, "initialise"):
            return for_images(settings, source.channels, source.size)

    encoder, bare = built(config), _random(config)
    loaded = _weights(encoder, weights, prefix, builtin=name in BUILTIN["encoder"])
    return Subject(
        encoder, source, train=train, untrained=(lambda: built(bare)) if weights or bare != config else None, **how,
        provenance={
            "run": Path(weights).stem if weights else name.replace(":", "-"), "encoder": name, **loaded, **_about(source, how),
        },
    )


def from_factory(
    name: str,
    dataset: Mapping[str, Any],
    split: Split = "test",
    weights: Path | str | None = None,
    projector: str | None = None,
    prefix: str = "auto",
    **how: Any,
) -> Subject:
    """The subject of `package.module:factory` or `FILE.py:factory`, which returns a module or (encoder, projector).

    weights, prefix: a file for the module and how to read its names, see encoders.foreign.load. projector: the name of a
    layer; h is then what enters that layer. Rendered pictures without a number of channels get the module's.
    """
    made = load_attribute(name, "model")
    if callable(made) and not isinstance(made, nn.Module):
        with seeded(0, "initialise"):
            made = made()
    module, head = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise GeomsslError(f"--model {name} gave a {type(made).__name__}", "a torch.nn.Module or (encoder, projector)")
    section = data.configure(_for_module(dataset, module))
    source, train = data.load_config(section, split), data.load_config(section, "train")
    untrained = copy.deepcopy(module) if weights else None
    loaded = _weights(module, weights, prefix)
    if projector:
        module, head = Before(module, projector), submodule(module, projector)
    return Subject(
        wrap(module, in_channels=source.channels), source, projector=head, train=train,
        untrained=(lambda: wrap(untrained, in_channels=source.channels)) if untrained is not None else None, **how,
        provenance={"run": name.rpartition(":")[2], "model": name, **loaded, **_about(source, how)},
    )


def _for_module(dataset: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """The section with the channels that the module takes, where it names rendered pictures and no channels."""
    taken = channels_of(module)
    if dataset.get("name") not in RENDERED or "channels" in dataset or taken not in (1, 2, 3):
        return dataset
    return {**dataset, "channels": taken}


class Before(nn.Module):
    """What enters a layer of a module, as a vector."""

    def __init__(self, module: nn.Module, layer: str) -> None:
        super().__init__()
        self.module, self._capture = module, Capture(module, [layer], before=True)

    def forward(self, images: Tensor) -> Tensor:
        return self._capture.one(images).flatten(1)


def _random(config: Settings) -> Settings:
    """The settings of an encoder without the weights of a library."""
    return config.model_copy(update={"pretrained": False}) if getattr(config, "pretrained", False) else config


def _weights(module: nn.Module, path: Path | str | None, prefix: str, builtin: bool = False) -> dict[str, Any]:
    """Load the weights where there are any, and what the provenance says of them."""
    if path is None:
        return {}
    loaded = foreign.load(module, path, prefix, builtin)
    return {"weights": Path(path).name, "weights_sha256": checkpoint.digest(path), "weights_loaded": str(loaded)}


def _about(source: Source, how: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataset": source.name,
        "split": source.split,
        "images_sha256": source.fingerprint,
        **({"images_left_out": list(source.notes)} if source.notes else {}),
        "device": str(how.get("device", "cpu")),
        "dtype": str(how.get("dtype", torch.float32)).removeprefix("torch."),
        "versions": {"geomssl": geomssl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
