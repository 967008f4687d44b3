"""Position ids of a sample, plain or V2PE (arXiv 2412.09616 §3.2), and places of the patches of its tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tetrascope.errors import UserError
from tetrascope.models.internvl.config import SHUFFLE, InternVLConfig
from tetrascope.models.layers.positions import Draw, linear_positions
from tetrascope.models.media import Media, VisionLayout


def runs(config: InternVLConfig, media: Sequence[Media]) -> list[int]:
    """Lengths of the runs of visual tokens: a picture's tiles are one run, each frame of a video is one."""
    return [
        n for one in media for n in ([config.tile_tokens] * len(one.frames) if one.kind == "video" else [one.tokens])
    ]


def positions(config: InternVLConfig, ids_T: np.ndarray, media: Sequence[Media], draw: Draw) -> np.ndarray:
    """Position ids int64 `[1, T]` of one sample, in units of 1/256 of a token.

    Raises UserError when visual tokens and media disagree, and for a sample so long that the published model would
    change its rotary base (V2PE's models do not).
    """
    too_long = config.rope_scaling_factor and len(ids_T) > config.max_positions
    if too_long and config.positions.rule == "default":
        raise UserError(
            f"sample: {len(ids_T)} tokens, beyond max_position_embeddings={config.max_positions} the checkpoint asks "
            "for dynamic rotary scaling, which is not available; lower data.max_tokens, use V2PE "
            "(model.config.positions.rule), or set model.config.rope_scaling_factor to 0 to do without"
        )
    return linear_positions(ids_T == config.image_token_id, runs(config, media), config.positions, draw)


def patch_order(side: int) -> np.ndarray:
    """The order in which a tile's patches are fed: numbers int64 `[side²]` of patches counted row by row.

    Blocks of 2 x 2 patches row by row, inside a block row by row. Four of them, put side by side, are a feature of
    pixel shuffle: ps_version v2 of OpenGVLab's `pixel_shuffle` has channels in the order (row, column, channel).
    """
    grid = np.arange(side * side).reshape(side // SHUFFLE, SHUFFLE, side // SHUFFLE, SHUFFLE)
    return grid.transpose(0, 2, 1, 3).reshape(-1)


def vision_layout(config: InternVLConfig, media: Sequence[Media]) -> VisionLayout:
    """Place of every row in the position table, int64 `[1, N]` (0: class token); features become tokens in order."""
    tile = np.concatenate([[0], 1 + patch_order(config.vision.side)])
    tiles = sum(len(one.frames) for one in media)
    tokens = sum(one.tokens for one in media)
    return VisionLayout(torch.from_numpy(np.tile(tile, tiles)[None]), torch.arange(tokens)[None])
