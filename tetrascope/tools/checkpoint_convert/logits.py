"""What a conversion changes of what the model computes: logits of a probe batch with pictures, before and after.

Both models are this package's, in fp32 in one process, one after the other. With the same dtype the difference is zero
where the conversion is right; with another one it is what rounding the weights costs. That the model computes what
transformers does is another question, which `tetrascope verify` answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tetrascope.engine.data.collate import collate
from tetrascope.engine.data.document import Document
from tetrascope.errors import UserError
from tetrascope.models.family import Family, Stage
from tetrascope.models.layers.attention import pick_attention
from tetrascope.models.media import DefaultMediaOptions
from tetrascope.tools.checkpoint_convert.formats import Reader

PICTURES = ((96, 64), (140, 112), (56, 84))
"""Widths and heights of the pictures: two in the first sample, one in the second, none in the third."""

SAMPLES = ((0, 1), (2,), ())
TEXT = 12
"""Tokens of text around each picture."""


def verify_logits(source: Reader, written: Reader, exact: bool) -> str:
    """Runs both models. Returns the largest difference of a logit, absolute and relative to the largest logit.

    exact: no dtype was changed, so that any difference is a mistake. Raises UserError for one, and when a logit is not
    a finite number.
    """
    family, config = source.family, source.config
    pictures = not source.absent and not family.weights(config).keys() - _held(source)
    documents = probe(family, config, pictures)
    before, after = (logits(reader, documents) for reader in (source, written))
    for reader, found in ((source, before), (written, after)):
        if not bool(found.isfinite().all()):
            raise UserError(f"{reader.path}: its model gives logits that are not finite numbers; check the weights")
    error = float((before - after).abs().max())
    shown = f"{len(documents)} samples, {sum(len(d.media) for d in documents)} pictures, {len(before)} tokens, fp32"
    if exact and error > 0:
        raise UserError(f"{written.path}: logits differ by up to {error:.3g} from {source.path}'s; convert again")
    return f"logits: max error {error:.3g}, {error / float(before.abs().max()):.3g} of the largest logit ({shown})"


def _held(reader: Reader) -> set[str]:
    """The parameters that a checkpoint has all numbers of."""
    weights = reader.family.weights(reader.config)
    return {name for name, pieces in weights.items() if all(p.tensor.name in reader.tensors for p in pieces)}


def probe(family: Family, config: Any, pictures: bool = True) -> list[Document]:
    """Samples of random text and random pictures, the same at every call."""
    rng = np.random.default_rng(0)
    processor = family.media(config, DefaultMediaOptions())
    visual = family.visual_ids(config)
    words = np.array([i for i in range(config.decoder.vocab) if i not in visual])
    found = []
    for number, shown in enumerate(SAMPLES):
        ids, media, rows = [rng.choice(words, TEXT)], [], []
        for place in shown if pictures else ():
            width, height = PICTURES[place]
            one = processor.image(width, height, len(shown))
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            media.append(one)
            rows.append(processor.rows([picture], one))
            ids += [np.full(one.tokens, visual[0]), rng.choice(words, TEXT)]
        ids_T = np.concatenate(ids).astype(np.int64)
        positions_AT = family.positions(config, ids_T, media, (0, number, 0))
        weights_T = np.ones(len(ids_T), dtype=np.float32)
        found.append(Document(ids_T, positions_AT, weights_T, tuple(media), np.concatenate(rows) if rows else None))
    return found


def logits(reader: Reader, documents: list[Document]) -> Tensor:
    """float32 `[T, V]` of the documents, end to end, by the model that a checkpoint holds."""
    family, config = reader.family, reader.config
    total = sum(len(document.ids_T) for document in documents)
    batch = collate(documents, family, config, total, tp=1, tp_rank=0, encode=True, device=torch.device("cpu"))
    model = _model(reader)
    with torch.no_grad():
        found: Tensor = model(batch.inputs)
    return found.float()


def _model(reader: Reader) -> nn.Module:
    """The whole model in fp32; parameters that the checkpoint has nothing of are zero."""
    family, config = reader.family, reader.config
    stage = Stage(range(config.decoder.layers), first=True, last=True)
    with torch.device("meta"):
        model = family.build(config, stage, pick_attention("sdpa")[1])
    model = model.float().to_empty(device="cpu")
    held, weights = _held(reader), family.weights(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name not in held:
                param.zero_()
                continue
            row, matrix = 0, param.view(sum(piece.rows for piece in weights[name]), -1)
            for piece in weights[name]:
                part = reader.read(piece.tensor.name, piece.start, piece.rows)
                matrix[row : row + piece.rows] = part.view(piece.rows, -1)
                row += piece.rows
    return model
