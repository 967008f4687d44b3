"""LongVILA (arXiv 2408.10188): VILA (arXiv 2312.07533) with a Qwen2 decoder, for long videos."""

from tetrascope.models.family import Family
from tetrascope.models.layers.vit import unused_parameters
from tetrascope.models.longvila.chat import ChatML, Plain, Text
from tetrascope.models.longvila.config import PRESETS, LongVilaConfig, complete
from tetrascope.models.longvila.hf_config import from_hf, to_hf
from tetrascope.models.longvila.model import LongVila
from tetrascope.models.longvila.positions import positions, vision_layout
from tetrascope.models.longvila.preprocess import MEDIA_OPTIONS, LongVilaMedia
from tetrascope.models.longvila.sharding import sharding
from tetrascope.models.longvila.weights import LAYOUTS, PARTS, initial, weights

FAMILY = Family(
    name="longvila",
    architectures=("LlavaLlamaModel",),
    config_class=LongVilaConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_hf,
    build=LongVila,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: 1,
    visual_ids=lambda config: (config.image_token_id,),
    media=LongVilaMedia,
    media_options=MEDIA_OPTIONS,
    chats={"chatml": ChatML, "plain": Plain, "text": Text},
    presets=PRESETS,
    parts=PARTS,
    unused=lambda config: (*unused_parameters(config.vision), r"vision\.pool\..*"),
)
