"""InternVL: InternViT, pixel shuffle, adaptor, and an InternLM2, Qwen2 or Llama decoder, over packed sequences."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tetrascope.models.family import Stage
from tetrascope.models.internvl.config import InternVLConfig
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.collect import Collect
from tetrascope.models.layers.vit import VisionTransformer
from tetrascope.models.layers.vlm import VisionLanguageModel


class Adaptor(nn.Module):
    """Pixel shuffle, then LayerNorm, linear, GELU, linear (arXiv 2404.16821 §3.1; `mlp1` of OpenGVLab's
    modeling_internvl_chat.py): `[N, E]` -> one feature of the decoder's width for every 2 x 2 patches, `[F, H]`.

    The rows of a tile are its class token, which is dropped, and its patches in the order of patch_order(): the four
    of a block follow each other, so that pixel shuffle is a reshape. Rows after the last whole tile are padding.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.collect = Collect()
        self.norm = nn.LayerNorm(config.shuffled_width)
        self.fc1 = nn.Linear(config.shuffled_width, config.decoder.hidden)
        self.fc2 = nn.Linear(config.decoder.hidden, config.decoder.hidden)
        self.rows = config.vision.rows

    def forward(self, x_NE: Tensor) -> Tensor:
        x_NE = self.collect(x_NE)
        tiles = len(x_NE) // self.rows
        patches_TPE = x_NE[: tiles * self.rows].unflatten(0, (tiles, self.rows))[:, 1:]
        shuffled_FS = patches_TPE.reshape(-1, *self.norm.normalized_shape)
        return self.fc2(F.gelu(self.fc1(self.norm(shuffled_FS))))


class InternVL(VisionLanguageModel):
    """The part of InternVL that `stage` names."""

    def __init__(self, config: InternVLConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__(
            config.decoder,
            stage,
            attend,
            vision=lambda: VisionTransformer(config.vision, attend),
            adaptor=lambda: Adaptor(config),
        )
