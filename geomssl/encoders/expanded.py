"""Expanded: a convolution whose filters are a fixed linear function of fewer weights, worked out once and not at every call."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from geomssl.encoders.base import in_transform

# the weight at its address, its version, the filters, and what the weight was
Kept = tuple[Tensor, int, Tensor, Tensor | None]


class Expanded(nn.Module):
    """A module with a `weight` and the filters L(weight), L linear: the same numbers several times, or sums of fixed ones.

    `filters()` gives L(weight). They are kept until the weight is written to: in eval mode without gradients for good, with
    gradients until a backward pass has gone through them, so that all calls of a training step share one expansion and
    one gradient; over several backward passes of one step, see Held. A write that PyTorch does not count, as through
    `weight.data`, is seen after a backward pass, `train()` or `refresh()`; with gradients on the CPU, always. Inside
    torch.func and torch.compile, and with a weight that stands in for the parameter, nothing is kept.
    """

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept | None = None
        # the filters of a Held, and the version of the weight that they belong to
        self._held: tuple[Tensor, int] | None = None

    @abstractmethod
    def expand(self, weight: Tensor) -> Tensor:
        """The filters L(weight), contiguous."""

    @abstractmethod
    def collect(self, filters: Tensor) -> Tensor:
        """The transpose of L: what filters of the shape of L(weight) send back to the weight."""

    def filters(self) -> Tensor:
        """L(weight)."""
        weight = self.weight
        learns = torch.is_grad_enabled() and weight.requires_grad
        if (
            torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter) or weight.is_inference() or in_transform()
        ):
            return self.expand(weight)
        if self._held is not None and self._held[1] == weight._version:
            return self._held[0]
        if self.training and not learns:
            return self.expand(weight)
        if self._kept is None or not self._fresh(self._kept, weight, learns):
            found: Tensor = _Expansion.apply(weight, self) if learns else self.expand(weight.detach())
            # The detached weight keeps its memory from being handed to another tensor at the same address.
            self._kept = weight.detach(), weight._version, found, weight.detach().clone() if self._compares(learns) else None
        return self._kept[2]

    def _compares(self, learns: bool) -> bool:
        # Finite differences and some optimizers write through `weight.data`; on a GPU a look would wait for it.
        return learns and self.weight.device.type == "cpu"

    def _fresh(self, kept: Kept, weight: Tensor, learns: bool) -> bool:
        address, version, filters, copy = kept
        same = address.data_ptr() == weight.data_ptr() and version == weight._version and filters.requires_grad == learns
        return same and (copy is None or torch.equal(copy, weight))

    def refresh(self) -> None:
        """Forget the kept filters."""
        self._kept = None

    def train(self, mode: bool = True) -> Expanded:
        self._held = None
        self.refresh()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refresh()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_held": None}


class Held:
    """The filters of every Expanded below a module, worked out once for several passes and backward passes of one step.

    Gradients gather at the filters; release() sends their sum to the weights. L is linear, so that is the sum of what each
    backward pass would have sent. The weights must not change in between. torch.compile holds nothing: it expands in its graph.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = [module for module in root.modules() if isinstance(module, Expanded)]
        for module in self.modules:
            weight = module.weight
            # in the weight's own precision, in which the gradients of many passes are summed
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                module._held = module.expand(weight).requires_grad_(weight.requires_grad), weight._version

    def release(self) -> None:
        """Add the gathered gradients to those of the weights, and hold nothing any more."""
        for module in self.modules:
            held, module._held = module._held, None
            if held is None or held[0].grad is None:
                continue
            found = module.collect(held[0].grad)
            module.weight.grad = found if module.weight.grad is None else module.weight.grad + found


class _Expansion(torch.autograd.Function):
    """L with its transpose. It saves no tensor, so that one expansion may serve several backward passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, module: Expanded) -> Tensor:
        ctx.module = module
        return module.expand(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # What follows a backward pass is mostly a step, and not every optimizer lets PyTorch count its writes.
        ctx.module.refresh()
        return ctx.module.collect(gradient), None
