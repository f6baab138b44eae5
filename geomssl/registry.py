"""One table of names: built-in, then entry points `geomssl.<kind>`, then `package.module:attribute`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from geomssl.errors import GeomsslError, nearest, unknown

# kind -> name -> (where it lives, one line of help). Read by --help, so nothing here imports anything heavy.
BUILTIN: dict[str, dict[str, tuple[str, str]]] = {
    "objective": {
        "simclr": ("geomssl.objectives.simclr:SimCLR", "contrast two augmented views (InfoNCE)"),
        "hssl": ("geomssl.objectives.hssl:HSSL", "contrast two fibres of one equivariant pass, or of two augmented ones"),
        "ciper": ("geomssl.objectives.ciper:CIPER", "contrast views and predict the parameters of their augmentation"),
        "predictive": ("geomssl.objectives.predictive:Predictive", "predict the parameters of the augmentation alone"),
        "essl": ("geomssl.objectives.essl:ESSL", "contrast two views and tell the quarter turn of a third (E-SSL)"),
        "vicreg": ("geomssl.objectives.vicreg:VICReg", "two views agree, every number varies, no two say the same"),
        "sie": ("geomssl.objectives.sie:SIE", "an invariant half, and one that known parameters move linearly (hypernetwork)"),
        "reconstruction": (
            "geomssl.objectives.reconstruction:Reconstruction", "an invariant half, and one that paints view 2 from view 1"
        ),
        "supervised": ("geomssl.objectives.supervised:Supervised", "cross-entropy on the labels, the upper baseline"),
        "frozen": ("geomssl.objectives.frozen:Frozen", "no training of the encoder, the lower baseline"),
    },
    "encoder": {
        "cnn": ("geomssl.encoders.cnn:CNN", "a plain convolutional network, no group"),
        "c4-cnn": ("geomssl.encoders.cnn:C4CNN", "its twin with C4 group convolutions, exact under 90-degree turns"),
        "resnet18": ("geomssl.encoders.residual:ResNet18", "ResNet-18 with a 3x3 stem and no max-pool, no group"),
        "c4-resnet18": ("geomssl.encoders.residual:C4ResNet18", "its twin with C4 group convolutions, exact like c4-cnn"),
        "hssl-mnist": ("geomssl.encoders.homomorphic:HSSLMNIST", "H-SSL's three layers, over shifts, turns, scales or nothing"),
        "hssl-cifar10": ("geomssl.encoders.homomorphic:HSSLCIFAR10", "H-SSL's residual network of three stages, likewise"),
        "hssl-tiny": ("geomssl.encoders.homomorphic:HSSLTiny", "H-SSL's residual network of four stages, likewise"),
        "vit-small": ("geomssl.encoders.vit:ViT", "a vision transformer, 12 blocks of width 384"),
        "mlp": ("geomssl.encoders.mlp:MLP", "a multilayer perceptron on pixels, read as fibres without structure"),
    },
    "optimizer": {
        "sgd": ("geomssl.optim:SGD", "stochastic gradient descent with momentum"),
        "adamw": ("geomssl.optim:AdamW", "Adam with decoupled weight decay"),
        "lars": ("geomssl.optim:LARS", "momentum with layer-wise adaptive rates, for large batches"),
    },
    "dataset": {
        "digits": ("geomssl.data.digits:Digits", "scikit-learn's 1,797 scanned digits, 8x8, embedded"),
        "mnist": ("geomssl.data.mnist:MNIST", "70,000 handwritten digits, 28x28, grey"),
        "fashion-mnist": ("geomssl.data.mnist:FashionMNIST", "70,000 articles of clothing, 28x28, grey"),
        "cifar10": ("geomssl.data.cifar:CIFAR10", "60,000 photographs in 10 classes, 32x32, colour"),
        "cifar100": ("geomssl.data.cifar:CIFAR100", "60,000 photographs in 100 classes (20 coarse ones), 32x32, colour"),
        "folder": ("geomssl.data.folder:Folder", "images on disk, one sub-folder a class: folder:PATH"),
        "fields": ("geomssl.data.rendered:FieldsSet", "band-limited random fields, drawn from formulas, embedded"),
        "phantoms": ("geomssl.data.rendered:PhantomsSet", "smooth-edged shapes on black, drawn from formulas, embedded"),
        "views": ("geomssl.data.views:ViewsSet", "superquadric objects with known class, view, light and background, embedded"),
        "core50": ("geomssl.data.core50:CORe50", "50 objects held in the hand, filmed in 11 sessions, on disk"),
        "tdw": ("geomssl.data.tdw:TDW", "12 rendered objects from known azimuth, elevation and distance, on disk"),
        "3diebench": ("geomssl.data.threedie:ThreeDIEBench", "55 classes of rendered objects, rotation and hues known"),
        "tiny-imagenet": ("geomssl.data.tiny_imagenet:TinyImageNet", "110,000 photographs in 200 classes, 64x64, on disk"),
        "imagenet": ("geomssl.data.imagenet:ImageNet", "ILSVRC 2012, 1.3 million photographs in 1,000 classes, on disk"),
        "ade20k": ("geomssl.data.ade20k:ADE20K", "22,210 scenes with a name for every pixel, on disk"),
        "food101": ("geomssl.data.recognition:Food101", "101,000 photographs of 101 dishes, on disk"),
        "sun397": ("geomssl.data.recognition:SUN397", "photographs of 397 kinds of scenes, ten partitions, on disk"),
        "dtd": ("geomssl.data.recognition:DTD", "5,640 textures in 47 classes, ten partitions, on disk"),
        "pets": ("geomssl.data.recognition:Pets", "7,349 cats and dogs of 37 breeds, with masks, on disk"),
        "aircraft": ("geomssl.data.recognition:Aircraft", "10,000 aircraft of 100 variants, on disk"),
    },
    "probe": {
        "equivariance": ("geomssl.probes.equivariance", "how far f(T_g x) is from the declared action on f(x)"),
        "action": ("geomssl.probes.action", "does some affine action on f(x) exist, fitted, and is it the declared one"),
        "explain": ("geomssl.probes.explain", "where equivariance must break, where it aliases, and which repair helps"),
        "lie": ("geomssl.probes.lie", "how features change at first order as the image moves, beside the declared way"),
        "consistency": ("geomssl.probes.consistency", "does the answer stay under a transform, beyond constant answers"),
        "rank": ("geomssl.probes.rank", "rank of the projector, h and z: for every threshold, and by other estimators"),
        "tangent": ("geomssl.probes.tangent", "steps to nearest negatives: what the projector sees of them, and whose label"),
        "local": ("geomssl.probes.local", "the affine map of a non-linear projector around each image, and its regions"),
        "kernel": ("geomssl.probes.kernel", "how much of what each augmentation does to h the projector lets through"),
        "bound": ("geomssl.probes.bound", "InfoNCE of batches as in training beside its upper bound, and the slack"),
        "spectrum": ("geomssl.probes.spectrum", "log singular values of the features, on plain images and on views"),
        "equivalence": ("geomssl.probes.equivalence", "A-SSL's and H-SSL's loss and gradients on the same draws"),
        "linear": ("geomssl.probes.linear", "the class, or any factor (--target), read from frozen features by a linear map"),
        "transfer": ("geomssl.probes.transfer", "linear accuracy on other data sets, features frozen"),
        "segment": ("geomssl.probes.segment", "the region of every pixel, read by a small decoder; mIoU and accuracies"),
        "regress": ("geomssl.probes.regress", "is what was done readable from both views: R2 per parameter, beside its null"),
        "embed": ("geomssl.probes.embed", "a PaCMAP map of the features with its trustworthiness"),
        "reconstructions": ("geomssl.probes.reconstructions", "what the decoder of reconstruction paints, beside its target"),
        "saliency": ("geomssl.probes.saliency", "FullGrad maps with their residual, and other methods by name"),
    },
}

# kind -> library -> the same, for the names LIBRARY:NAME of that kind
LIBRARIES: dict[str, dict[str, tuple[str, str]]] = {
    "encoder": {
        "timm": ("geomssl.encoders.zoo:Timm", "a model of timm (extra zoo)"),
        "torchvision": ("geomssl.encoders.zoo:TorchVision", "a classification model of torchvision (extra zoo)"),
    },
}


def names(kind: str) -> dict[str, str]:
    """Every installed name of a kind with its line of help; built-in names first, LIBRARY:NAME for those of a library."""
    found = {name: line for name, (_, line) in BUILTIN[kind].items()}
    found |= {f"{library}:NAME": line for library, (_, line) in LIBRARIES.get(kind, {}).items()}
    for entry in entry_points(group=f"geomssl.{kind}"):
        found.setdefault(entry.name, f"from {entry.value}")
    return found


def library_of(kind: str, name: str) -> str | None:
    """"timm" of "timm:resnet18": the library that the name belongs to, or None."""
    library, colon, _ = name.partition(":")
    return library if colon and library in LIBRARIES.get(kind, {}) else None


def known(kind: str, name: str) -> bool:
    """Whether the name is built in, installed or of a known library, so that resolving it imports no code of the user's."""
    return name in names(kind) or library_of(kind, name) is not None


