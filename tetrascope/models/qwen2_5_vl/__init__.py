"""Qwen2.5-VL (arXiv 2502.13923)."""

from tetrascope.models.family import Family
from tetrascope.models.qwen2_5_vl.chat import ChatML
from tetrascope.models.qwen2_5_vl.config import PRESETS, Qwen2_5VLConfig, from_hf, to_hf
from tetrascope.models.qwen2_5_vl.model import Qwen2_5VL
from tetrascope.models.qwen2_5_vl.positions import positions, vision_layout
from tetrascope.models.qwen2_5_vl.preprocess import Qwen2_5VLMedia
from tetrascope.models.qwen2_5_vl.sharding import sharding
from tetrascope.models.qwen2_5_vl.weights import LAYOUTS, PARTS, initial, weights
from tetrascope.models.qwen2_vl.config import complete
from tetrascope.models.qwen2_vl.preprocess import MEDIA_OPTIONS

FAMILY = Family(
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    config_class=Qwen2_5VLConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=Qwen2_5VL,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: config.vision.merge**2,
    visual_ids=lambda config: (config.image_token_id, config.video_token_id),
    media=Qwen2_5VLMedia,
    media_options=MEDIA_OPTIONS,
    chats={"chatml": ChatML},
    presets=PRESETS,
    parts=PARTS,
)
