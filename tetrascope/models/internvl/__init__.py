"""InternVL2, 2.5 and 3 (arXiv 2404.16821, 2412.05271, 2504.10479), and V2PE (arXiv 2412.09616)."""

from tetrascope.models.family import Family
from tetrascope.models.internvl.chat import CHATS
from tetrascope.models.internvl.config import PRESETS, InternVLConfig, complete
from tetrascope.models.internvl.hf_config import from_hf, to_opengvlab
from tetrascope.models.internvl.model import InternVL
from tetrascope.models.internvl.parts import PARTS
from tetrascope.models.internvl.positions import positions, vision_layout
from tetrascope.models.internvl.preprocess import MEDIA_OPTIONS, InternVLMedia
from tetrascope.models.internvl.sharding import sharding
from tetrascope.models.internvl.weights import LAYOUTS, initial, weights

FAMILY = Family(
    name="internvl",
    architectures=("InternVLChatModel", "InternVLForConditionalGeneration"),
    config_class=InternVLConfig,
    complete=complete,
    from_hf=from_hf,
    to_hf=to_opengvlab,
    build=InternVL,
    sharding=sharding,
    weights=weights,
    layouts=LAYOUTS,
    initial=initial,
    positions=positions,
    vision_layout=vision_layout,
    row_block=lambda config: 1,
    visual_ids=lambda config: (config.image_token_id,),
    media=InternVLMedia,
    media_options=MEDIA_OPTIONS,
    chats=CHATS,
    presets=PRESETS,
    parts=PARTS,
)
