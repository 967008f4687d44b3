"""Qwen2-VL: vision encoder, adaptor, Qwen2 decoder with M-RoPE, over packed sequences.

Shape suffixes: T packed tokens, H hidden width, V vocabulary, M merged visual features.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetrascope.models.family import Stage
from tetrascope.models.inputs import Inputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.decoder import DecoderLayer
from tetrascope.models.layers.norm import RMSNorm
from tetrascope.models.layers.rotary import multimodal_tables
from tetrascope.models.qwen2_vl.config import Qwen2VLConfig
from tetrascope.models.qwen2_vl.vision import VisionEncoder


class Qwen2VL(nn.Module):
    """The part of Qwen2-VL that `stage` names; parameters keep the names they have in the whole model."""

    def __init__(self, config: Qwen2VLConfig, stage: Stage, attend: AttentionFn) -> None:
        super().__init__()
        shape = config.decoder
        self.config = config
        self.vision = VisionEncoder(config.vision, shape.hidden, attend) if stage.first else None
        self.embed = nn.Embedding(shape.vocab, shape.hidden) if stage.first else None
        self.layers = nn.ModuleDict({str(i): DecoderLayer(shape, attend) for i in stage.layers})
        self.norm = RMSNorm(shape.hidden, shape.rms_eps) if stage.last else None
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False) if stage.last else None
        if shape.tied_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, inputs: Inputs, hidden_TH: Tensor | None = None) -> Tensor:
        """Logits `[T, V]` on the last stage, hidden states `[T, H]` on the others.

        `hidden_TH`: what the previous stage returned; not used by the first stage.
        """
        if self.embed is not None and self.vision is not None:
            hidden_TH = self.embed(inputs.token_ids_T)
            if inputs.vision is not None:
                features_MH = self.vision(inputs.vision)
                here_MH = features_MH.index_select(0, inputs.vision.picks_M)
                hidden_TH = hidden_TH.index_copy(0, inputs.vision.rows_M, here_MH)
        elif hidden_TH is None:
            raise ValueError("a stage without the embedding needs the hidden states of the stage before it")
        shape = self.config.decoder
        rotary = multimodal_tables(inputs.positions_3T, shape.head_dim, shape.rope_theta, self.config.mrope_section)
        for layer in self.layers.values():
            hidden_TH = layer(hidden_TH, inputs.documents, rotary)
        if self.norm is None or self.head is None:
            return hidden_TH
        return self.head(self.norm(hidden_TH))
