"""Attribution methods by name, through captum, and two figures of any of them: infidelity and max-sensitivity."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from geomssl.errors import GeomsslError, nearest, unknown
from geomssl.probes.fullgrad import fullgrad
from geomssl.seeding import generator

# name -> one line of help
METHODS = {
    "fullgrad": "input and bias gradients, complete (Srinivas and Fleuret 2019)",
    "saliency": "|df/dx| (Simonyan et al. 2014)",
    "input-x-gradient": "x df/dx",
    "integrated-gradients": "(x - baseline) times the mean gradient on the way from the baseline (Sundararajan et al. 2017)",
    "guided-backprop": "the gradient, kept only where it is positive at every ReLU (Springenberg et al. 2015)",
    "deconvolution": "the gradient, ReLUs applied to it instead of their derivative (Zeiler and Fergus 2014)",
    "occlusion": "f(x) - f(x with a square put to the baseline) (Zeiler and Fergus 2014)",
    "gradcam": "the last maps, weighted by their mean gradient (Selvaraju et al. 2017)",
}
RELUS = {"relu", "relu_"}


@dataclass(frozen=True)
class Settings:
    """What the methods can be told. baseline: of a pixel. steps: of the path. window: side of the square in pixels, or None
    for an eighth of the image. layer: for gradcam, or None for the last layer with maps."""

    baseline: float = 0.0
    steps: int = 50
    window: int | None = None
    layer: str | None = None


def check(method: str) -> str:
    """The method's name; GeomsslError naming the nearest where there is none."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return method


def attribution(
    method: str, model: nn.Module, images: Tensor, targets: Tensor, settings: Settings | None = None
) -> Tensor:
    """What each pixel contributes to f = model(images)[i, targets[i]] by that method: (n, C, H, W); (n, 1, H, W) for maps.

    fullgrad and gradcam give one map for all channels, the others a number for every channel. The model is not changed:
    captum's methods run on a copy with frozen parameters in eval mode. ReLUs are reached as modules, as functions
    (`x.relu()`), in place and reused. gradcam sums over a group axis of the maps, and is enlarged bilinearly.
    Raises GeomsslError for an unknown method, a network without ReLU where the method changes them, and one without maps
    where it needs them.
    """
    settings = settings or Settings()
    if check(method) == "fullgrad":
        return fullgrad(model, images, targets).saliency[:, None]
    with quiet(), torch.enable_grad():
        found = _explainer(method, _copy(model), images, settings)(images.detach().clone().requires_grad_(True), targets)
    return found.detach()


