"""What the ranks of the Megatron tests do, by name: they run Megatron-Core itself.

Megatron-Core is written for GPUs. What it needs to run on a CPU is in `on_cpu`: the current device, CUDA's random
state, and tensors made with device="cuda".
"""

from __future__ import annotations

import argparse
import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

SEED = 1


@contextlib.contextmanager
def on_cpu(tp: int = 1, pp: int = 1) -> Iterator[None]:
    """Megatron-Core's process groups over the job's ranks, and CUDA calls led to the CPU."""
    import torch._dynamo

    torch._dynamo.config.disable = True  # read while Megatron-Core is imported: compiling takes minutes

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    real = torch.empty, torch.zeros, torch.ones, torch.tensor, torch.arange

    def led(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "cpu")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

        return call

    names = ("empty", "zeros", "ones", "tensor", "arange")
    patches = [mock.patch.object(torch, name, led(f)) for name, f in zip(names, real, strict=True)]
    patches += [
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
        mock.patch("torch.cuda.synchronize", lambda *_: None),
        mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(random.CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
    ]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp)
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        parallel_state.destroy_model_parallel()


def gpt_config(arguments: dict[str, Any], tp: int = 1, pp: int = 1) -> Any:
    """Megatron-Core's TransformerConfig of the arguments that a checkpoint carries."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=arguments["num_layers"],
        hidden_size=arguments["hidden_size"],
        ffn_hidden_size=arguments["ffn_hidden_size"],
        num_attention_heads=arguments["num_attention_heads"],
        num_query_groups=arguments["num_query_groups"],
        kv_channels=arguments["kv_channels"],
        layernorm_epsilon=arguments["norm_epsilon"],
        normalization=arguments["normalization"],
        add_bias_linear=arguments["add_bias_linear"],
        add_qkv_bias=arguments["add_qkv_bias"],
        qk_layernorm=arguments["qk_layernorm"],
        gated_linear_unit=arguments["swiglu"],
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_gpt(arguments: dict[str, Any], tp: int = 1, pp: int = 1) -> Any:
    """The GPTModel that a checkpoint's arguments describe, from Megatron-Core's own local layer spec."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(qk_layernorm=arguments["qk_layernorm"], normalization=arguments["normalization"])
    return GPTModel(
        gpt_config(arguments, tp, pp),
        spec,
        vocab_size=arguments["padded_vocab_size"],
        max_sequence_length=512,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_base=arguments["rotary_base"],
        rotary_percent=arguments["rotary_percent"],
    )


def load(model: Any, folder: Path) -> dict[str, Any]:
    """Loads a torch_dist folder into a model with Megatron-Core's own code, no key of the model too few, none of the
    folder too many but those named `unused.`; returns the common state."""
    from megatron.core import dist_checkpointing

    state = {"model": model.sharded_state_dict()}
    # "missing": in the folder, but not in the model; "unexpected": the other way round.
    common, missing, unexpected = dist_checkpointing.load(state, str(folder), strict="return_all")
    assert not unexpected, unexpected
    assert all(key.startswith("unused.") for key in missing), missing
    model.load_state_dict(common["model"], strict=False)
    return common


def common_arguments(folder: Path) -> dict[str, Any]:
    """The arguments in a folder's common.pt, as Megatron-Core loads them."""
    from megatron.core import dist_checkpointing

    return vars(dist_checkpointing.load_common_state_dict(str(folder))["args"])


def logits(folder: Path, ids: Tensor, tp: int = 1) -> Tensor:
    """`[B, T, V padded]` of a torch_dist folder's GPTModel under tensor parallelism, put together."""
    with on_cpu(tp), torch.no_grad():
        model = build_gpt(common_arguments(folder), tp).eval()
        load(model, folder)
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
        mine = model(ids, positions, mask).contiguous()
        parts = [torch.empty_like(mine) for _ in range(tp)]
        dist.all_gather(parts, mine)
        return torch.cat(parts, dim=-1)


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    """What Megatron-Core would save of the GPTModel that a folder's arguments describe: key -> shape."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    with on_cpu():
        state = build_gpt(common_arguments(folder)).sharded_state_dict()
        apply_factories(state)
        return {v.key: tuple(v.global_shape) for v in nested_values(state) if isinstance(v, ShardedTensor)}


@contextlib.contextmanager
def saving_in_process() -> Iterator[None]:
    """Megatron-Core's saving without the processes that it forks for writing, and without psutil, which it measures
    these with: its own functions write, in this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    writer = module.FileSystemWriterAsync

    def write(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
        done, counts, found = queue.SimpleQueue[Any](), mock.MagicMock(), {}
        for number, bucket in enumerate(buckets):
            writer.write_preloaded_data(transforms, number, bucket, done, counts, use_fsync=False)
            found[number] = done.get()[1]
        results.put(found)

    with (
        mock.patch.object(writer, "write_preloaded_data_multiproc", staticmethod(write)),
        mock.patch.object(module, "_process_memory", lambda: 0),
        mock.patch.object(module, "_get_write_results_queue", queue.Queue),
    ):
        yield


def resave(folder: Path, saved: Path, legacy: Path, tp: int, pp: int) -> None:
    """Loads a torch_dist folder under TP × PP and saves it again with Megatron-Core: as torch_dist in `saved`, and in
    the older layout in `legacy`."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.transformer.enums import AttnBackend

    with on_cpu(tp, pp):
        arguments = common_arguments(folder)
        model = build_gpt(arguments, tp, pp)
        load(model, folder)
        place = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        args = argparse.Namespace(
            **{
                **arguments,
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "attention_backend": AttnBackend.unfused,
            }
        )
        common = {"checkpoint_version": 3.0, "iteration": 7, "args": args}
        if dist.get_rank() == 0:
            (saved / "iter_0000007").mkdir(parents=True)
            (saved / "latest_checkpointed_iteration.txt").write_text("7")
        dist.barrier()
        with saving_in_process():
            dist_checkpointing.save({**common, "model": model.sharded_state_dict()}, str(saved / "iter_0000007"))
        name = f"mp_rank_{place[0]:02d}" + (f"_{place[1]:03d}" if pp > 1 else "")
        mine = legacy / "iter_0000007" / name
        mine.mkdir(parents=True)
        (legacy / "latest_checkpointed_iteration.txt").write_text("7")
        torch.save({**common, "model": model.state_dict()}, mine / "model_optim_rng.pt")
        dist.barrier()
