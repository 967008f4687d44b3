"""Names of LLaVA-OneVision's parameters in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tetrascope.models.layers.decoder_tables import decoder_weights
from tetrascope.models.layers.parts import language_part, own_layout, own_part, vision_part
from tetrascope.models.layers.vit_tables import clip_weights
from tetrascope.models.llava_onevision.config import LlavaOneVisionConfig
from tetrascope.models.llava_onevision.hf_config import to_hf, to_original
from tetrascope.models.weights import CheckpointLayout, WeightMap, renamed_layout, single_config, whole

TOWER = "vision_tower.vision_model."


def weights(config: LlavaOneVisionConfig) -> WeightMap:
    """The published layout of llava-hf, which transformers 4 and 5 both read. Tied: the head is the embedding."""
    d, v = config.decoder, config.vision
    return {
        **clip_weights(v, TOWER),
        "adaptor.fc1.weight": (whole("multi_modal_projector.linear_1.weight", (d.hidden, v.width)),),
        "adaptor.fc1.bias": (whole("multi_modal_projector.linear_1.bias", (d.hidden,)),),
        "adaptor.fc2.weight": (whole("multi_modal_projector.linear_2.weight", (d.hidden, d.hidden)),),
        "adaptor.fc2.bias": (whole("multi_modal_projector.linear_2.bias", (d.hidden,)),),
        "adaptor.newline": (whole("image_newline", (d.hidden,)),),
        **decoder_weights(d, "language_model.model.", "language_model.lm_head.weight"),
    }


def _tied_head(config: LlavaOneVisionConfig) -> Mapping[str, str]:
    tied = config.decoder.tied_embeddings
    return {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"} if tied else {}


_HUB = CheckpointLayout(weights=weights, configs=single_config(to_hf), copies=_tied_head)

LAYOUTS = {
    "hub": _HUB,
    # What transformers 5 calls the tensors in memory, and writes with save_original_format=False.
    "in-memory": renamed_layout(
        _HUB,
        [
            (r"vision_tower\.vision_model\.", "model.vision_tower."),
            (r"language_model\.lm_head", "lm_head"),
            (r"language_model\.model\.", "model.language_model."),
            (r"", "model."),
        ],
    ),
    # What transformers 4.52 and later wrote.
    "transformers-4.52": renamed_layout(
        _HUB,
        [
            (r"language_model\.lm_head", "lm_head"),
            (r"language_model\.model\.", "model.language_model."),
            (r"", "model."),
        ],
    ),
    # What the original repository, LLaVA-NeXT, reads and writes (lmms-lab's checkpoints).
    "original": renamed_layout(
        CheckpointLayout(
            weights=weights,
            configs=single_config(to_original),
            copies=_tied_head,
            ignored=(r".*\.position_ids", r".*\.inv_freq"),
        ),
        [
            (r"language_model\.lm_head", "lm_head"),
            (r"language_model\.model\.", "model."),
            (r"multi_modal_projector\.linear_1", "model.mm_projector.0"),
            (r"multi_modal_projector\.linear_2", "model.mm_projector.2"),
            (r"vision_tower\.", "model.vision_tower.vision_tower."),
            (r"", "model."),
        ],
    ),
}


_ADAPTOR = own_part(LAYOUTS, r"adaptor\..*")
_PROJECTOR = own_layout(LAYOUTS["original"], r"adaptor\.fc[12]\..*")

PARTS = {
    "language": language_part("qwen2"),
    "vision": vision_part("siglip", dropped=1),
    # `mm_projector.bin`, which the original's first stage writes, has no newline.
    "adaptor": replace(_ADAPTOR, layouts={**_ADAPTOR.layouts, "projector": _PROJECTOR}),
}


def initial(config: LlavaOneVisionConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """How a tensor starts when training from scratch: matrices and newline normal, norm weights one, biases zero."""
    if name == "image_newline":
        return "normal", config.decoder.hidden**-0.5
    if len(shape) > 1:
        return "normal", config.initializer_range
    return "constant", 0.0 if name.endswith(".bias") else 1.0
