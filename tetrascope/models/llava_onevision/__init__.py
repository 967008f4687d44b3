"""LLaVA-OneVision (arXiv 2408.03326)."""

from tetrascope.models.family import Family
from tetrascope.models.layers.vit import unused_parameters
from tetrascope.models.llava_onevision.chat import ChatML, OriginalChatML, Plain
from tetrascope.models.llava_onevision.config import PRESETS, LlavaOneVisionConfig, complete
from tetrascope.models.llava_onevision.hf_config import ARCHITECTURES, from_hf, to_hf
from tetrascope.models.llava_onevision.model import LlavaOneVision
from tetrascope.models.llava_onevision.positions import positions, vision_layout
from tetrascope.models.llava_onevision.preprocess import MEDIA_OPTIONS, LlavaOneVisionMedia
from tetrascope.models.llava_onevision.sharding import sharding
from tetrascope.models.llava_onevision.weights import LAYOUTS, PARTS, initial, weights

FAMILY = Family(
    name="llava_onevision",
    architectures=ARCHITECTURES,
    config_class=LlavaOneVisionConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=LlavaOneVision,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: 1,
    visual_ids=lambda config: (config.image_token_id, config.video_token_id),
    media=LlavaOneVisionMedia,
    media_options=MEDIA_OPTIONS,
    chats={"qwen": ChatML, "qwen_original": OriginalChatML, "plain": Plain},
    presets=PRESETS,
    parts=PARTS,
    unused=lambda config: unused_parameters(config.vision),
)
