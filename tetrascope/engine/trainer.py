"""One rank of a run: everything it holds, its start and its steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tetrascope.engine import flops
from tetrascope.engine.attention import context_attention
from tetrascope.engine.build import StageModel, build_optimizer
from tetrascope.engine.checkpoint import Outcome as Saved
from tetrascope.engine.checkpoint import Saver, checkpoints, load_checkpoint, newest_whole, read_state, tidy
from tetrascope.engine.config import Config
from tetrascope.engine.config_file import validated
from tetrascope.engine.data.collate import MicroBatch
from tetrascope.engine.data.loader import Loader, StepData
from tetrascope.engine.data.samples import Loaded, SampleLoader, Task, check_digests, sample_loader
from tetrascope.engine.data.skipped import Skip, SkipLog
from tetrascope.engine.lr import learning_rate
from tetrascope.engine.modules import trained
from tetrascope.engine.plan import CostModel, Cursor, Planner, StepPlan
from tetrascope.engine.setup import Setup, index_folder, open_data
from tetrascope.engine.step import forward_backward
from tetrascope.engine.step_schedule import step_schedules
from tetrascope.engine.storage import from_rank_0
from tetrascope.engine.trace.tracer import Tracer
from tetrascope.errors import UserError
from tetrascope.parallel.mesh import Mesh
from tetrascope.parallel.pipeline.actions import Schedule
from tetrascope.parallel.pipeline.executor import connect
from tetrascope.parallel.pipeline.program import program


@dataclass(frozen=True)
class StepStats:
    """What a step did, the same on every rank but for the times. Times in seconds, FLOPs of the whole batch.

    packing: tokens over the room for them. decoder_imbalance, vision_imbalance: the busiest data-parallel rank's work
    over the mean.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    images: int
    skipped: int
    vision_flops: float
    language_flops: float
    seconds: float
    data_wait: float
    packing: float = 1.0
    decoder_imbalance: float = 1.0
    vision_imbalance: float = 1.0


