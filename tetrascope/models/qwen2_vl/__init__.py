"""Qwen2-VL (arXiv 2409.12191)."""

from tetrascope.models.family import Family
from tetrascope.models.qwen2_vl.chat import ChatML
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig, complete, from_hf, to_hf
from tetrascope.models.qwen2_vl.model import Qwen2VL
from tetrascope.models.qwen2_vl.positions import mrope_positions, patch_positions
from tetrascope.models.qwen2_vl.preprocess import Qwen2VLImages
from tetrascope.models.qwen2_vl.sharding import sharding
from tetrascope.models.qwen2_vl.weights import initial, weights

FAMILY = Family(
    name="qwen2_vl",
    config_class=Qwen2VLConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=Qwen2VL,
    sharding=sharding,
    weights=weights,
    initial=initial,
    positions=mrope_positions,
    patch_positions=patch_positions,
    visual_ids=lambda config: (config.image_token_id, config.video_token_id),
    image_processor=Qwen2VLImages,
    chat=ChatML,
)
