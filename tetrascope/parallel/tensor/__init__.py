"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198).

Between the divided linears every rank holds its own share of the tokens, `[T/tp, H]`. A column-parallel linear
gathers the tokens and computes its share of the outputs; a row-parallel one sums the partial outputs and scatters
them over the tokens again. A replicated parameter therefore sees only its rank's share of the tokens, and its
gradient is a partial sum: the optimizer adds it up over the tensor-parallel group. That rule has no exception.
"""
