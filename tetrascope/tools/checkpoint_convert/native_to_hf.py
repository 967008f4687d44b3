"""Exporting a run's checkpoint for transformers, as `tetrascope train` does at its end."""

from __future__ import annotations

from pathlib import Path

from tetrascope.errors import UserError
from tetrascope.tools.checkpoint_convert import convert
from tetrascope.tools.checkpoint_convert.formats import Options, recognise


def check_destination(destination: Path) -> None:
    """Raises UserError when the folder holds something other than a Hugging Face checkpoint to replace."""
    convert.check_destination(destination, replace=True)


def native_to_hf(
    checkpoint: Path, destination: Path, dtype: str, tokenizer: Path | None = None, layout: str | None = None
) -> None:
    """Writes config.json, safetensors, generation config, tokenizer and preprocessor files to `destination`.

    dtype: of the written tensors, one of formats.DTYPES. tokenizer: its folder, where it is no longer where the run had
    it. layout: how tensors are named and arranged, one of the family's layouts; the canonical one when not given.
    The folder gets its final name when it is complete; an older one is replaced. Raises UserError for a folder that is
    no checkpoint, or a destination that is no Hugging Face folder.
    """
    if recognise(checkpoint).name != "native":
        raise UserError(f"{checkpoint}: is no checkpoint of a run; give one")
    planned = convert.plan(checkpoint, "hf", Options(dtype=dtype, layout=layout, tokenizer=tokenizer))
    convert.convert(planned, destination, replace=True, trust=True)
