"""Kernels that run on GPUs only, with stand-ins in their place.

A stand-in has the names, the order and the layouts that the package documents, and computes by the formulas, so that an
argument that is forgotten, misnamed or in the wrong layout shows. What it cannot show is whether the package's own
kernel is right; `check_kernel` asks it where there is a GPU.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.context.kernel_checks import HEADS, RECTANGLES, SQUARES, check, sequences
from tetrascope.errors import UserError
from tetrascope.parallel.context.attention import check_kernel, flash, fused, varlen
from tetrascope.parallel.context.attention.blocks import BlockSet
from tetrascope.parallel.context.attention.kernels import BLOCK_KERNELS, BlockKernel, Reference, pick_block_kernel

SCALE = 8**-0.5
GPU = torch.device("cuda")


def torch_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators of torch."""

    def forward(*args: Any) -> tuple[Tensor, ...]:
        q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug = args
        found = sequences(q, cu_q, cu_k, causal)
        assert (max_q, max_k) == found.longest and dropout == 0.0 and debug is False
        out, lse = Reference().forward(q, k, v, found)
        return out, lse.T.contiguous(), torch.empty(0), torch.empty(0), torch.empty(0)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, _, _ = args
        found = sequences(q, cu_q, cu_k, causal)
        assert (max_q, max_k) == found.longest and dropout == 0.0 and lse.shape == (q.shape[1], q.shape[0])
        return Reference().backward(grad, q, k, v, out, lse.T, found)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


def flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn_interface.py of version 2.8."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
    ) -> tuple[Tensor, ...]:
        found = sequences(q, cu_seqlens_q, cu_seqlens_k, causal)
        assert (max_seqlen_q, max_seqlen_k) == found.longest and dropout_p == 0.0 and softmax_scale == SCALE
        out, lse = Reference().forward(q, k, v, found)
        return out, lse.T.contiguous(), torch.empty(0), torch.empty(0)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> Tensor:
        found = sequences(q, cu_seqlens_q, cu_seqlens_k, causal)
        assert (max_seqlen_q, max_seqlen_k) == found.longest and softmax_scale == SCALE
        fill((dq, dk, dv), Reference().backward(dout, q, k, v, out, softmax_lse.T, found))
        return torch.empty(0)

    install(
        monkeypatch,
        "flash_attn.flash_attn_interface",
        _flash_attn_varlen_forward=forward,
        _flash_attn_varlen_backward=backward,
    )


def flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """hopper/flash_attn_interface.py, as far as training on packed sequences goes."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        qv: Tensor | None = None,
        out_: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
    ) -> tuple[Tensor, ...]:
        assert cu_seqlens_q is not None and cu_seqlens_k is not None and softmax_scale == SCALE
        found = sequences(q, cu_seqlens_q, cu_seqlens_k, causal)
        assert (max_seqlen_q, max_seqlen_k) == found.longest
        out, lse = Reference().forward(q, k, v, found)
        return out, lse.T.contiguous(), torch.empty(0), torch.empty(0)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sequed_q: Tensor | None = None,
        sequed_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        assert cu_seqlens_q is not None and cu_seqlens_k is not None and softmax_scale == SCALE
        assert dq is not None and dk is not None and dv is not None
        found = sequences(q, cu_seqlens_q, cu_seqlens_k, is_causal)
        assert (max_seqlen_q, max_seqlen_k) == found.longest and softmax_lse.is_contiguous()
        fill((dq, dk, dv), Reference().backward(dout, q, k, v, out, softmax_lse.T, found))
        return torch.empty(0)

    install(monkeypatch, "flash_attn_interface", _flash_attn_forward=forward, _flash_attn_backward=backward)


def flash_attn_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn/cute/interface.py of 4.0.0b36: no logsumexp unless it is asked for; gradients are returned."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        return_lse: bool = False,
    ) -> tuple[Tensor | None, ...]:
        assert cu_seqlens_q is not None and cu_seqlens_k is not None and softmax_scale == SCALE
        found = sequences(q, cu_seqlens_q, cu_seqlens_k, causal)
        assert (max_seqlen_q, max_seqlen_k) == found.longest
        out, lse = Reference().forward(q, k, v, found)
        return out, lse.T.contiguous() if return_lse else None, None, None, None

    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, ...]:
        assert cu_seqlens_q is not None and cu_seqlens_k is not None and softmax_scale == SCALE
        found = sequences(q, cu_seqlens_q, cu_seqlens_k, causal)
        assert (max_seqlen_q, max_seqlen_k) == found.longest and lse.shape == (q.shape[1], q.shape[0])
        return Reference().backward(dout, q, k, v, out, lse.T, found)

    install(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=forward, _flash_attn_bwd=backward)


def transformer_engine(monkeypatch: pytest.MonkeyPatch, new: bool = True) -> None:
    """cpp_extensions/fused_attn.py. new: of 2.20; otherwise of 2.3, which wants the gradients' type and knows no
    layouts of output and gradients."""

    def forward(
        is_training: bool,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fake_dtype: torch.dtype,
        fused_attention_backend: str,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        attn_scale: float | None = None,
        dropout: float = 0.0,
        qkv_layout: str = "sbh3d",
        attn_mask_type: str = "padding",
    ) -> tuple[Any, ...]:
        assert attn_scale == SCALE and qkv_layout == "thd_thd_thd" and fused_attention_backend == "arbitrary"
        assert cu_seqlens_q_padded is cu_seqlens_q and cu_seqlens_kv_padded is cu_seqlens_kv and fake_dtype == q.dtype
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        found = sequences(q, cu_seqlens_q, cu_seqlens_kv, mask(attn_mask_type))
        assert (max_seqlen_q, max_seqlen_kv) == found.longest
        out, lse = Reference().forward(q, k, v, found)
        return out, [lse.unsqueeze(-1), torch.zeros(2, dtype=torch.int64)] if is_training else None

    def backward(
        max_seqlen_q: int,
        max_seqlen_kv: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        d_o: Tensor,
        fake_dtype: torch.dtype,
        aux_ctx_tensors: list[Tensor],
        fused_attention_backend: str,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        attn_scale: float | None = None,
        qkv_layout: str = "sbh3d",
        attn_mask_type: str = "padding",
    ) -> tuple[Tensor | None, ...]:
        assert attn_scale == SCALE and qkv_layout == "thd_thd_thd" and fused_attention_backend == "arbitrary"
        found = sequences(q, cu_seqlens_q, cu_seqlens_kv, mask(attn_mask_type))
        stats, state = aux_ctx_tensors
        assert (max_seqlen_q, max_seqlen_kv) == found.longest and state.dtype == torch.int64
        assert stats.shape == (*q.shape[:2], 1) and stats.is_contiguous()
        return (*Reference().backward(d_o, q, k, v, o, stats.squeeze(-1), found), None)

    def new_forward(*, o_format: str = "sbhd", **given: Any) -> tuple[Any, ...]:
        assert o_format == "thd"
        return forward(**given)

    def new_backward(
        *, o_format: str = "sbhd", do_format: str = "sbhd", dqkv_layout: str = "sbh3d", **given: Any
    ) -> tuple[Tensor | None, ...]:
        assert (o_format, do_format, dqkv_layout) == ("thd", "thd", "thd_thd_thd")
        return backward(**given)

    def old_backward(*, dqkv_dtype: str, **given: Any) -> tuple[Tensor | None, ...]:
        assert dqkv_dtype == "TE's fp64"
        return backward(**given)

    install(
        monkeypatch,
        "transformer_engine.pytorch.cpp_extensions.fused_attn",
        fused_attn_fwd=with_parameters_of(new_forward, forward) if new else forward,
        fused_attn_bwd=with_parameters_of(new_backward if new else old_backward, backward),
        FusedAttnBackend={"F16_arbitrary_seqlen": "arbitrary"},
    )
    install(monkeypatch, "transformer_engine.pytorch.constants", TE_DType={torch.float64: "TE's fp64"})


def mask(name: str) -> bool:
    return {"padding_causal": True, "padding": False}[name]


def with_parameters_of(function: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose signature names those of `inner` too."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    inherited = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(inner).parameters.values()]
    function.__signature__ = inspect.Signature([*own, *inherited])  # type: ignore[attr-defined]
    return function


def fill(into: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module, with the packages around it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


PACKAGES: list[tuple[str, BlockKernel, Callable[[pytest.MonkeyPatch], None]]] = [
    ("varlen", varlen.TorchVarlen(), torch_varlen),
    ("flash-attn-2", flash.FlashAttention2(), flash_attn_2),
    ("flash-attn-3", flash.FlashAttention3(), flash_attn_3),
    ("flash-attn-4", flash.FlashAttention4(), flash_attn_4),
    ("transformer-engine", fused.TransformerEngine(), transformer_engine),
    ("transformer-engine, older", fused.TransformerEngine(), lambda patch: transformer_engine(patch, new=False)),
]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("blocks", [SQUARES, RECTANGLES], ids=["causal", "full"])
@pytest.mark.parametrize(("kernel", "stand_in"), [p[1:] for p in PACKAGES], ids=[p[0] for p in PACKAGES])
def test_called_as_documented(
    kernel: BlockKernel,
    stand_in: Callable[[pytest.MonkeyPatch], None],
    blocks: BlockSet,
    heads: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch)
    check(kernel, blocks, heads, torch.float64, 1e-14)


def on_gpu(monkeypatch: pytest.MonkeyPatch, generation: tuple[int, int], *modules: str) -> None:
    """As if there were a GPU of that generation, and these modules."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    for module in (flash, fused):
        monkeypatch.setattr(module, "installed", lambda name: name in modules)
    install(monkeypatch, "transformer_engine.pytorch.utils", get_cudnn_version=lambda: (9, 10, 2))