def _explainer(method: str, model: nn.Module, images: Tensor, settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    from captum import attr

    if method == "saliency":
        return lambda x, t: attr.Saliency(model).attribute(x, target=t)
    if method == "input-x-gradient":
        return lambda x, t: attr.InputXGradient(model).attribute(x, target=t)
    if method == "integrated-gradients":
        return lambda x, t: attr.IntegratedGradients(model).attribute(
            x, baselines=settings.baseline, target=t, n_steps=settings.steps, internal_batch_size=max(len(x), 256)
        ).to(x)
    if method in ("guided-backprop", "deconvolution"):
        wrapped = _ReLUsAsModules(model, images[:1], method)
        kind = attr.GuidedBackprop if method == "guided-backprop" else attr.Deconvolution
        return lambda x, t: kind(wrapped).attribute(x, target=t)
    if method == "occlusion":
        side = settings.window or max(1, images.shape[-1] // 8)
        if not 1 <= side <= min(images.shape[-2:]):
            raise GeomsslError(f"--window {side} on images of {images.shape[-1]} pixels", "a square inside the image")
        window, stride = (images.shape[1], side, side), (images.shape[1], max(1, side // 2), max(1, side // 2))
        return lambda x, t: attr.Occlusion(model).attribute(
            x.detach(), window, stride, baselines=settings.baseline, target=t, perturbations_per_eval=8
        )
    layer = map_layer(model, images[:1], settings.layer)
    return lambda x, t: _gradcam(attr.LayerGradCam(model, layer), x, t)


def _gradcam(explainer: Any, x: Tensor, targets: Tensor) -> Tensor:
    maps = explainer.attribute(x, target=targets, relu_attributions=False)
    maps = maps.flatten(1, -3).sum(dim=1, keepdim=True).relu()
    return F.interpolate(maps, list(x.shape[-2:]), mode="bilinear", align_corners=False)


def map_layer(model: nn.Module, images: Tensor, wanted: str | None = None) -> nn.Module:
    """The layer of that name, or the last whose output is a map with more than one place, after the first learned layer.

    Raises GeomsslError where there is no such layer, and for one called twice in a pass: captum would mix its calls.
    """
    calls: dict[str, list[tuple[int, ...]]] = {}
    order: list[str] = []
    learned: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            if any(True for _ in module.parameters()):
                learned.append(name)
            # before that, a map is the image itself
            if learned and isinstance(output, Tensor):
                calls.setdefault(name, []).append(tuple(output.shape))
                order.append(name)

        return seen

    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    maps = {name for name, shapes in calls.items() if all(len(s) >= 4 and s[-1] * s[-2] > 1 for s in shapes)}
    if wanted is not None:
        if wanted not in maps:
            raise GeomsslError(f"--layer {wanted}", "a layer that gives maps", nearest(wanted, maps), reason="unknown-name")
        if len(calls[wanted]) > 1:
            raise GeomsslError(
                f"gradcam at {wanted}, which is called {len(calls[wanted])} times in a pass", "a layer that is called once",
                reason="reused-layer",
            )
        return model.get_submodule(wanted)
    for name in reversed(order):
        if name in maps and len(calls[name]) == 1:
            return model.get_submodule(name)
    raise GeomsslError("gradcam on a network without a layer that gives maps once", "another method", reason="no-maps")


class _ReLUsAsModules(nn.Module):
    """The model with every call of ReLU, by module or by function, in place or reused, led through a module of its own.

    captum changes the gradients of nn.ReLU modules only, and keeps one gradient for each: a function would pass unseen, and
    the calls of a reused module would be mixed up.
    """

    def __init__(self, model: nn.Module, images: Tensor, method: str) -> None:
        super().__init__()
        self.model = model
        self.relus = nn.ModuleList()
        with torch.no_grad():
            count = self._counted(images)
        if not count:
            raise GeomsslError(f"{method} on a network that calls no ReLU", "another method", reason="no-relu")
        # modules of the model that are ReLUs would be hooked a second time
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.ReLU):
                    setattr(module, name, _Called(child.inplace))
        self.relus.extend(nn.ReLU() for _ in range(count))

    def _counted(self, images: Tensor) -> int:
        route = _Route(None)
        with route:
            self.model(images)
        return route.calls

    def forward(self, images: Tensor) -> Tensor:
        with _Route(self.relus):
            return self.model(images)


class _Called(nn.Module):
    """ReLU as a function call, for `_Route` to lead elsewhere."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=self.inplace)


class _Route(TorchFunctionMode):
    """Leads the k-th call of ReLU in a pass through the k-th module; counts calls where there are no modules."""

    def __init__(self, relus: nn.ModuleList | None) -> None:
        super().__init__()
        self.relus, self.calls = relus, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # inside this function the mode is off, so that the modules' own calls are not led astray
        if getattr(func, "__name__", "") not in RELUS:
            return func(*args, **kwargs)
        self.calls += 1
        if self.relus is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        # a tensor of its own: captum's hook changes all of the gradient that its input receives
        found = self.relus[self.calls - 1](x.clone())
        inplace = kwargs.get("inplace", args[1] if len(args) > 1 else False) or func.__name__ == "relu_"
        return x.copy_(found) if inplace else found


def _copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with frozen parameters: hooks and what a failure leaves behind stay with it."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without captum's remarks on what it is asked to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def infidelity(
    method: str, model: nn.Module, images: Tensor, targets: Tensor, attributions: Tensor, *, noise: float = 0.1,
    samples: int = 20, seed: int = 0,
) -> Tensor:
    """Infidelity of attributions a (n, 1 or C, H, W), one number an image (n,), float64:

        INFD = E_I[ (b <I, a> - (f(x) - f(x - I)))^2 ],     I Gaussian with that standard deviation in every pixel

    with b the factor that makes it smallest, so that only the shape of a counts (Yeh et al. 2019; captum's `normalize`). The
    units are those of f squared; a = 0 gives E (f(x) - f(x - I))^2. A map without channels stands for each of them. A map that
    is never negative cannot tell more from less, and pays for it here.
    """
    from captum.metrics import infidelity as measure

    draws = generator(seed, f"infidelity-{method}")

    def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
        change = noise * torch.randn(x.shape, generator=draws, dtype=torch.float32).to(x)
        return change, x - change

    spread = attributions.expand_as(images).contiguous().to(images)
    with quiet(), torch.no_grad():
        found = measure(model, perturb, images, spread, target=targets.to(images.device), n_perturb_samples=samples,
                        max_examples_per_batch=max(len(images), 256), normalize=True)
    # captum multiplies the square out, so that rounding may leave less than nothing
    return torch.as_tensor(found).detach().double().cpu().clamp_min(0)


def max_sensitivity(
    method: str, model: nn.Module, images: Tensor, targets: Tensor, settings: Settings | None = None, *,
    radius: float = 0.02, samples: int = 10, seed: int = 0,
) -> Tensor:
    """Max-sensitivity of a method, one number an image (n,), float64:

        max over draws of ||a(x + d) - a(x)|| / ||a(x)||,     d uniform in [-radius, radius] in every pixel, f the same logit

    Source: Yeh et al. 2019. The maximum of `samples` draws is a lower bound of the maximum over the cube. The unperturbed
    a(x) of length zero counts as 1, as captum has it.
    """
    from captum.metrics import sensitivity_max

    draws = generator(seed, f"sensitivity-{method}")

    def perturb(x: Tensor, size: float) -> Tensor:
        return x + size * (2 * torch.rand(x.shape, generator=draws, dtype=torch.float32).to(x) - 1)

    def explain(x: Any, target: Tensor) -> Any:
        # captum hands over a tuple first and a tensor later, and wants the like back
        if isinstance(x, tuple):
            return tuple(explain(one, target) for one in x)
        return attribution(method, model, x, target, settings).contiguous()

    with quiet():
        found = sensitivity_max(explain, images, perturb, perturb_radius=radius, n_perturb_samples=samples,
                                max_examples_per_batch=max(len(images), 256), target=targets.to(images.device))
    return found.detach().double().cpu()
