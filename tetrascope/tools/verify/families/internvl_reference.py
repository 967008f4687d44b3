"""InternVL with InternLM2 and V2PE, written from the equations: one sample, no packing, no fused kernels, fp32.

It shares nothing with tetrascope/models but the configuration object: attention is a softmax over a full matrix of
scores, patches are embedded by a convolution, pixel shuffle is written element by element, positions are counted token
by token in fp64. Parameters have the names of OpenGVLab's checkpoints.

Sources: InternViT and adaptor, arXiv 2404.16821 §3.1 and LayerScale, arXiv 2103.17239 eq. 3; InternLM2, arXiv
2403.17297 §2.2 (the layout of Wqkv: figure 2); rotary positions, arXiv 2104.09864 eq. 34; V2PE, arXiv 2412.09616 eq. 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.internvl.config import InternVLConfig


class Attn(nn.Module):
    """Full attention of all rows of a tile."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        tiles, rows, width = x.shape
        q, k, v = (
            part.reshape(tiles, rows, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(width // self.heads)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Two linears with a GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """x + ls1·attn(norm1(x)), then x + ls2·mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attn(width, heads)
        self.mlp = Mlp(width, inner)
        self.ls1 = nn.Parameter(torch.ones(width))
        self.ls2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class VisionEmbeddings(nn.Module):
    """Class token, patches, positions: pictures `[n, 3, s, s]` -> `[n, 1 + patches, E]`."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        v = config.vision
        patches = (v.image // v.patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, v.width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + patches, v.width))
        self.patch_embedding = nn.Conv2d(3, v.width, kernel_size=v.patch, stride=v.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class VisionEncoder(nn.Module):
    """All layers; nothing after the last."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        v = config.vision
        self.layers = nn.ModuleList(VisionLayer(v.width, v.heads, v.mlp) for _ in range(v.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """InternViT: pictures to features of their patches, the class token's left out, `[n, side, side, E]`."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.side = config.vision.image // config.vision.patch

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.embeddings(pixels))[:, 1:].unflatten(1, (self.side, self.side))


def pixel_shuffle(x: Tensor) -> Tensor:
    """`[n, s, s, E]` -> `[n, (s/2)², 4E]`: what is at (2i + a, 2j + b) is part 2a + b of feature (i, j)."""
    side = x.shape[1] // 2
    features = []
    for i in range(side):
        for j in range(side):
            block = [x[:, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)]
            features.append(torch.cat(block, dim=-1))
    return torch.stack(features, dim=1)


class RMSNorm(nn.Module):
    """x / rms(x) · weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + d/2) of `[T, d]` turned by position·θ^(−2i/d); angles in fp64."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = positions[:, None] * (1.0 / theta**exponents)[None]
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention. Rows of wqkv: for each key/value head its query heads, its key, its value."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        d = config.decoder
        self.width = d.hidden // d.heads
        self.kv_heads, self.group, self.theta = d.kv_heads, d.heads // d.kv_heads, d.rope_theta
        self.wqkv = nn.Linear(d.hidden, (d.heads + 2 * d.kv_heads) * self.width, bias=False)
        self.wo = nn.Linear(d.hidden, d.hidden, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        out = []
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)
        for block in self.wqkv(x).chunk(self.kv_heads, dim=-1):
            *queries, key, value = block.split(self.width, dim=-1)
            key = rotated(key, positions, self.theta)
            for query in queries:
                scores = rotated(query, positions, self.theta) @ key.T / math.sqrt(self.width)
                out.append((scores + mask).softmax(-1) @ value)
        return self.wo(torch.cat(out, dim=-1))


class FeedForward(nn.Module):
    """w2(silu(w1(x)) · w3(x))."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        d = config.decoder
        self.w1 = nn.Linear(d.hidden, d.intermediate, bias=False)
        self.w3 = nn.Linear(d.hidden, d.intermediate, bias=False)
        self.w2 = nn.Linear(d.intermediate, d.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


class LanguageLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        d = config.decoder
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(d.hidden, d.rms_eps)
        self.ffn_norm = RMSNorm(d.hidden, d.rms_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2Model(nn.Module):
    """Embedded tokens `[T, H]` and positions to hidden states."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        d = config.decoder
        self.tok_embeddings = nn.Embedding(d.vocab, d.hidden)
        self.layers = nn.ModuleList(LanguageLayer(config) for _ in range(d.layers))
        self.norm = RMSNorm(d.hidden, d.rms_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)


class InternLM2(nn.Module):
    """With its output head."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.decoder.hidden, config.decoder.vocab, bias=False)


def v2pe_positions(visual: list[bool], stride: float) -> Tensor:
    """Positions fp64 `[T]`: a visual token stride/256 after what is before it, text one after the next whole number.

    stride 256 counts visual tokens like text.
    """
    found: list[float] = []
    last = -1.0
    for is_visual in visual:
        last = last + stride / 256 if is_visual else math.ceil(last) + 1
        found.append(last)
    return torch.tensor(found, dtype=torch.float64)


class Reference(nn.Module):
    """Token ids `[T]` and pictures `[tiles, 3, s, s]` or None of one sample to logits `[T, V]`."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        v, hidden = config.vision, config.decoder.hidden
        self.config = config
        self.vision_model = VisionModel(config)
        self.language_model = InternLM2(config)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * v.width), nn.Linear(4 * v.width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        visual = ids == self.config.image_token_id
        x = self.language_model.model.tok_embeddings(ids)
        if pixels is not None:
            features = self.mlp1(pixel_shuffle(self.vision_model(pixels))).flatten(0, 1)
            x = x.masked_scatter(visual[:, None], features)
        rule = self.config.positions
        stride = rule.stride if rule.rule == "v2pe_fix" else 256
        positions = v2pe_positions(visual.tolist(), stride)
        return self.language_model.output(self.language_model.model(x, positions))
