"""Which rows of which Megatron-Core tensors our parameters are made of: another weight map over the same parameters.

Megatron-Core saves a transformer's layers stacked along a new first dimension `[L, …]`, or one by one where they differ
in kind; both are weight maps (`stacked`). Query, key and value are fused by key/value head: the query heads of a group,
its key, its value (megatron/core/transformer/attention.py, `SelfAttention`); gate and up are fused too, gate rows first
(megatron/core/transformer/mlp.py). Tables with a row for each token are padded (`VOCABULARY`): the rows past the
vocabulary belong to no parameter and are not in these maps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tetrascope.models.layers.decoder import DecoderShape
from tetrascope.models.layers.vit import ViTShape
from tetrascope.models.weights import HFTensor, Piece, WeightMap, whole

VISION, PROJECTION, LANGUAGE = "vision_model.", "vision_projection.encoder.", "language_model."
"""Where the parts of Megatron-Core's LLaVAModel lie (megatron/core/models/multimodal/llava_model.py)."""

VOCABULARY = re.compile(r"(language_model\.)?(embedding\.word_embeddings|output_layer)\.weight")
"""Tensors whose rows are padded to a multiple of make-vocab-size-divisible-by × TP."""

EXTRA_STATE = re.compile(r".*\._extra_state(/.*)?")
"""States of linears, empty unless in FP8; no parameters."""

STATEFUL = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of a layer that have such a state."""

UNUSED = "unused."
"""Prefix of tensors that Megatron-Core's model has no place for and that compute nothing, such as the encoder's blocks
after the last used one. Megatron-Core passes them over; they are there for the way back."""

Table = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class Naming:
    """How a checkpoint spells the tensors of a transformer block.

    stacked: layers lie in one tensor `[L, …]`. separate_norms: the norms before attention and MLP are modules of their
    own, as in layer specs without TransformerEngine; else they belong to the linear after them. GPTModel's local layer
    spec gives them the fused names in sharded checkpoints all the same, that of the vision encoder does not.
    """

    stacked: bool = True
    separate_norms: bool = False

    @property
    def attention_norm(self) -> str:
        """What precedes `weight` and `bias` of the norm before attention."""
        return "input_layernorm." if self.separate_norms else "self_attention.linear_qkv.layer_norm_"

    @property
    def mlp_norm(self) -> str:
        """What precedes `weight` and `bias` of the norm before the MLP."""
        return "pre_mlp_layernorm." if self.separate_norms else "mlp.linear_fc1.layer_norm_"


def gpt_weights(shape: DecoderShape, prefix: str = "", naming: Naming = Naming()) -> WeightMap:
    """Parameters `embed`, `layers`, `norm`, `head` -> tensors of a GPTModel called `prefix`.

    Tied embeddings: Megatron-Core's `share_embeddings_and_output_weights`, without `output_layer`.
    """
    d, layers = shape, _Layers(f"{prefix}decoder.", shape.layers, naming)
    vocabulary = (d.vocab, d.hidden)
    embedding = whole(f"{prefix}embedding.word_embeddings.weight", vocabulary)
    table: Table = {"embed.weight": (embedding,)}
    grouped = _grouped(d.heads, d.kv_heads, d.head_dim)
    for i in range(d.layers):
        ours = f"layers.{i}"
        table[f"{ours}.attention_norm.weight"] = layers.whole(i, f"{naming.attention_norm}weight", (d.hidden,))
        table[f"{ours}.mlp_norm.weight"] = layers.whole(i, f"{naming.mlp_norm}weight", (d.hidden,))
        qkv, rows = "self_attention.linear_qkv", sum(d.qkv_rows)
        table[f"{ours}.attention.qkv.weight"] = grouped(*layers.tensor(i, f"{qkv}.weight", (rows, d.hidden)))
        if d.qkv_bias:
            table[f"{ours}.attention.qkv.bias"] = grouped(*layers.tensor(i, f"{qkv}.bias", (rows,)))
        if d.qk_norm:
            for part in "qk":
                norm = layers.whole(i, f"self_attention.{part}_layernorm.weight", (d.head_dim,))
                table[f"{ours}.attention.{part}_norm.weight"] = norm
        proj = layers.whole(i, "self_attention.linear_proj.weight", (d.hidden, d.qkv_rows[0]))
        table[f"{ours}.attention.proj.weight"] = proj
        table[f"{ours}.mlp.gate_up.weight"] = layers.whole(i, "mlp.linear_fc1.weight", (2 * d.intermediate, d.hidden))
        table[f"{ours}.mlp.down.weight"] = layers.whole(i, "mlp.linear_fc2.weight", (d.hidden, d.intermediate))
    table["norm.weight"] = (whole(f"{prefix}decoder.final_layernorm.weight", (d.hidden,)),)
    head = embedding if d.tied_embeddings else whole(f"{prefix}output_layer.weight", vocabulary)
    table["head.weight"] = (head,)
    return table


def vit_weights(shape: ViTShape, prefix: str = VISION, naming: Naming = Naming(separate_norms=True)) -> WeightMap:
    """Parameters of a VisionTransformer `vision` -> tensors of Megatron-Core's CLIPViTModel called `prefix`.

    Blocks that are not computed are not Megatron's: its encoder ends with the last one that is. Source:
    megatron/core/models/vision/clip_vit_model.py.
    """
    e, layers = shape.width, _Layers(f"{prefix}decoder.", shape.used, naming)
    kernel = (e, shape.channels, shape.patch, shape.patch)
    table: Table = {"vision.patches.project.weight": (whole(f"{prefix}conv1.weight", kernel),)}
    if shape.patch_bias:
        table["vision.patches.project.bias"] = (whole(f"{prefix}conv1.bias", (e,)),)
    table["vision.patches.places.weight"] = (whole(f"{prefix}position_embeddings.weight", (shape.rows, e)),)
    if shape.class_token:
        table["vision.patches.class_token.weight"] = (whole(f"{prefix}class_token", (1, 1, e), (e,)),)
    if shape.pre_norm:
        for part in ("weight", "bias"):
            table[f"vision.pre_norm.{part}"] = (whole(f"{prefix}ln_pre.{part}", (e,)),)
    grouped = _grouped(shape.heads, shape.heads, e // shape.heads)
    linears = (
        ("attention.proj", "self_attention.linear_proj", e, e),
        ("mlp.fc1", "mlp.linear_fc1", shape.mlp, e),
        ("mlp.fc2", "mlp.linear_fc2", e, shape.mlp),
    )
    for i in range(shape.used):
        ours = f"vision.blocks.{i}"
        for part in ("weight", "bias"):
            table[f"{ours}.norm1.{part}"] = layers.whole(i, f"{naming.attention_norm}{part}", (e,))
            table[f"{ours}.norm2.{part}"] = layers.whole(i, f"{naming.mlp_norm}{part}", (e,))
            columns = (e,) if part == "weight" else ()
            qkv = layers.tensor(i, f"self_attention.linear_qkv.{part}", (3 * e, *columns))
            table[f"{ours}.attention.qkv.{part}"] = grouped(*qkv)
        for mine, theirs, rows, width in linears:
            table[f"{ours}.{mine}.weight"] = layers.whole(i, f"{theirs}.weight", (rows, width))
            table[f"{ours}.{mine}.bias"] = layers.whole(i, f"{theirs}.bias", (rows,))
    return table


def projection_weights(hidden: int, width: int, prefix: str = PROJECTION) -> WeightMap:
    """Parameters `adaptor.fc1`, `adaptor.fc2` -> tensors of Megatron-Core's MultimodalProjector of type `mlp`."""
    table: Table = {}
    for ours, theirs, columns in (("fc1", "linear_fc1", width), ("fc2", "linear_fc2", hidden)):
        table[f"adaptor.{ours}.weight"] = (whole(f"{prefix}{theirs}.weight", (hidden, columns)),)
        table[f"adaptor.{ours}.bias"] = (whole(f"{prefix}{theirs}.bias", (hidden,)),)
    return table


