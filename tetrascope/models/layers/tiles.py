"""How a picture is cut into views for a ViT of fixed input size, and how its pixels become that ViT's patch rows.

Geometry first: from sizes alone, so that token counts are known without opening a picture. Then the pixels, with
Pillow's BICUBIC as transformers' processors without torchvision (…Pil) use it. Two families of cuts: LLaVA's AnyRes
(aspect kept, black borders, cut back off the features) and InternVL's dynamic tiling (stretched to a grid of tiles).

Resizing for CLIP (shortest edge and centre crop) and SigLIP is left to transformers' CLIPImageProcessorPil and
SiglipImageProcessorPil.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from tetrascope.errors import UserError

BICUBIC = Image.Resampling.BICUBIC


def check_size(width: int, height: int) -> None:
    """Raises UserError for a picture or frame without pixels."""
    if width < 1 or height < 1:
        raise UserError(
            f"an image or frame has {width}x{height} pixels, expected at least 1x1; leave it out of the data"
        )


# --- LLaVA AnyRes: geometry


def select_resolution(width: int, height: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The canvas (height, width) of `pinpoints`, also (height, width), that keeps most of the picture.

    Most effective pixels, min(⌊w·s⌋·⌊h·s⌋, w·h) with s the scale that fits; then least waste; then the first. Source:
    LLaVA-NeXT `llava/mm_utils.py`, `select_best_resolution`.
    """
    check_size(width, height)
    if not pinpoints:
        raise UserError("image_grid_pinpoints is empty, expected a list of [height, width]")
    best: tuple[int, int] | None = None
    best_score = (0, 0)
    for canvas_height, canvas_width in pinpoints:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        score = (effective, effective - canvas_width * canvas_height)
        if best is None or score > best_score:
            best, best_score = (canvas_height, canvas_width), score
    if best is None or best_score[0] == 0:
        raise UserError(f"an image of {width}x{height} pixels is too narrow for every one of image_grid_pinpoints")
    return best


def anyres_grid(width: int, height: int, pinpoints: Sequence[Sequence[int]], crop: int = 384) -> tuple[int, int]:
    """(rows, columns) of crops of `crop`² pixels; the base view comes on top."""
    canvas_height, canvas_width = select_resolution(width, height, pinpoints)
    if canvas_height % crop or canvas_width % crop:
        raise UserError(
            f"image_grid_pinpoints has [{canvas_height}, {canvas_width}], expected multiples of the ViT's {crop} pixels"
        )
    return canvas_height // crop, canvas_width // crop


def unpad_crop(width: int, height: int, rows: int, columns: int) -> tuple[slice, slice]:
    """The rows and columns of a [rows, columns] feature map that show the picture, not the borders around it.

    Cuts (current − new) // 2 from both ends of the padded axis, with new = int(round(side · scale, 7)) as transformers
    does (`modeling_llava_onevision.py`, `unpad_image`); the original does not round before int.
    """
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(cut, rows - cut), slice(0, columns)
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(cut, columns - cut)


