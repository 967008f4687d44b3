"""LLaVA-1.5 (arXiv 2310.03744)."""

from tetrascope.models.family import Family
from tetrascope.models.layers.vit import unused_parameters
from tetrascope.models.llava.chat import Plain, Vicuna
from tetrascope.models.llava.config import PRESETS, LlavaConfig, complete
from tetrascope.models.llava.hf_config import from_hf, to_hf
from tetrascope.models.llava.model import Llava
from tetrascope.models.llava.positions import positions, vision_layout
from tetrascope.models.llava.preprocess import LlavaMedia
from tetrascope.models.llava.sharding import sharding
from tetrascope.models.llava.weights import LAYOUTS, PARTS, initial, weights

FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM"),
    config_class=LlavaConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=Llava,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: 1,
    visual_ids=lambda config: (config.image_token_id,),
    media=LlavaMedia,
    media_options=frozenset(),
    chats={"vicuna_v1": Vicuna, "plain": Plain},
    presets=PRESETS,
    parts=PARTS,
    unused=lambda config: unused_parameters(config.vision),
)
