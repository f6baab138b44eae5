"""Gradient caching: a batch larger than memory, encoded twice in micro-batches, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomssl.encoders.base import Encoder
from geomssl.encoders.expanded import Held
from geomssl.transforms.base import Group

# "fibres" and "forward" of an encoder, each from images to features
Passes = Mapping[str, Callable[[Tensor], Tensor]]


class Through(Encoder):
    """Stands before an encoder for a step: its passes are the given ones (compiled, cached); all else is the encoder's own."""

    encoder: Encoder

    def __init__(self, encoder: Encoder, passes: Passes) -> None:
        super().__init__()
        # past nn.Module, which would register the encoder a second time
        object.__setattr__(self, "encoder", encoder)
        self.passes = passes

    @property
    def group(self) -> Group | None:  # type: ignore[override]
        return self.encoder.group

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.encoder.dim

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        return self.encoder.in_channels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["encoder"], name)

    def fibres(self, images: Tensor) -> Tensor:
        return self.passes["fibres"](images)

    def pool(self, fibres: Tensor) -> Tensor:
        return self.encoder.pool(fibres)

    def forward(self, images: Tensor) -> Tensor:
        return self.passes["forward"](images)


class _Call(NamedTuple):
    how: str
    images: Tensor
    features: Tensor
    parts: int
    random: list[Tensor]


class Cache(Through):
    """An encoder that remembers features instead of graphs.

        1. features f = encoder(images) in micro-batches, without a graph; the objective makes the loss L(f) of all of them
        2. backward() of L stops at f and leaves dL/df there
        3. replay() encodes each micro-batch again, with its graph, and sends dL/df through it

    By the chain rule the sum over micro-batches is dL/dw of the whole batch, exactly where rows do not meet inside the
    encoder. Train-mode BatchNorm is where they meet: the backbone sees micro-batches, the head the whole batch. Running
    statistics move in 3 alone, once an image; dropout draws in 3 what it drew in 1. Micro-batch i of k takes the rows
    i, i + k, i + 2k, ...: all are of one size, give or take a row, and each holds all views of its images when they come in
    one joint pass of N images a view, N a multiple of k. Filters that are expanded from fewer weights are worked out once a
    step, and their gradient goes back to the weights once (Held). A method of the encoder other than fibres() and forward()
    keeps its graph, as without caching. Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup, 2021.
    """

    def __init__(
        self, encoder: Encoder, passes: Passes, micro_batch: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__(encoder, passes)
        self.micro_batch, self.autocast = micro_batch, autocast
        self.calls: list[_Call] = []
        self.held: Held | None = None

    def fibres(self, images: Tensor) -> Tensor:
        return self._encode("fibres", images)

    def forward(self, images: Tensor) -> Tensor:
        return self._encode("forward", images)

    def _encode(self, how: str, images: Tensor) -> Tensor:
        parts = -(-len(images) // self.micro_batch)
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.encoder.parameters())
        if learns and self.held is None:
            self.held = Held(self.encoder)
        random = _random_state(images.device)
        buffers = [buffer.clone() for buffer in self.encoder.buffers()]
        with torch.no_grad():
            chunks = [self.passes[how](images[i::parts]) for i in range(parts)]
            for buffer, kept in zip(self.encoder.buffers(), buffers, strict=True):
                buffer.copy_(kept)
            features = chunks[0].new_empty(len(images), *chunks[0].shape[1:])
            for i, chunk in enumerate(chunks):
                features[i::parts] = chunk
        if learns:
            features.requires_grad_()
            self.calls.append(_Call(how, images, features, parts, random))
        return features

    def replay(self) -> None:
        """Send the gradients at the features, left there by backward(), through the encoder."""
        for call in self.calls:
            after = _random_state(call.images.device)
            _set_random_state(call.random, call.images.device)
            gradient = call.features.grad
            for i in range(call.parts if gradient is not None else 0):
                assert gradient is not None
                with self.autocast():
                    features = self.passes[call.how](call.images[i :: call.parts])
                features.backward(gradient[i :: call.parts])
            _set_random_state(after, call.images.device)
        self.calls.clear()
        if self.held is not None:
            self.held.release()
            self.held = None


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the global generators that a pass on this device may draw from; kept on the host, so nothing waits for the device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
