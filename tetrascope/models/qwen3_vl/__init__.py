"""Qwen3-VL, the dense models (arXiv 2511.21631)."""

from tetrascope.models.family import Family
from tetrascope.models.qwen2_vl.config import complete
from tetrascope.models.qwen2_vl.weights import initial
from tetrascope.models.qwen3_vl.chat import ChatML
from tetrascope.models.qwen3_vl.config import PRESETS, Qwen3VLConfig, from_hf, to_hf
from tetrascope.models.qwen3_vl.model import Qwen3VL, first_layers
from tetrascope.models.qwen3_vl.positions import positions, vision_layout
from tetrascope.models.qwen3_vl.preprocess import MEDIA_OPTIONS, Qwen3VLMedia
from tetrascope.models.qwen3_vl.sharding import sharding
from tetrascope.models.qwen3_vl.weights import LAYOUTS, PARTS, weights

FAMILY = Family(
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    config_class=Qwen3VLConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=Qwen3VL,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: config.vision.merge**2,
    visual_ids=lambda config: (config.image_token_id, config.video_token_id),
    media=Qwen3VLMedia,
    media_options=MEDIA_OPTIONS,
    chats={"chatml": ChatML},
    presets=PRESETS,
    parts=PARTS,
    first_layers=first_layers,
)
