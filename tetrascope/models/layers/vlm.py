"""What every family's model has in common: embed tokens, put visual features in their places, decode.

Shape suffixes: T packed tokens, H hidden width, V vocabulary, F features of all images, M visual tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tetrascope.models.family import Stage
from tetrascope.models.inputs import Inputs, VisionInputs
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.models.layers.decoder import DecoderLayer, DecoderShape
from tetrascope.models.layers.deliver import Deliver
from tetrascope.models.layers.norm import RMSNorm
from tetrascope.models.layers.rotary import RotaryTables, linear_tables


def pick_features(features_FH: Tensor, vision: VisionInputs, newline_H: Tensor | None = None) -> Tensor:
    """The visual tokens of this rank, `[M, H]`, from the features of all images.

    newline: a learned vector that follows the features, where the family has one. Weighted sums are taken in fp32.
    """
    if newline_H is not None:
        features_FH = torch.cat((features_FH, newline_H[None]))
    if vision.weights_CM is None:
        return features_FH.index_select(0, vision.picks_CM[0])
    chosen_CMH = features_FH[vision.picks_CM].float()
    return (chosen_CMH * vision.weights_CM[:, :, None]).sum(0).to(features_FH.dtype)


class VisionLanguageModel(nn.Module):
    """The part of a vision-language model that `stage` names; parameters keep the names of the whole model.

    `vision` and `adaptor` make the family's own modules, called on the first stage only: the encoder maps
    VisionInputs to what the adaptor takes, the adaptor to features `[F, H]`, or to several such tensors, of which
    those after the first are added to the visual tokens after decoder layers 0, 1, … (Qwen3-VL's DeepStack).
    An adaptor with a parameter `newline` has a vector of its own that visual tokens may be made of.
    """

    def __init__(
        self,
        shape: DecoderShape,
        stage: Stage,
        attend: AttentionFn,
        vision: Callable[[], nn.Module],
        adaptor: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.vision = vision() if stage.first else None
        self.adaptor = adaptor() if stage.first else None
        self.deliver = Deliver() if stage.first else None
        self.embed = nn.Embedding(shape.vocab, shape.hidden) if stage.first else None
        self.layers = nn.ModuleDict({str(i): DecoderLayer(shape, attend) for i in stage.layers})
        self.norm = RMSNorm(shape.hidden, shape.rms_eps) if stage.last else None
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False) if stage.last else None
        if shape.tied_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def rotary(self, positions_AT: Tensor) -> RotaryTables:
        """Rotary tables of a micro-batch, computed once for all layers. Families with other positions override it."""
        return linear_tables(positions_AT, self.shape.head_dim, self.shape.rope_theta)

    def visual_tokens(self, inputs: VisionInputs) -> list[Tensor]:
        """Images to visual tokens `[M, H]`; further tensors belong after decoder layers 0, 1, …"""
        if self.vision is None or self.adaptor is None or self.deliver is None:
            raise ValueError("only the first stage encodes images")
        features = self.adaptor(self.vision(inputs))
        several: Sequence[Tensor] = (features,) if isinstance(features, Tensor) else features
        newline = getattr(self.adaptor, "newline", None)
        delivered = self.deliver(several, inputs)
        return [pick_features(features_FH, inputs, newline) for features_FH in delivered]

    def forward(
        self, inputs: Inputs, hidden_TH: Tensor | None = None, visual: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Logits `[T, V]` on the last stage, hidden states `[T, H]` on the others.

        `hidden_TH`: what the previous stage returned; not used by the first stage. `visual`: what `visual_tokens` gave,
        where it was called before.
        """
        later: list[Tensor] = []
        if self.embed is not None:
            hidden_TH = self.embed(inputs.token_ids_T)
            if inputs.vision is not None:
                tokens_MH, *later = self.visual_tokens(inputs.vision) if visual is None else visual
                if len(later) > len(self.layers):
                    raise ValueError(f"{len(later)} features follow the first layers, {len(self.layers)} are here")
                hidden_TH = hidden_TH.index_copy(0, inputs.vision.rows_M, tokens_MH)
        elif hidden_TH is None:
            raise ValueError("a stage without the embedding needs the hidden states of the stage before it")
        rotary = self.rotary(inputs.positions_AT)
        for i, layer in enumerate(self.layers.values()):
            hidden_TH = layer(hidden_TH, inputs.documents, rotary)
            if i < len(later) and inputs.vision is not None:
                hidden_TH = hidden_TH.index_add(0, inputs.vision.rows_M, later[i])
        if self.norm is None or self.head is None:
            return hidden_TH
        return self.head(self.norm(hidden_TH))
