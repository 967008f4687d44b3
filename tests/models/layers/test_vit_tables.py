"""Names of vision transformers in checkpoints: those that transformers' CLIP and SigLIP have, each for its parameter.

That q, k and v are stacked in the right order, and that every name means the right parameter, is shown by equal hidden
states: transformers' random weights in our module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tetrascope.models.inputs import VisionInputs
from tetrascope.models.layers.attention import sdpa_attention
from tetrascope.models.layers.packed import Packed
from tetrascope.models.layers.tiles import patchify
from tetrascope.models.layers.vit import VisionTransformer, ViTShape
from tetrascope.models.layers.vit_tables import clip_weights
from tetrascope.models.weights import check_cover, logical_tensors

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = {"image_size": 42, "patch_size": 14}
CLIP = ViTShape(
    *(32, 3, 2, 48, 42),
    used=2,
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    activation="quick_gelu",
    norm_eps=1e-5,
    post_norm=True,
)
SIGLIP = ViTShape(*(32, 3, 2, 48, 42), activation="gelu_pytorch_tanh", post_norm=True)


def clip() -> Any:
    return CLIPVisionModel(CLIPVisionConfig(**SIZES, **PICTURE))


def siglip() -> Any:
    return SiglipVisionModel(SiglipVisionConfig(**SIZES, **PICTURE, vision_use_head=False))


@pytest.mark.parametrize(("shape", "make"), [(CLIP, clip), (SIGLIP, siglip)], ids=["clip", "siglip"])
@torch.no_grad()
def test_names_and_what_they_mean(shape: ViTShape, make: Any) -> None:
    torch.manual_seed(0)
    theirs = make()
    tensors = {f"tower.{name}": param for name, param in theirs.named_parameters()}
    for param in tensors.values():
        param.add_(torch.randn_like(param) * 0.1)  # no two tensors alike, no bias zero
    ours = VisionTransformer(shape, sdpa_attention)
    weights = clip_weights(shape, "tower.")
    check_cover(weights)
    assert {name: tensor.shape for name, tensor in logical_tensors(weights).items()} == {
        name: tuple(param.shape) for name, param in tensors.items()
    }
    assert weights.keys() == {f"vision.{name}" for name, _ in ours.named_parameters()}
    for name, param in ours.named_parameters():
        pieces = weights[f"vision.{name}"]
        param.copy_(torch.cat([tensors[piece.tensor.name].reshape(piece.tensor.matrix) for piece in pieces]))

    pixels = np.random.default_rng(0).standard_normal((2, 3, 42, 42), dtype=np.float32)
    rows = torch.from_numpy(patchify(pixels, 14)).view(2, 9, 588)
    if shape.class_token:
        rows = torch.cat((torch.zeros(2, 1, 588), rows), dim=1)
    places = torch.arange(shape.rows).repeat(2)[None]
    none = torch.empty(0, dtype=torch.int64)
    frames = Packed((shape.rows,) * 2)
    out = ours(VisionInputs(rows.flatten(0, 1), places, places, frames, None, 0, none, none[None], None))
    states = theirs(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
    expected = states[shape.used].flatten(0, 1)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_prefix_of_ours() -> None:
    other = clip_weights(CLIP, "", ours="tower.")
    assert other["tower.pre_norm.weight"][0].tensor.name == "pre_layrnorm.weight"
    assert {f"vision{name.removeprefix('tower')}" for name in other} == clip_weights(CLIP, "x.").keys()