def device_of_rank(choice: str) -> torch.device:
    """The device that `train.device` means on this rank. Raises UserError when it asks for a GPU there is not."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"train.device: local rank {local} has no GPU ({torch.cuda.device_count()} here); start fewer ranks a node "
            "or set train.device=cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class Trainer:
    """One rank of a run.

    Uses the default process group when there is one; otherwise makes it, from RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT in the environment, as torchrun sets them. Reads the data set before it makes the process group, so
    that what is wrong with it ends all ranks alike. after_save: see `Saver`.
    trace: how many steps to record.
    """

    def __init__(self, setup: Setup, after_save: Callable[[Path], None] | None = None, trace: int = 0) -> None:
        config = setup.config
        self.setup, self.config = setup, config
        torch.set_num_threads(config.train.threads)
        self.device = device_of_rank(config.train.device)
        self.data = open_data(setup, device=self.device)
        cost = CostModel(setup.model_config, trained(setup.modules))
        self.planner = Planner(self.data.for_planner(), config.train.seed, setup.layout, config.batch, cost)
        self._made_group = not dist.is_initialized()
        if self._made_group:
            dist.init_process_group("gloo" if self.device.type == "cpu" else "nccl")
        self.mesh = Mesh(setup.layout, self.device.type)
        connect(setup.pipeline.cut.placement, self.mesh)
        dtype = getattr(torch, config.train.dtype)
        self.model = StageModel(
            setup.family,
            setup.model_config,
            self.mesh,
            setup.pipeline.cut,
            context_attention(setup.attention[1], self.mesh, dtype, config.kernels),
            dtype,
            setup.modules,
            config.train.recompute,
            config.train.loss_rows,
            config.train.mlp_rows,
        )
        self.optimizer = build_optimizer(self.model, config.optimizer, self.device)
        self.schedules = step_schedules(setup, self.planner.info)
        self.loader = Loader(
            self._sample_loader(),
            self.planner,
            setup.family,
            setup.model_config,
            self.mesh,
            self.device,
            config.train.seed,
            config.data.workers,
            config.data.prefetch,
            self._name_of,
            self._schedule,
        )
        self.skipped = SkipLog(
            config.output.dir / "skipped.jsonl" if self.mesh.rank == 0 else None,
            len(self.data) + len(self.data.left_out()),
            config.data.max_bad_samples,
        )
        self.news: list[Skip] = []
        """What the last step, or the start, skipped that had not been skipped before."""
        self.tracer = Tracer(
            trace, config.output.dir / "trace", self.mesh, self.device, setup.pipeline.cut.vision_chunk
        )
        self.step_number = 0
        self.cursor = Cursor()
        self.saver = Saver(self.checkpoints, config.checkpoint, after_save)
        self.checkpoint: Path | None = None
        """The newest one that this run started from or is known to have saved."""

    def _sample_loader(self) -> Callable[[], Callable[[Task], Loaded]]:
        """What makes the function that reads samples: in this process from the data that is open here."""
        setup = self.setup
        if self.config.data.workers:
            folder, digests = index_folder(self.config), self.data.digests()
            return SampleLoader(self.config.data, setup.family.name, setup.model_config, folder, digests)
        here = sample_loader(self.data, setup.family, setup.model_config)
        return lambda: here

    def _schedule(self, plan: StepPlan) -> Schedule:
        """The pipeline's schedule of a step; what this stage does in it is made here too, in the loader's thread."""
        schedule = self.schedules.of(plan, self.mesh.index("dp"))
        program(schedule, self.mesh.index("pp"))  # which keeps it for the executor
        return schedule

    def _name_of(self, task: Task) -> str:
        name, number = self.data.name_of(task.source, task.place)
        return f"sample {number} of source {name}"

    @property
    def checkpoints(self) -> Path:
        return self.config.output.dir / "checkpoints"

    def start(self, resume: bool) -> str:
        """Fills the weights, from the newest checkpoint or from the run's source. Returns a line that says which.

        Raises UserError when there are checkpoints but the run is not meant to go on, or when the ranks do not share
        the output folder or do not see the same data.
        """
        self.saver.ranks.first(lambda: tidy(self.checkpoints))
        present = list(checkpoints(self.checkpoints).values())
        agreed = from_rank_0(present[-1].name if present else None, self.config.output.dir, self.device)
        if agreed and not resume:
            raise UserError(
                f"output.dir: {self.config.output.dir} already holds {agreed}; add --resume to go on from it, "
                "or choose another output.dir"
            )
        found, passed_over = self._find() if agreed else (None, "")
        self._check_data()
        if found:
            self.cursor = Cursor.from_json(read_state(found).get("cursor"), str(found))
            self.planner.resume(self.cursor)
        self._restore_skipped(resume)
        if not found:
            source = self.setup.source()
            self.model.load(source, self.optimizer)
            return f"starting from {'random weights' if self.config.model.init_from is None else source}"
        self.step_number, fresh = load_checkpoint(found, self.model, self.optimizer)
        self.checkpoint = found
        note = f"; {len(fresh)} tensors newly trained: their moments and Adam's step count start at zero"
        changed = _changed_order(found, self.config, self._samples())
        return f"going on from {found}, step {self.step_number}{passed_over}{note if fresh else ''}{changed}"

    def _find(self) -> tuple[Path, str]:
        """The newest whole checkpoint, and a note of those that were passed over. Raises UserError without one."""
        found = newest_whole(self.checkpoints, self.saver.ranks)
        why = "; ".join(found.passed_over)
        if found.checkpoint is None:
            raise UserError(
                f"{self.checkpoints}: no checkpoint is whole: {why}; copy one again, or remove them to start anew"
            )
        return found.checkpoint, f"; passed over {why}" if why else ""

    def _check_data(self) -> None:
        """Raises UserError on all ranks when one of them would plan other steps than rank 0."""
        of_rank_0: list[tuple[str, ...]] = [self.data.digests()]
        dist.broadcast_object_list(of_rank_0, src=0)
        same = torch.tensor(float(of_rank_0[0] == self.data.digests()), device=self.device)
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        why = "while the ranks opened it, or is another one on another node; let it alone and start again"
        check_digests(self.data, of_rank_0[0], why)
        if not same.item():
            raise UserError(f"data: not every rank sees the same samples as rank 0: a source changed {why}")
        self._check_profile()

    def _check_profile(self) -> None:
        """Raises UserError on all ranks when one would cut the model or order its work by another machine's profile."""
        of_rank_0 = [self.schedules.hardware]
        dist.broadcast_object_list(of_rank_0, src=0)
        same = torch.tensor(float(of_rank_0[0] == self.schedules.hardware), device=self.device)
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if not same.item():
            raise UserError(
                f"parallel.hardware: not every rank reads the same profile as rank 0 ({of_rank_0[0].name}); copy the "
                "file to all nodes, or name a profile"
            )

    def _samples(self) -> dict[str, int]:
        """Indexed samples by source."""
        return {p.section.name: len(i) for p, i in zip(self.data.parts, self.data.indexes, strict=True)}

    def _restore_skipped(self, resume: bool) -> None:
        """What was skipped before, by this run and by its indexes."""
        file = self.config.output.dir / "skipped.jsonl"
        if resume and file.exists():
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            self.skipped.restore(lines, self.cursor.step, self.data.left_out())
        dist.barrier()  # all have read what rank 0 may now write
        self.skipped.rewrite()
        if not resume and self.mesh.rank == 0:
            file.unlink(missing_ok=True)
        self.news = self.skipped.add(self.data.left_out())

    def step(self, stop: int | None) -> StepStats:
        """Takes one optimizer step; stop: no step from this number on will be asked for (None: they go on).

        Raises UserError when more samples than `data.max_bad_samples` were unreadable, or all of a step's.
        """
        self.tracer.begin()
        began = time.monotonic()
        data = self.loader.get(self.step_number, stop)
        waited = time.monotonic() - began
        self.tracer.mark()
        total_weight = data.plan.weight(self._drop_bad(data))
        if total_weight == 0:
            raise UserError(f"step {self.step_number + 1}: none of its samples could be read; see skipped.jsonl")
        self.optimizer.zero_grad()
        self.tracer.mark()
        loss = forward_backward(self.model, data.schedule, data.batches, total_weight, self.tracer.recorder)
        self.tracer.mark()
        norm = self.optimizer.reduce()
        self.tracer.mark()
        lr = learning_rate(self.config.optimizer, self.step_number, self.config.train.steps)
        self.optimizer.step(lr, norm)
        self.tracer.mark()
        dist.all_reduce(loss)
        self.step_number, self.cursor = self.step_number + 1, data.plan.after
        stats = self._stats(data, loss.item(), norm.item(), lr, time.monotonic() - began, waited)
        dp = self.mesh.index("dp")
        self.tracer.end(self.step_number, data.schedule, lambda: self.schedules.costs(data.plan, dp))
        return stats

    def _drop_bad(self, data: StepData) -> frozenset[int]:
        """Agrees with all ranks on the draws that could not be read, takes their weight, returns their places."""
        plan = data.plan
        flags = torch.zeros(len(plan.draws), dtype=torch.int32, device=self.device)
        for place in data.failures:
            flags[place] = 1
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad = frozenset(flags.nonzero().flatten().tolist())
        self.news = self._agree_on_reasons(data) if bad else []
        for batch, micro in zip(data.batches, plan.micro_batches[self.mesh.index("dp")], strict=True):
            for number, place in enumerate(micro.samples):
                if place in bad:
                    _take_weight(batch, number)
        return bad

    def _agree_on_reasons(self, data: StepData) -> list[Skip]:
        """Tells all ranks why samples were skipped, which only the ranks that read them know; returns what is new."""
        of_ranks: list[dict[int, tuple[str, str]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, data.failures)
        told = {place: reason for reasons in of_ranks for place, reason in reasons.items()}
        skips = []
        for place, (kind, reason) in sorted(told.items()):
            draw = data.plan.draws[place]
            name, number = self.data.name_of(draw.source, draw.sample)
            skips.append(Skip(kind, name, number, reason, data.plan.step))
        return self.skipped.add(skips)

    def _stats(self, data: StepData, loss: float, norm: float, lr: float, seconds: float, waited: float) -> StepStats:
        infos = [self.planner.info(draw) for draw in data.plan.draws]
        media = [one for info in infos for one in info.media]
        documents = [info.tokens for info in infos]
        vision, language = flops.training_flops(self.setup.model_config, media, documents, trained(self.setup.modules))
        return StepStats(
            loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens=sum(documents),
            images=len(media),
            skipped=len(self.skipped),
            vision_flops=vision,
            language_flops=language,
            seconds=seconds,
            data_wait=waited,
            packing=data.figures.efficiency,
            decoder_imbalance=data.figures.ranks.decoder,
            vision_imbalance=data.figures.ranks.vision,
        )

    def save(self) -> Saved | None:
        """Begins a checkpoint of the steps taken so far; see `Saver.save`."""
        state = {**self.setup.describe(), "cursor": self.cursor.to_json(), "samples": self._samples()}
        return self._seen(self.saver.save(self.step_number, self.model, self.optimizer, state))

    def saved(self, last: bool = False) -> Saved | None:
        """Waits for the checkpoint that was begun; see `Saver.collect`."""
        return self._seen(self.saver.collect(last))

    def _seen(self, outcome: Saved | None) -> Saved | None:
        if outcome is not None and outcome.checkpoint is not None:
            self.checkpoint = outcome.checkpoint
        return outcome

    def close(self) -> None:
        """Stops preparing data, lets a save end, and leaves the process group, unless the caller made it."""
        self.loader.close()
        self.saver.close()
        if self._made_group:
            dist.destroy_process_group()


def _changed_order(checkpoint: Path, config: Config, samples: dict[str, int]) -> str:
    """A warning when the samples will not come in the order in which the checkpoint's run went through them.

    samples: by source, now. The size of the batch is not part of that: the stream of samples goes on from the
    checkpoint's cursor.
    """
    state = read_state(checkpoint)
    if "config" not in state:  # no run's checkpoint, but one converted from another format
        return ""
    before = validated(Config, state["config"], str(checkpoint))
    old, new = _order(before, state.get("samples", samples)), _order(config, samples)
    keys = [*old, *(key for key in new if key not in old)]
    changes = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    return f"; note: {', '.join(changes)}: samples come in another order than before" if changes else ""


def _order(config: Config, samples: dict[str, int]) -> dict[str, object]:
    """All that the order of the samples depends on, by name."""
    found: dict[str, object] = {"train.seed": config.train.seed, "data.shuffle": config.data.shuffle}
    for source in config.data.all_sources():
        own = {"path": source.path, "weight": source.weight, "shuffle": source.shuffle}
        found |= {f"{key} of source {source.name}": value for key, value in own.items()}
    return found | {f"number of samples of source {name}": number for name, number in samples.items()}


def _take_weight(batch: MicroBatch, number: int) -> None:
    """Nothing of a document, by its number in the micro-batch, counts in the loss any more."""
    rows, _ = batch.rows_of(number)
    batch.weights_T[torch.from_numpy(rows).to(batch.weights_T.device)] = 0
