"""Qwen2-VL (arXiv 2409.12191)."""

from tetrascope.models.family import Family
from tetrascope.models.qwen2_vl.chat import ChatML
from tetrascope.models.qwen2_vl.config import PRESETS, Qwen2VLConfig, complete, from_hf, to_hf
from tetrascope.models.qwen2_vl.model import Qwen2VL
from tetrascope.models.qwen2_vl.positions import positions, vision_layout
from tetrascope.models.qwen2_vl.preprocess import MEDIA_OPTIONS, Qwen2VLMedia
from tetrascope.models.qwen2_vl.sharding import sharding
from tetrascope.models.qwen2_vl.weights import LAYOUTS, PARTS, initial, weights

FAMILY = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    config_class=Qwen2VLConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=Qwen2VL,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: config.vision.merge**2,
    visual_ids=lambda config: (config.image_token_id, config.video_token_id),
    media=Qwen2VLMedia,
    media_options=MEDIA_OPTIONS,
    chats={"chatml": ChatML},
    presets=PRESETS,
    parts=PARTS,
)