def resolve(kind: str, name: str) -> Any:
    """The object behind a name. Raises GeomsslError, naming the nearest, where there is none.

    `package.module:attribute` is imported only because the caller spelled it out; never pass a name read from a
    checkpoint here unless the command line repeats it.
    """
    if name in BUILTIN[kind]:
        return _load(BUILTIN[kind][name][0])
    library = library_of(kind, name)
    if library is not None:
        return _load(LIBRARIES[kind][library][0])
    for entry in entry_points(group=f"geomssl.{kind}"):
        if entry.name == name:
            return entry.load()
    if ":" in name:
        return load_attribute(name, kind)
    raise unknown(kind, name, names(kind))


def load_attribute(path: str, kind: str) -> Any:
    """`package.module:attribute`, with the current folder importable, as `python -m` has it; or `FILE.py:attribute`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return _load(path)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise GeomsslError(
            f"{kind} {path!r}: {error}", "an importable package.module:attribute, or FILE.py:attribute", reason="unknown-name"
        ) from error


def _load(path: str) -> Any:
    module, _, attribute = path.rpartition(":") if ".py:" in path else path.partition(":")
    if not module.endswith(".py") and not all(part.isidentifier() for part in module.split(".")):
        raise ImportError(f"{module!r} is no name of a module")
    loaded = _load_file(module) if module.endswith(".py") else importlib.import_module(module)
    if attribute and not hasattr(loaded, attribute):
        near = nearest(attribute, [name for name in vars(loaded) if not name.startswith("_")])
        raise AttributeError(f"{module} has no {attribute!r}" + (f", but {near!r}" if near else ""))
    return getattr(loaded, attribute) if attribute else loaded


def _load_file(path: str) -> Any:
    """A module from a file, under a name of its own, so that it shadows nothing; its neighbours are importable."""
    file = Path(path).resolve()
    name = "geomssl_file_" + hashlib.sha256(str(file).encode()).hexdigest()[:12]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
