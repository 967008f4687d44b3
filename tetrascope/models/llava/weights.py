"""Names of LLaVA-1.5's parameters in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tetrascope.models.layers.decoder_tables import decoder_weights
from tetrascope.models.layers.parts import language_part, own_part, vision_part
from tetrascope.models.layers.vit_tables import clip_weights
from tetrascope.models.llava.config import LlavaConfig
from tetrascope.models.llava.hf_config import to_hf, to_original
from tetrascope.models.weights import CheckpointLayout, Piece, WeightMap, renamed_layout, single_config, whole

VISION, LANGUAGE, HEAD = "vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.weight"


def weights(config: LlavaConfig) -> WeightMap:
    """The layout of the llava-hf checkpoints, which transformers 4 and 5 both read."""
    width, hidden = config.vision.width, config.decoder.hidden
    adaptor: dict[str, tuple[Piece, ...]] = {}
    for ours, theirs, columns in (("fc1", "linear_1", width), ("fc2", "linear_2", hidden)):
        name = f"multi_modal_projector.{theirs}"
        adaptor[f"adaptor.{ours}.weight"] = (whole(f"{name}.weight", (hidden, columns)),)
        adaptor[f"adaptor.{ours}.bias"] = (whole(f"{name}.bias", (hidden,)),)
    return {**clip_weights(config.vision, VISION), **adaptor, **decoder_weights(config.decoder, LANGUAGE, HEAD)}


def _tied_head(config: LlavaConfig) -> Mapping[str, str]:
    return {HEAD: f"{LANGUAGE}embed_tokens.weight"} if config.decoder.tied_embeddings else {}


_HUB = CheckpointLayout(
    weights=weights,
    configs=single_config(to_hf),
    # Buffers that transformers before 4.31 saved with the weights.
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.embeddings\.position_ids"),
    copies=_tied_head,
)

_MODEL = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
)

LAYOUTS = {
    "hub": _HUB,
    # What transformers 5 calls the tensors in memory, and writes with save_original_format=False.
    "in-memory": renamed_layout(_HUB, [*_MODEL, (r"vision_tower\.vision_model\.", "model.vision_tower.")]),
    # The same of transformers 4.52 to 4.57, whose CLIP had one more level of names.
    "in-memory-4": renamed_layout(_HUB, [*_MODEL, (r"vision_tower\.", "model.vision_tower.")]),
    # What transformers 5 writes of a model that it did not load but make.
    "transformers-5": renamed_layout(_HUB, [(r"vision_tower\.vision_model\.", "vision_tower.")]),
    # What the original repository (haotian-liu/LLaVA) writes.
    "original": replace(
        renamed_layout(
            _HUB,
            [
                (r"language_model\.model\.", "model."),
                (r"language_model\.lm_head\.", "lm_head."),
                (r"multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
                (r"multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
                (r"vision_tower\.", "model.vision_tower.vision_tower."),
            ],
        ),
        configs=single_config(to_original),
    ),
}


PARTS = {
    "language": language_part("llama"),
    "vision": vision_part("clip"),
    # `mm_projector.bin`, which the original's first stage writes, is of the layout "original".
    "adaptor": own_part(LAYOUTS, r"adaptor\..*"),
}


def initial(config: LlavaConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """How a tensor starts when training from scratch: matrices normal, norm weights one, biases zero.

    The class token is normal with deviation 1/√E (transformers, clip/modeling_clip.py).
    """
    if name.endswith(".class_embedding"):
        return "normal", float(shape[0]) ** -0.5
    if len(shape) > 1:
        return "normal", config.initializer_range
    return "constant", 0.0 if name.endswith(".bias") else 1.0