@dataclass(frozen=True)
class _Layers:
    """The layers of the transformer block called `prefix`."""

    prefix: str
    count: int
    naming: Naming

    def tensor(self, layer: int, name: str, shape: tuple[int, ...]) -> tuple[HFTensor, int]:
        """A tensor of a layer: where it lies, and from which row on."""
        if not self.naming.stacked:
            return HFTensor(f"{self.prefix}layers.{layer}.{name}", shape), 0
        view = (self.count * shape[0], *shape[1:])
        return HFTensor(f"{self.prefix}layers.{name}", (self.count, *shape), view), layer * shape[0]

    def whole(self, layer: int, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """All rows of a tensor of a layer."""
        tensor, start = self.tensor(layer, name, shape)
        return (Piece(tensor, start, shape[0]),)


def _grouped(heads: int, kv_heads: int, head_dim: int) -> Callable[[HFTensor, int], tuple[Piece, ...]]:
    """Our [all queries | all keys | all values] out of rows, from `start` on, that are fused by key/value head."""
    group = heads // kv_heads
    block = (group + 2) * head_dim

    def pieces(tensor: HFTensor, start: int) -> tuple[Piece, ...]:
        return tuple(
            Piece(tensor, start + head * block + first * head_dim, count * head_dim)
            for first, count in ((0, group), (group, 1), (group + 1, 1))
            for head in range(kv_heads)
        )

    return pieces


Split = tuple[int, int]
"""How tensor parallelism cuts a tensor: along which dimension, and how many parts stacked in it are cut each."""

_SPLITS: tuple[tuple[str, Split | None], ...] = (
    (r"embedding\.word_embeddings\.weight|output_layer\.weight", (0, 1)),
    (r"decoder\.layers\.\d+\.self_attention\.linear_qkv\.(weight|bias)", (0, 1)),
    (r"decoder\.layers\.\d+\.mlp\.linear_fc1\.(weight|bias)", (0, 1)),
    (r"decoder\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight", (1, 1)),
    (r"linear_fc1\.(weight|bias)", (0, 1)),
    (r"linear_fc2\.weight", (1, 1)),
)
_PREFIXES = re.compile(rf"\A({re.escape(LANGUAGE)}|{re.escape(VISION)}|{re.escape(PROJECTION)})?")


def split(name: str, gated: bool) -> Split | None:
    """How tensor parallelism cuts the tensor of that name, of a layer of its own; None: every rank holds all of it.

    gated: the MLPs of the language model have a gate, whose rows precede the others on every rank.
    """
    match = _PREFIXES.match(name)
    prefix = match[0] if match else ""
    for pattern, found in _SPLITS:
        if re.fullmatch(pattern, name[len(prefix) :]):
            twofold = gated and prefix in ("", LANGUAGE) and "linear_fc1" in name
            return (0, 2) if twofold else found
    return None
