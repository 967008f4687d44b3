"""LongVILA against a reference: transformers' SigLIP and Qwen2, with VILA's projector and fusion written here.

transformers has no VILA; VILA itself is these two models with a projector between. The projector (VILA, arXiv
2312.07533 §3 and its base_projector.py) groups patches element by element, and visual tokens are put into the
embeddings one after another, so that nothing is shared with tetrascope/models. Positions are counted token by token.

Frames have 3 x 3 patches, padded to 4 x 4, hence 4 features; the picture's last pixels belong to no patch. Matrices are
scaled up, since default-initialised attention is flat and blind to positions: the decoder's and projector's by 5,
SigLIP's, which transformers initialises wider, by 1.5; its position table is large enough to matter beside the patches.
With 6 and 3 the softmax of one layer after another magnifies rounding to more than 1e-5 of a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tetrascope.engine.data.document import Document
from tetrascope.models.layers.positions import PositionRule
from tetrascope.models.longvila import FAMILY
from tetrascope.models.longvila.config import LongVilaConfig, LongVilaDecoder, LongVilaVision, clip, picture
from tetrascope.models.media import Media
from tetrascope.tools.verify.case import KEY_BIASES, OPTIMIZER, Case, Numbers, tensor_options, train_reference

WEIGHT_SCALE, VISION_SCALE = 5.0, 1.5
IMAGE, NEWLINE, EOS, PAD = range(4)
V2PE_STRIDE = 72
"""Four tokens of a frame span 288/256 of a token: text after it must round up."""


@dataclass(frozen=True)
class Clip:
    """A video of that many frames."""

    frames: int


SHOWN = "image"

CONTENTS: tuple[tuple[int | str | Clip, ...], ...] = (
    (5, SHOWN, 9),
    (23,),
    (3, SHOWN, 4, SHOWN, 6),
    (7, Clip(6), 8),
    (SHOWN, 12),
    (17,),
    (4, SHOWN, 2, Clip(3), 5),
    (9, SHOWN, 5),
)
"""Samples of one global batch: numbers of text tokens, images and videos. All images have one size in LongVILA."""

UNSUPERVISED = 6
"""The sample with nothing to learn from: where it is a micro-batch of its own, its loss and gradients are zero."""


def tiny_config(
    projector: str = "mlp_downsample",
    order: str = "rows",
    rule: PositionRule = PositionRule(),
    tied: bool = False,
    pooling_head: bool = False,
) -> LongVilaConfig:
    """Five layers, two query heads for each key/value head, a vocabulary that does not divide by two; the last of
    three vision blocks and the final norm take no part."""
    return LongVilaConfig(
        decoder=LongVilaDecoder(
            hidden=64, intermediate=96, layers=5, heads=4, kv_heads=2, vocab=251, tied_embeddings=tied
        ),
        vision=LongVilaVision(width=32, layers=3, heads=2, mlp=44, image=14, patch=4, pooling_head=pooling_head),
        image_token_id=IMAGE,
        eos_token_id=EOS,
        pad_token_id=PAD,
        projector=projector,
        token_order=order,
        positions=rule,
    )


class TwoByTwo(nn.Module):
    """`[n, s², E]` -> `[n, ceil(s/2)², 4E]`: patch (2i + a, 2j + b) is part 2a + b of feature (i, j), zeros outside."""

    def __init__(self, side: int, order: str) -> None:
        super().__init__()
        self.side, self.order = side, order

    def forward(self, x: Tensor) -> Tensor:
        half = (self.side + 1) // 2
        places = [(i, j) for i in range(half) for j in range(half)]
        if self.order == "columns":
            places.sort(key=lambda place: (place[1], place[0]))
        features = [
            torch.cat([self._patch(x, 2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)], dim=-1) for i, j in places
        ]
        return torch.stack(features, dim=1)

    def _patch(self, x: Tensor, row: int, column: int) -> Tensor:
        if max(row, column) >= self.side:
            return torch.zeros_like(x[:, 0])
        return x[:, row * self.side + column]


class Projector(nn.Module):
    """VILA's `mm_projector`, its parameters numbered as there."""

    def __init__(self, config: LongVilaConfig) -> None:
        super().__init__()
        width, hidden = config.vision.width, config.decoder.hidden
        side = config.vision.image // config.vision.patch
        mlp = [nn.GELU(), nn.Linear(hidden, hidden)]
        self.layers: nn.Module
        if config.projector == "linear":
            self.layers = nn.Linear(width, hidden)
        elif config.projector == "mlp2x_gelu":
            self.layers = nn.Sequential(nn.Linear(width, hidden), *mlp)
        else:
            fold = TwoByTwo(side, config.token_order)
            self.layers = nn.Sequential(fold, nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden), *mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Reference(nn.Module):
    """The whole model, one sample at a time."""

    def __init__(self, config: LongVilaConfig) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

        d, v = config.decoder, config.vision
        siglip = SiglipVisionConfig(
            hidden_size=v.width,
            intermediate_size=v.mlp,
            num_hidden_layers=v.layers,
            num_attention_heads=v.heads,
            image_size=v.image,
            patch_size=v.patch,
            vision_use_head=v.pooling_head,
        )
        qwen2 = Qwen2Config(
            vocab_size=d.vocab,
            hidden_size=d.hidden,
            intermediate_size=d.intermediate,
            num_hidden_layers=d.layers,
            num_attention_heads=d.heads,
            num_key_value_heads=d.kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
            tie_word_embeddings=d.tied_embeddings,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        siglip._attn_implementation = qwen2._attn_implementation = "eager"
        self.vision_tower = SiglipVisionModel(siglip)
        self.mm_projector = Projector(config)
        self.llm: Any = Qwen2ForCausalLM(qwen2)
        self.stride = config.positions.stride / 256 if config.positions.rule == "v2pe_fix" else 1.0

    def features(self, pixels: Tensor) -> Tensor:
        """`[frames, 3, s, s]` -> `[frames, tokens, H]`: the states before SigLIP's last layer, projected."""
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        features: Tensor = self.mm_projector(states[-2])
        return features

    def forward(self, ids: Tensor, pixels: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Logits `[T, V]`. positions `[T]`, in tokens, override those of the reference itself."""
        embedded = list(self.llm.model.embed_tokens(ids))
        tokens = 0
        if pixels is not None:
            features = self.features(pixels)
            tokens = features.shape[1]
            waiting = iter(features.flatten(0, 1))
            for row, token in enumerate(ids.tolist()):
                if token == IMAGE:
                    embedded[row] = next(waiting)
        if positions is None:
            positions = v2pe_positions(ids, tokens, self.stride)
        inputs = {"inputs_embeds": torch.stack(embedded)[None], "position_ids": positions[None]}
        # With a mask given, transformers does not take a step other than 1 for the border of a packed sample.
        logits: Tensor = self.llm(**inputs, attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]
        return logits


def v2pe_positions(ids: Tensor, tokens: int, step: float) -> Tensor:
    """Position ids float32 `[T]`, one token after another (arXiv 2412.09616, eq. 4): text one further than the token
    before it, a frame's tokens `step` further; after a frame of `tokens` tokens, on from the next whole number."""
    positions: list[float] = []
    last, run = -1.0, 0
    for token in ids.tolist():
        last = last + step if token == IMAGE else last + 1.0
        positions.append(last)
        run = run + 1 if token == IMAGE else 0
        if run and run == tokens:
            last, run = float(np.ceil(last)), 0
    return torch.tensor(positions, dtype=torch.float32)


def name_on_disk(name: str) -> str:
    """Parameter of the reference -> name in VILA's layout, a folder for each part."""
    folder, _, inside = name.partition(".")
    return f"{folder}/vision_model.{inside}" if folder == "vision_tower" else f"{folder}/{inside}"


def make_document(
    config: LongVilaConfig, content: Sequence[int | str | Clip], seed: int, supervise: bool = True
) -> Document:
    """A sample of random text and random pixels; two thirds of its text tokens are supervised, or none.

    Each frame's visual tokens have a newline after them.
    """
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    supervised: list[bool] = []
    shown: list[Media] = []
    for part in content:
        if isinstance(part, int):
            ids += rng.integers(PAD + 1, config.decoder.vocab, part).tolist()
            supervised += (rng.random(part) < 2 / 3).tolist()
            continue
        one = clip(config, tuple(range(part.frames))) if isinstance(part, Clip) else picture(config, (14, 14))
        frames = len(one.frames)
        added = [*[IMAGE] * (one.tokens // frames), NEWLINE] * frames
        ids += added
        supervised += [False] * len(added)
        shown.append(one)
    patches = rng.standard_normal((sum(one.patches for one in shown), config.vision.patch_width), dtype=np.float32)
    ids_T = np.array(ids, dtype=np.int64)
    supervised[-1] = True  # at least one, however short the text
    return Document(
        ids_T=ids_T,
        positions_AT=FAMILY.positions(config, ids_T, shown, (seed, 0, 0)),
        weights_T=np.array(supervised, dtype=np.float32) * supervise,
        media=tuple(shown),
        patches=patches,
    )


def make_case(config: LongVilaConfig | None = None, seed: int = 0, steps: int = 3) -> Case:
    """Scaled random weights and two global batches' worth of samples."""
    config = config or tiny_config()
    torch.manual_seed(seed)
    model = oracle(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)  # biases and norms away from zero and one
            elif "position_embedding" in name:
                param.normal_(0, 0.5)
            elif "embed_tokens" not in name:
                param.mul_(VISION_SCALE if "vision_tower" in name else WEIGHT_SCALE)
    weights = {name_on_disk(n): p.detach().clone() for n, p in model.named_parameters()}
    documents = tuple(
        make_document(config, content, seed + i, supervise=i % len(CONTENTS) != UNSUPERVISED)
        for i, content in enumerate(CONTENTS * 2)
    )
    return Case("longvila", config, weights, documents, len(CONTENTS), steps, OPTIMIZER, KEY_BIASES)


def oracle(config: LongVilaConfig) -> Reference:
    """The reference of that shape, eager attention, fp32."""
    return Reference(config)


def variants() -> dict[str, Case]:
    """The cases of the certificate: a head of its own, as in 7B; a tied one, as in 1.5B, there with the old order of
    tokens, fractions of a position and an unused pooling head; and the projector of one linear, which no other family
    has. That of two row by row is divided as LLaVA's."""
    v2pe = PositionRule("v2pe_fix", V2PE_STRIDE)
    return {
        "untied": make_case(),
        "tied": make_case(tiny_config(order="columns", rule=v2pe, tied=True, pooling_head=True)),
        "linear": make_case(tiny_config("linear")),
    }


def pixels_of(config: LongVilaConfig, document: Document) -> Tensor | None:
    """The frames `[n, 3, s, s]` that a document's patch rows came from; pixels beyond the last whole patch are one."""
    if document.patches is None or not len(document.patches):
        return None
    v = config.vision
    side = v.image // v.patch
    grid = torch.from_numpy(document.patches).reshape(-1, side, side, 3, v.patch, v.patch)
    pixels = torch.ones(len(grid), 3, v.image, v.image)
    for row in range(side):
        for column in range(side):
            y, x = row * v.patch, column * v.patch
            pixels[:, :, y : y + v.patch, x : x + v.patch] = grid[:, row, column]
    return pixels


def forward(model: Reference, document: Document, config: LongVilaConfig, positions: Tensor | None = None) -> Tensor:
    """Logits `[T, V]` of one sample. positions `[T]`, in tokens, override those of the reference itself."""
    logits: Tensor = model(torch.from_numpy(document.ids_T), pixels_of(config, document), positions)
    return logits


def reference(case: Case, batches: Sequence[Sequence[Document]]) -> Numbers:
    """The oracle's losses, gradients and weights."""
    model = oracle(case.config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(case.weights[name_on_disk(name)])
    return train_reference(
        model,
        lambda model, document: forward(model, document, case.config),
        batches,
        case.optimizer,
        name_on_disk,
        tensor_options(case),
    )
