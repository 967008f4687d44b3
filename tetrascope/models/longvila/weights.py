"""Names of LongVILA's parameters in checkpoints: VILA's three folders."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tetrascope.models.layers.decoder_tables import decoder_weights
from tetrascope.models.layers.parts import language_part, matching, own_part, vision_part
from tetrascope.models.layers.vit_tables import clip_weights
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.longvila.hf_config import config_files
from tetrascope.models.weights import CheckpointLayout, Piece, WeightMap, renamed, renamed_layout, whole

VISION, PROJECTOR, LANGUAGE = "vision_tower/vision_model.", "mm_projector/layers", "llm/"

Table = dict[str, tuple[Piece, ...]]


def weights(config: LongVilaConfig) -> WeightMap:
    """The layout of VILA's checkpoints: `llm`, `mm_projector` and `vision_tower`, each a folder of its own."""
    table = Table(clip_weights(config.vision, VISION))
    if config.vision.pooling_head:
        _pooling_head(table, config)
    _projector(table, config)
    return {**table, **decoder_weights(config.decoder, f"{LANGUAGE}model.", f"{LANGUAGE}lm_head.weight")}


def _linear(table: Table, ours: str, theirs: str, rows: int, columns: int, joint: str = ".") -> None:
    table[f"{ours}.weight"] = (whole(f"{theirs}{joint}weight", (rows, columns)),)
    table[f"{ours}.bias"] = (whole(f"{theirs}{joint}bias", (rows,)),)


def _norm(table: Table, ours: str, theirs: str, width: int) -> None:
    for part in ("weight", "bias"):
        table[f"{ours}.{part}"] = (whole(f"{theirs}.{part}", (width,)),)


def _pooling_head(table: Table, config: LongVilaConfig) -> None:
    """torch's MultiheadAttention fuses the three input projections and names them without a dot."""
    e, mlp, head = config.vision.width, config.vision.mlp, f"{VISION}head"
    table["vision.pool.probe"] = (whole(f"{head}.probe", (1, 1, e), (e,)),)
    _linear(table, "vision.pool.qkv", f"{head}.attention.in_proj", 3 * e, e, joint="_")
    _linear(table, "vision.pool.proj", f"{head}.attention.out_proj", e, e)
    _norm(table, "vision.pool.norm", f"{head}.layernorm", e)
    _linear(table, "vision.pool.mlp.fc1", f"{head}.mlp.fc1", mlp, e)
    _linear(table, "vision.pool.mlp.fc2", f"{head}.mlp.fc2", e, mlp)


def _projector(table: Table, config: LongVilaConfig) -> None:
    """Numbered by their places in an nn.Sequential, where functions without parameters count too."""
    hidden, width = config.decoder.hidden, config.projected_width
    if config.downsample:
        _norm(table, "adaptor.norm", f"{PROJECTOR}.1", width)
        _linear(table, "adaptor.fc1", f"{PROJECTOR}.2", hidden, width)
        _linear(table, "adaptor.fc2", f"{PROJECTOR}.4", hidden, hidden)
    elif config.projector == "linear":
        _linear(table, "adaptor.fc1", PROJECTOR, hidden, width)
    else:
        _linear(table, "adaptor.fc1", f"{PROJECTOR}.0", hidden, width)
        _linear(table, "adaptor.fc2", f"{PROJECTOR}.2", hidden, hidden)


def _tied_head(config: LongVilaConfig) -> Mapping[str, str]:
    tied = {f"{LANGUAGE}lm_head.weight": f"{LANGUAGE}model.embed_tokens.weight"}
    return tied if config.decoder.tied_embeddings else {}


_VILA = CheckpointLayout(
    weights=weights,
    configs=config_files,
    # Buffers that old versions of transformers saved with the weights.
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.embeddings\.position_ids"),
    copies=_tied_head,
    language_folder="llm",
)

LAYOUTS = {
    "vila": _VILA,
    # The same with a vision tower as transformers 5 writes it, of a model that it did not load but make.
    "vila-transformers-5": renamed_layout(_VILA, [(r"vision_tower/vision_model\.", "vision_tower/")]),
}


def _encoder(config: LongVilaConfig, prefix: str) -> WeightMap:
    return renamed(matching(weights(config), r"vision\..*"), [(re.escape(VISION), prefix)])


PARTS = {
    "language": language_part("qwen2"),
    "vision": vision_part("siglip", weights=_encoder),
    "adaptor": own_part(LAYOUTS, r"adaptor\..*"),
}


def initial(config: LongVilaConfig, name: str, shape: tuple[int, ...]) -> tuple[str, float]:
    """How a tensor starts when training from scratch: matrices normal, norm weights one, biases zero."""
    if len(shape) > 1 or name.endswith("head.probe"):
        return "normal", config.initializer_range
    return "constant", 0.0 if name.endswith(("bias",)) else 1.0
