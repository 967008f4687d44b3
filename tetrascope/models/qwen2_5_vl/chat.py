"""Qwen2.5-VL's chat format is Qwen2-VL's.

Box and point parts are written as Qwen2-VL's too, in thousandths between box tokens. The published Qwen2.5-VL
checkpoints learned to answer with JSON in pixels of the resized picture instead (arXiv 2502.13923 §2.2); to keep to
that, give such answers as text.
"""

from __future__ import annotations

from tetrascope.models.qwen2_vl.chat import ChatML

__all__ = ["ChatML"]
