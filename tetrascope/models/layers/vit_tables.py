"""Checkpoint names of the plain vision transformer (layers/vit.py) in transformers' CLIP and SigLIP."""

from __future__ import annotations

from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.weights import Piece, WeightMap, whole


def clip_weights(shape: ViTShape, prefix: str, ours: str = "vision.") -> WeightMap:
    """Parameters of a VisionTransformer called `ours` -> tensors of a CLIP or SigLIP tower called `prefix`.

    prefix: such as `vision_tower.vision_model.`. The shape says what the checkpoint has: a class embedding and
    `pre_layrnorm` (so spelled there) in CLIP, a patch bias in SigLIP, `post_layernorm` in both. Source: transformers,
    clip/modeling_clip.py and siglip/modeling_siglip.py.
    """
    e = shape.width
    table: dict[str, tuple[Piece, ...]] = {}

    def linear(mine: str, theirs: tuple[str, ...], rows: int, columns: int) -> None:
        table[f"{ours}{mine}.weight"] = tuple(whole(f"{prefix}{name}.weight", (rows, columns)) for name in theirs)
        table[f"{ours}{mine}.bias"] = tuple(whole(f"{prefix}{name}.bias", (rows,)) for name in theirs)

    def norm(mine: str, theirs: str) -> None:
        for part in ("weight", "bias"):
            table[f"{ours}{mine}.{part}"] = (whole(f"{prefix}{theirs}.{part}", (e,)),)

    kernel = (e, shape.channels, shape.patch, shape.patch)
    table[f"{ours}patches.project.weight"] = (whole(f"{prefix}embeddings.patch_embedding.weight", kernel),)
    if shape.patch_bias:
        table[f"{ours}patches.project.bias"] = (whole(f"{prefix}embeddings.patch_embedding.bias", (e,)),)
    places = whole(f"{prefix}embeddings.position_embedding.weight", (shape.rows, e))
    table[f"{ours}patches.places.weight"] = (places,)
    if shape.class_token:
        table[f"{ours}patches.class_token.weight"] = (whole(f"{prefix}embeddings.class_embedding", (e,)),)
    if shape.pre_norm:
        norm("pre_norm", "pre_layrnorm")
    for i in range(shape.layers):
        block, layer = f"blocks.{i}", f"encoder.layers.{i}"
        norm(f"{block}.norm1", f"{layer}.layer_norm1")
        norm(f"{block}.norm2", f"{layer}.layer_norm2")
        linear(f"{block}.attention.qkv", tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv"), e, e)
        linear(f"{block}.attention.proj", (f"{layer}.self_attn.out_proj",), e, e)
        linear(f"{block}.mlp.fc1", (f"{layer}.mlp.fc1",), shape.mlp, e)
        linear(f"{block}.mlp.fc2", (f"{layer}.mlp.fc2",), e, shape.mlp)
    if shape.post_norm:
        norm("post_norm", "post_layernorm")
    return table
