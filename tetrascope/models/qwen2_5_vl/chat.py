"""Qwen2.5-VL's chat format is Qwen2-VL's."""

from __future__ import annotations

from tetrascope.models.qwen2_vl.chat import ChatML

__all__ = ["ChatML"]
