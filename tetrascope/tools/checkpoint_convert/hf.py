"""The format `hf`: folders that transformers and the original repositories load."""

from __future__ import annotations

from tetrascope.tools.checkpoint_convert.formats import Format
from tetrascope.tools.checkpoint_convert.hf_read import HFReader, is_hf_folder
from tetrascope.tools.checkpoint_convert.hf_write import HFWriter

FORMAT = Format("hf", is_hf_folder, HFReader, HFWriter, "config.json with safetensors or pytorch_model.bin")
