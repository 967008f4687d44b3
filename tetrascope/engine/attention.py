"""The attention that models are given: a kernel, or context parallelism around it."""

from __future__ import annotations

import torch

from tetrascope.engine.config import Config, KernelsSection
from tetrascope.errors import UserError
from tetrascope.models.layers.attention import AttentionFn
from tetrascope.parallel.context.attention import ContextAttention, check_kernel, pick_block_kernel
from tetrascope.parallel.mesh import Layout, Mesh


def context_attention(
    kernel: AttentionFn, mesh: Mesh, dtype: torch.dtype, options: KernelsSection | None = None
) -> AttentionFn:
    """What computes attention on this rank.

    kernel: for whole packs, as they are without context parallelism and, always, in the vision encoder. options: which
    kernel for parts of packs, and how keys travel. A kernel on a GPU is first held to the formulas there. Raises
    UserError when it is not there for the device, or wrong.
    """
    if mesh.context.size() == 1:
        return kernel
    options = options or KernelsSection()
    device = torch.device(mesh.device)
    name, blocks = pick_block_kernel(options.context, device, dtype)
    if device.type != "cpu":
        check_kernel(name, blocks, device, dtype)
    return ContextAttention(mesh.group("ring"), mesh.group("ulysses"), kernel, blocks, options.exchange)


def check_context_kernel(config: Config) -> None:
    """Raises UserError when `kernels.context` names a kernel that cannot run on the devices of this machine."""
    if config.kernels.context != "auto":
        pick_block_kernel(config.kernels.context, _device(config), getattr(torch, config.train.dtype))


def attention_words(whole: str, config: Config, layout: Layout) -> str:
    """What was chosen, for the start-up log. whole: the kernel of whole packs."""
    if layout.ring * layout.ulysses == 1:
        return whole
    name, _ = pick_block_kernel(config.kernels.context, _device(config), getattr(torch, config.train.dtype))
    ways = [f"Ulysses of {layout.ulysses}"] if layout.ulysses > 1 else []
    if layout.ring > 1:
        ways.append(f"{'ring' if config.kernels.exchange == 'ring' else 'gathered keys'} of {layout.ring}")
    return f"{whole}, in parts {name} ({', '.join(ways)})"


def _device(config: Config) -> torch.device:
    """The kind of device that `train.device` means on this machine. Raises UserError when it is not there."""
    if config.train.device == "cpu" or (config.train.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device: is cuda, but there is no GPU here; use cpu or auto")
    return torch.device("cuda")