def downsampled(rows: int, columns: int, side: int = 27, max_views: int = 9) -> tuple[int, int]:
    """The feature map's size after the bilinear shrink that anyres_max_N asks for: unchanged unless r > 1.1.

    r = √(rows·columns / (max_views·side²)), size (⌊rows/r⌋, ⌊columns/r⌋). Source: LLaVA-NeXT `llava/model/
    llava_arch.py`, and arXiv 2408.03326, figure 2.
    """
    ratio = math.sqrt(rows * columns / (max_views * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def anyres_tokens(
    width: int,
    height: int,
    pinpoints: Sequence[Sequence[int]],
    *,
    crop: int = 384,
    side: int = 27,
    max_views: int = 9,
) -> int:
    """LLM tokens of one picture: side² of the base view, and the crops' feature map with a newline after each row."""
    grid_rows, grid_columns = anyres_grid(width, height, pinpoints, crop)
    rows, columns = unpad_crop(width, height, grid_rows * side, grid_columns * side)
    n_rows, n_columns = downsampled(rows.stop - rows.start, columns.stop - columns.start, side, max_views)
    return side**2 + n_rows * (n_columns + 1)


# --- InternVL dynamic tiling: geometry


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int, rule: str) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_tiles ≤ columns·rows ≤ max_tiles, by area. The rules differ inside one area."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    if rule == "original":
        # The original sorts a Python set, so that grids of one area stay in the set's order, which in CPython follows
        # from the numbers and the order of insertion (smaller upper bounds on the side first).
        grids.sort(key=lambda grid: max(max(grid), min_tiles))
        return tuple(sorted(set(grids), key=lambda grid: grid[0] * grid[1]))
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def dynamic_grid(
    width: int,
    height: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile: int = 448,
    rule: Literal["original", "hf"] = "original",
) -> tuple[int, int]:
    """(columns, rows) of tiles of `tile`² pixels: the grid whose columns/rows is nearest to width/height.

    On an exact tie a later, hence usually larger, grid replaces the earlier one if the picture covers more than half of
    its pixels. Source: OpenGVLab/InternVL `internvl/train/dataset.py`, `find_closest_aspect_ratio`; rule "hf":
    transformers' `image_processing_pil_got_ocr2.py`, `get_optimal_tiled_canvas`. They visit grids of equal area in
    different orders, which shows only where two of one area are equally near and no other is nearer: not at all with
    min_tiles = 1.
    """
    check_size(width, height)
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(f"min_tiles = {min_tiles} and max_tiles = {max_tiles}: expected 1 <= min_tiles <= max_tiles")
    best, best_distance = (1, 1), math.inf
    for columns, rows in _grids(min_tiles, max_tiles, rule):
        distance = abs(width / height - columns / rows)
        if distance < best_distance or (
            distance == best_distance and width * height > 0.5 * tile * tile * columns * rows
        ):
            best, best_distance = (columns, rows), distance
    return best


# --- pixels


def rgb(image: Image.Image) -> Image.Image:
    """Three channels; transparent pixels are laid over white, as transformers' `convert_to_rgb` does."""
    if image.mode == "RGB":
        return image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _cut(image: Image.Image, tile: int) -> list[Image.Image]:
    """Squares of `tile`² pixels, row by row."""
    return [
        image.crop((left, top, left + tile, top + tile))
        for top in range(0, image.height, tile)
        for left in range(0, image.width, tile)
    ]


def anyres_views(image: Image.Image, pinpoints: Sequence[Sequence[int]], crop: int = 384) -> list[Image.Image]:
    """The base view (the whole picture, stretched to a square), then the crops row by row; all crop x crop pixels.

    The crops' source keeps the aspect ratio (the other side rounded up) and is centred on black. Source: LLaVA-NeXT
    `llava/mm_utils.py`, `process_anyres_image`.
    """
    image = rgb(image)
    rows, columns = anyres_grid(image.width, image.height, pinpoints, crop)
    width, height = columns * crop, rows * crop
    scale_w, scale_h = width / image.width, height / image.height
    if scale_w < scale_h:
        size = width, min(math.ceil(image.height * scale_w), height)
    else:
        size = min(math.ceil(image.width * scale_h), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return [image.resize((crop, crop), BICUBIC), *_cut(canvas, crop)]


def dynamic_tiles(
    image: Image.Image,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile: int = 448,
    *,
    thumbnail: bool = True,
    rule: Literal["original", "hf"] = "original",
) -> list[Image.Image]:
    """The tiles of `dynamic_grid` row by row, then the whole picture as a last tile if there is more than one."""
    image = rgb(image)
    columns, rows = dynamic_grid(image.width, image.height, min_tiles, max_tiles, tile, rule)
    tiles = _cut(image.resize((columns * tile, rows * tile), BICUBIC), tile)
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile, tile), BICUBIC))
    return tiles


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centred on a square of the longer side, coloured int(255 · mean).

    Source: LLaVA `llava/mm_utils.py`, `expand2square`.
    """
    image = rgb(image)
    if image.width == image.height:
        return image
    side = max(image.size)
    red, green, blue = (int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def normalized(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(pixel/255 − mean) / std: float32 `[n, 3, height, width]` of `n` pictures of one size.

    Rounded as transformers' Pil processors do: pixel · (1/255) in float64, then float32.
    """
    pixels = np.stack([np.asarray(rgb(image)) for image in images])
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    out = (scaled - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def patchify(images: np.ndarray, patch: int) -> np.ndarray:
    """float32 `[n, C, H, W]` -> rows `[n·(H/patch)·(W/patch), C·patch·patch]`, patches row by row.

    A row's order is (channel, row, column): a Conv2d with kernel = stride = patch is `rows @ weight.view(E, -1).T`.
    """
    n, channels, height, width = images.shape
    if height % patch or width % patch:
        raise UserError(f"a view has {width}x{height} pixels, expected multiples of the ViT's patch of {patch} pixels")
    rows, columns = height // patch, width // patch
    cut = images.reshape(n, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cut).reshape(n * rows * columns, channels * patch * patch)
