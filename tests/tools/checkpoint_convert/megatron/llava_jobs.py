"""Megatron-Core's LLaVAModel on a CPU, built from its own local layer specs."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.tools.checkpoint_convert.megatron.megatron_jobs import common_arguments, gpt_config, load, on_cpu
from tetrascope.models.layers.vit import ACTIVATIONS
from tetrascope.models.llava.config import LlavaConfig

IMAGE_PLACE = -200
"""Megatron-Core's token for an image, one for each."""


def build_llava(config: LlavaConfig, arguments: dict[str, Any]) -> Any:
    """The LLaVAModel of our configuration."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal import llava_model
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    v, d = config.vision, config.decoder
    language = gpt_config(arguments)
    plain = {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False}
    vision = dataclasses.replace(
        language,
        **plain,
        num_layers=v.used,
        hidden_size=v.width,
        ffn_hidden_size=v.mlp,
        num_attention_heads=v.heads,
        num_query_groups=v.heads,
        kv_channels=v.width // v.heads,
        layernorm_epsilon=v.norm_eps,
        activation_func=ACTIVATIONS[v.activation],  # Megatron-Core's own would be compiled first
        add_qkv_bias=True,
    )
    vision.vision_model_type = "clip"
    projection = dataclasses.replace(
        language, **plain, ffn_hidden_size=d.hidden, activation_func=torch.nn.functional.gelu
    )
    # As the specification stands, it asks for a causal mask, where its TransformerEngine twin asks for none.
    blocks = copy.deepcopy(get_vit_layer_with_local_spec())
    blocks.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    # The default LayerNorm is TransformerEngine's; without it, torch's, which does not take these arguments.
    encoder = functools.partial(CLIPViTModel, ln_pre_impl=WrappedTorchNorm)
    with mock.patch.object(llava_model, "CLIPViTModel", encoder):
        return llava_model.LLaVAModel(
            language_transformer_config=language,
            language_transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            language_vocab_size=arguments["padded_vocab_size"],
            language_max_sequence_length=512,
            vision_transformer_config=vision,
            vision_transformer_layer_spec=blocks,
            drop_vision_class_token=True,
            vision_projection_config=projection,
            vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            share_embeddings_and_output_weights=d.tied_embeddings,
            language_position_embedding_type="rope",
            language_rotary_base=arguments["rotary_base"],
            img_h=v.image,
            img_w=v.image,
            patch_dim=v.patch,
        )


def llava_logits(folder: Path, config: LlavaConfig, ids: Tensor, images: Tensor) -> Tensor:
    """`[T, V padded]` of a torch_dist folder's LLaVAModel. ids `[T']`: IMAGE_PLACE for each of `images`."""
    with on_cpu(), torch.no_grad():
        model = build_llava(config, common_arguments(folder)).eval()
        load(model, folder)
        positions = torch.arange(len(ids))[None]
        output, _ = model(images, ids[None], positions, None)
        found: Tensor = output[0]
        return found
