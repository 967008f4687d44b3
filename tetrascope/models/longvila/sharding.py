"""How tensor parallelism divides LongVILA."""

from __future__ import annotations

from tetrascope.models.layers.decoder_tables import decoder_sharding
from tetrascope.models.layers.vit import vit_sharding
from tetrascope.models.longvila.config import LongVilaConfig
from tetrascope.models.sharding import Column, Gather, Replicated, Row, ShardingTable


def sharding(config: LongVilaConfig) -> ShardingTable:
    """One rule for every module with parameters of its own. The adaptor ends with all features on every rank.

    A frame's 27 rows of 27 patches, to be padded to 28, straddle any cut of the rows: all are gathered before they
    are grouped. A projector of one linear is computed by every rank, on all rows.
    """
    hidden = config.decoder.hidden
    if config.downsample:
        projector: ShardingTable = [
            (r"adaptor\.collect", Gather()),
            (r"adaptor\.norm", Replicated()),
            (r"adaptor\.fc1", Column((hidden,), gather=False)),
            (r"adaptor\.fc2", Row(scatter=False)),
        ]
    elif config.projector == "linear":
        projector = [(r"adaptor\.collect", Gather()), (r"adaptor\.fc1", Replicated())]
    else:
        projector = [(r"adaptor\.fc1", Column((hidden,))), (r"adaptor\.fc2", Row(scatter=False))]
    return [
        *vit_sharding(config.vision),
        (r"vision\.pool(\..*)?", Replicated()),
        *projector,
        *decoder_sharding(config.decoder),
    ]
