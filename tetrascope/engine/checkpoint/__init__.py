"""Native checkpoints: logical tensors in a torch.distributed.checkpoint folder.

A checkpoint is `checkpoints/step-000123/`: the fp32 master weights and optimizer moments, each saved once by the rank
that owns it with its place in the whole tensor, so that any layout loads what any other saved; `state.json` with the
step, the position in the data, the configuration and the versions of this package and torch; `manifest.json` with the
size and checksum of every file. It is written under a temporary name, every file fsynced, and renamed when complete.
A run goes on from the newest one whose bytes are those of its manifest.

What is frozen is saved in the run's own dtype, which loses nothing, and without moments. A run may train other parts
than the one that saved: what it freezes, it loads without moments; what it trains and the other froze, starts with
moments of zero. Adam's step count, which serves its bias correction and nothing else, then starts at zero again for
all parameters: exact for the new ones, and after 1 / (1 - beta) steps without a trace in the others. The alternative,
to go on counting, would make the first steps of the new ones up to 6 times too long (betas 0.9 and 0.999).
"""

from tetrascope.engine.checkpoint.background import Outcome, Saver
from tetrascope.engine.checkpoint.files import FileRecord, ShardWriter
from tetrascope.engine.checkpoint.folders import Found, checkpoints, latest_checkpoint, newest_whole, tidy
from tetrascope.engine.checkpoint.load import load_checkpoint, read_state
from tetrascope.engine.checkpoint.manifest import MANIFEST, checksum_problems, problem
from tetrascope.engine.checkpoint.ranks import Ranks
from tetrascope.engine.checkpoint.reader import CheckpointReader
from tetrascope.engine.checkpoint.save import (
    FORMAT,
    STATE_FILE,
    DiskFull,
    Snapshot,
    publish,
    save_checkpoint,
    take_snapshot,
    write_snapshot,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "STATE_FILE",
    "CheckpointReader",
    "DiskFull",
    "FileRecord",
    "Found",
    "Outcome",
    "Ranks",
    "Saver",
    "ShardWriter",
    "Snapshot",
    "checkpoints",
    "checksum_problems",
    "latest_checkpoint",
    "load_checkpoint",
    "newest_whole",
    "problem",
    "publish",
    "read_state",
    "save_checkpoint",
    "take_snapshot",
    "tidy",
    "write_snapshot",
]
