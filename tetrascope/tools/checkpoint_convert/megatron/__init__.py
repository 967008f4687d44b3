"""The format `megatron`: checkpoints of Megatron-Core, `torch_dist` both ways and the older ones to read."""

from __future__ import annotations

from tetrascope.tools.checkpoint_convert.formats import Format
from tetrascope.tools.checkpoint_convert.megatron.reader import MegatronReader, is_megatron
from tetrascope.tools.checkpoint_convert.megatron.writer import MegatronWriter

FORMAT = Format(
    "megatron",
    is_megatron,
    MegatronReader,
    MegatronWriter,
    "latest_checkpointed_iteration.txt, metadata.json of torch_dist, or mp_rank_* folders",
)
