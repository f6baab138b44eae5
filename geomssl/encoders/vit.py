"""Vision transformer: patches as tokens, pre-norm blocks, a class token apart; its patch tokens are a map of fibres."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from geomssl.encoders.base import Encoder, InputSettings, Normalise, in_transform
from geomssl.encoders.cnn import admit, coordinate_channels
from geomssl.errors import GeomsslError


class ViT(Encoder):
    """vit-small: 12 pre-norm blocks of width 384, 6 heads, MLP 4 times as wide (Dosovitskiy et al., Touvron et al. 2021).

    t = [class token; patch embedding] + position;  t += attention(norm1 t);  t += mlp(norm2 t);  out = norm(t).

    tokens(x) are the patch tokens (N, T, D) after the last norm, T = (H/p)(W/p), row by row; fibres (N, D, 1, H/p, W/p)
    are the same as a map. h is the class token after the last norm, or the mean of the patch tokens; pool(fibres) is
    always that mean. Names of the weights are timm's. No dropout, so a pass in train mode equals one in eval mode to rounding.

    Width 384, 12 blocks, patches of 16 on 224 x 224 RGB: 21,665,664 weights. `size` is the side of the images; needed
    with a position embedding, which is made for it.
    """

    class Config(InputSettings):
        name: Literal["vit-small"] = "vit-small"
        size: PositiveInt | None = Field(None, description="side of the images; the data's own when not given")
        patch: PositiveInt = Field(4, description="side of a patch")
        width: PositiveInt = Field(384, description="numbers in a token")
        depth: PositiveInt = Field(12, description="blocks")
        heads: PositiveInt = Field(6, description="attention heads of each block")
        mlp_ratio: PositiveInt = Field(4, description="hidden width of a block's MLP, in widths")
        position: Literal["learned", "sincos", "none"] = Field("learned", description="position embedding")
        class_token: bool = Field(True, description="a token that is no patch, read as h")
        h: Literal["class", "mean"] | None = Field(
            None, description="the class token, or the mean of the patch tokens; the class token where there is one"
        )
        coordinates: bool = Field(False, description="append two channels with the coordinates of each pixel, in [-1, 1]")

    pos_embed: Tensor | None
    cls_token: Tensor | None

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        super().__init__()
        config = config or self.Config.model_validate({})
        _check(config)
        self.in_channels, self.dim, self.coordinates = in_channels, config.width, config.coordinates
        self.patch, self.size = config.patch, None if config.position == "none" else config.size
        self.mean_of_tokens = config.h == "mean" or not config.class_token
        self.normalise = Normalise.of(config, in_channels)
        self.patch_embed = PatchEmbed(in_channels + 2 * config.coordinates, config.width, config.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.class_token else None
        side = (config.size or 0) // config.patch
        if config.position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, side**2 + config.class_token, config.width))
        else:
            embedded = sincos(side, config.width) if config.position == "sincos" else None
            if embedded is not None and config.class_token:
                embedded = F.pad(embedded, (0, 0, 1, 0))
            self.register_buffer("pos_embed", embedded, persistent=False)
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of deviation 0.02, cut at two deviations of 1, as timm's; biases zero; patches as a linear layer."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 or name in ("cls_token", "pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens (N, T, D) after the last norm, row by row from the top left; the class token is left out."""
        return self._run(images)[1]

    def fibres(self, images: Tensor) -> Tensor:
        rows, columns = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        return self.tokens(images).transpose(1, 2).unflatten(2, (1, rows, columns))

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))

    def forward(self, images: Tensor) -> Tensor:
        apart, tokens = self._run(images)
        return tokens.mean(dim=1) if self.mean_of_tokens or apart is None else apart

    def _run(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class token (N, D) or None, and the patch tokens (N, T, D)."""
        images = self.normalise(self._admit(images))
        if self.coordinates:
            images = torch.cat([images, coordinate_channels(images)], dim=1)
        tokens = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        tokens = self.norm(self.blocks(tokens))
        if self.cls_token is None:
            return None, tokens
        return tokens[:, 0], tokens[:, 1:]

    def _admit(self, images: Tensor) -> Tensor:
        height, width = admit(images, self.in_channels).shape[2:]
        if self.size is not None and (height, width) != (self.size, self.size):
            raise GeomsslError(
                f"images of {height}x{width} pixels for a vit-small with positions for {self.size}x{self.size}",
                f"{self.size}x{self.size}, or position none", reason="bad-images",
            )
        for side in (height, width):
            if side % self.patch:
                raise _indivisible(f"images of {height}x{width} pixels", side, self.patch)
        return images


class PatchEmbed(nn.Module):
    """Patches (N, C, p, p) of the images, each through one linear map: (N, T, D), row by row."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """t + attention(norm1 t), then t + mlp(norm2 t)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, mlp_ratio * width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v in each head, all heads joined by one linear map; q, k, v from one linear map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if in_transform() or (not self.training and torch.is_grad_enabled() and q.requires_grad):
            # the fused kernels have neither forward-mode nor second derivatives
            mixed = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


def sincos(side: int, width: int) -> Tensor:
    """Fixed positions (1, side², width): sines and cosines of the column, then of the row, at width / 4 frequencies
    10000^(-k / (width / 4)) each (Chen et al. 2021, MoCo v3).
    """
    quarter = width // 4
    rate = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [at.flatten().double()[:, None] * rate for at in (columns, rows)]
    parts = [f(angle) for angle in angles for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).to(torch.get_default_dtype())[None]


def _check(config: ViT.Config) -> None:
    """One line for settings that do not fit together."""
    where = "encoder vit-small"
    if config.position != "none":
        if config.size is None:
            raise GeomsslError(f"{where} without a size", "the side of the images, such as size=32", reason="bad-value")
        if config.size % config.patch:
            raise _indivisible(f"{where}: images of {config.size}x{config.size} pixels", config.size, config.patch)
    if config.width % config.heads:
        given = f"{where}: width {config.width} in {config.heads} heads"
        raise GeomsslError(given, "a width that the number of heads divides", reason="bad-value")
    if config.position == "sincos" and config.width % 4:
        raise GeomsslError(f"{where}: sincos positions of width {config.width}", "a multiple of 4", reason="bad-value")
    if config.h == "class" and not config.class_token:
        raise GeomsslError(f"{where}: h = class without a class token", "class_token=true, or h=mean", reason="bad-value")


def _indivisible(given: str, side: int, patch: int) -> GeomsslError:
    """The line for a side that the patch does not divide, with the nearest that it does and the patches that would fit."""
    below, above = side // patch * patch, -(-side // patch) * patch
    sides = f"{below} or {above}" if below else f"{above}"
    fitting = [p for p in range(1, side + 1) if side % p == 0]
    near = min(fitting, key=lambda p: abs(p - patch))
    return GeomsslError(f"{given} in patches of {patch}", f"a side of {sides}, or patch={near}", reason="bad-images")
