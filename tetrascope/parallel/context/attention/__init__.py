"""Attention across context-parallel ranks: Ulysses inside, ring or gathered keys outside."""

from tetrascope.parallel.context.attention.attend import ContextAttention
from tetrascope.parallel.context.attention.check import check_kernel
from tetrascope.parallel.context.attention.kernels import pick_block_kernel
from tetrascope.parallel.context.attention.plan import AttentionPlan, Exchange
from tetrascope.parallel.context.attention.ulysses import check_heads

__all__ = ["AttentionPlan", "ContextAttention", "Exchange", "check_heads", "check_kernel", "pick_block_kernel"]