FA2, FA3, FA4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"
TE = "transformer_engine.pytorch.cpp_extensions.fused_attn"


@pytest.mark.parametrize(
    ("generation", "modules", "chosen"),
    [
        ((8, 0), (), "varlen"),
        ((8, 0), (FA2, FA3, FA4, TE), "flash-attn-2"),
        ((9, 0), (FA2, FA3, FA4, TE), "flash-attn-3"),
        ((10, 0), (FA2, FA3, FA4, TE), "flash-attn-4"),
        ((10, 0), (FA2, TE), "transformer-engine"),
        ((12, 0), (FA2, TE), "flash-attn-2"),
        ((9, 0), (FA4,), "flash-attn-4"),
        ((7, 5), (FA2, FA3, FA4, TE), "reference"),
    ],
)
def test_auto_takes_what_the_gpu_can_run(
    generation: tuple[int, int], modules: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, generation, *modules)
    assert pick_block_kernel("auto", GPU, torch.bfloat16) == (chosen, BLOCK_KERNELS[chosen])
    assert pick_block_kernel("auto", GPU, torch.float32)[0] == "reference"


def test_an_explicit_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0), FA2)
    message = r"'flash-attn-3' cannot run on cuda with bfloat16; choose one of auto, flash-attn-2, varlen, reference"
    with pytest.raises(UserError, match=message):
        pick_block_kernel("flash-attn-3", GPU, torch.bfloat16)


def test_transformer_engine_needs_packed_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0), TE)
    install(monkeypatch, "transformer_engine.pytorch.utils", get_cudnn_version=lambda: (9, 5, 1))
    assert not fused.TransformerEngine().available(GPU, torch.bfloat16)


def test_installed() -> None:
    """flash-attn 4 alone makes a package flash_attn in which 2 is not."""
    assert varlen.installed("tetrascope.errors") and not varlen.installed("tetrascope.parallel.none_such")
    assert not varlen.installed("none_such.interface")


def test_check_kernel_passes_what_is_right() -> None:
    for name in ("cpu-flash", "reference"):
        check_kernel(name, BLOCK_KERNELS[name], torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("wrong", ["output", "logsumexp", "dq", "dk", "dv"])
def test_check_kernel_names_what_is_wrong(wrong: str) -> None:
    class Wrong(Reference):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockSet) -> tuple[Tensor, Tensor]:
            out, lse = super().forward(q, k, v, blocks)
            # Output in another order of heads; logsumexp to the base of 2, as some kernels keep it.
            return out.flip(1) if wrong == "output" else out, lse * 1.4427 if wrong == "logsumexp" else lse

        def backward(
            self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockSet
        ) -> tuple[Tensor, Tensor, Tensor]:
            found = super().backward(grad, q, k, v, out, lse, blocks)
            factors = [1.1 if name == wrong else 1.0 for name in ("dq", "dk", "dv")]
            return tuple(x * f for x, f in zip(found, factors, strict=True))  # type: ignore[return-value]

    with pytest.raises(UserError, match=rf"kernels\.context: mine gives another {wrong} than the formula on cpu"):
        check_kernel("mine", Wrong(), torch.device("cpu"), torch.bfloat16)


def test_check_kernel_turns_a_failure_into_advice() -> None:
    class Failing(Reference):
        def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
            raise TypeError("no argument causal")

    with pytest.raises(UserError, match=r"mine failed on a small pack on cpu \(TypeError: no argument causal\); insta"):
        check_kernel("mine", Failing(), torch.device("cpu"), torch.bfloat16)
