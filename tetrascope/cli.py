"""The command line: tetrascope train | plan | convert | verify | bench | data.

Bad input ends with one message on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tetrascope.errors import UserError

app = typer.Typer(
    help="Train vision-language models under tensor, pipeline, data and context parallelism.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure throughput.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
data_app = typer.Typer(help="Look at what a run trains on, before it does.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration of the run.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, as section.key=value.", show_default=False)]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if any.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan at full size; no data, weights or ranks.")
    ] = False,
    trace: Annotated[int, typer.Option(help="Record so many steps, after the first, for a report.", min=0)] = 0,
    init_from: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the first weights.", show_default="model.init_from")
    ] = None,
) -> None:
    """Train. Starts the ranks the configuration asks for, unless torchrun or the like has started them."""
    from tetrascope.engine.config_file import load_config

    if init_from is not None:
        overrides = [*(overrides or []), f"model.init_from={json.dumps(str(init_from))}"]
    if dry_run:
        return _dry_run(config, overrides)
    from tetrascope.engine.launch import INTERRUPTED, launch, launched, world_from_environment
    from tetrascope.engine.setup import prepare
    from tetrascope.tools.checkpoint_convert.native_to_hf import check_destination, native_to_hf

    loaded = load_config(config, overrides)
    setup = prepare(loaded, world_from_environment())
    hf_folder = loaded.output.dir / "hf"
    if loaded.output.export_hf or loaded.checkpoint.export_hf:
        check_destination(hf_folder)
    if not launched():
        _index(setup)
        flags = [*(["--resume"] if resume else []), *(["--trace", str(trace)] if trace else [])]
        raise typer.Exit(launch(["train", str(config), *(overrides or []), *flags], setup.layout.world, loaded))
    from tetrascope.engine.run import train as run

    exported: list[Path] = []

    def export(checkpoint: Path) -> None:
        native_to_hf(checkpoint, hf_folder, loaded.train.dtype)
        exported.append(checkpoint)

    outcome = run(setup, resume, export if loaded.checkpoint.export_hf else None, trace)
    if trace and os.environ["RANK"] == "0":
        _report_trace(loaded.output.dir / "trace")
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if loaded.output.export_hf and os.environ["RANK"] == "0":
        if outcome.checkpoint not in exported:
            export(outcome.checkpoint)
        print(f"exported for transformers: {hf_folder}", file=sys.stderr)


def _report_trace(folder: Path) -> None:
    """Writes the report of a traced run and prints the last step's ledger."""
    from rich.console import Console

    from tetrascope.engine.trace.ledger import ledgers
    from tetrascope.engine.trace.record import read_traces
    from tetrascope.tools.trace.report import ledger_table, write_report

    Console(stderr=True, width=200).print(ledger_table(ledgers(read_traces(folder)[-1])))
    print(f"trace: {write_report(folder)}", file=sys.stderr)


def _index(setup: Any) -> None:
    """Indexes the run's data before any rank starts, so that what is wrong with it is said once."""
    from tetrascope.engine.setup import open_data
    from tetrascope.tools.data.sources import progress_bar

    with progress_bar() as progress:
        open_data(setup, progress)


def _dry_run(config: Path, overrides: list[str] | None) -> None:
    from rich.console import Console

    from tetrascope.engine.config_file import load_config
    from tetrascope.engine.dryrun import describe, dry_run

    table, lines = describe(dry_run(load_config(config, overrides)))
    Console().print(table)
    for line in lines:
        print(line)


@app.command()
def plan(
    config: ConfigFile,
    gpus: Annotated[int, typer.Option(help="GPUs to plan for.", show_default=False)],
    overrides: Overrides = None,
    hardware: Annotated[
        str | None, typer.Option(help="h100-sxm, a100, h200, cpu, or a file.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(help="Choices to show.", min=1)] = 10,
    pick: Annotated[int, typer.Option(help="Which of them to draw and to print as configuration.", min=1)] = 1,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page, with the timeline.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Measure this machine, write its profile here, and plan for it.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Pictures in a sample, as in 0:0.2,1:0.5,4:0.3.", show_default="1:1")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Of a picture, as in 1280x720.", show_default="typical of the family")
    ] = None,
    text: Annotated[int | None, typer.Option(help="Tokens of text in a sample.", show_default="256")] = None,
    data: Annotated[bool, typer.Option("--data", help="Samples of the run's own data, indexed first.")] = False,
) -> None:
    """Find the fastest layouts and schedules for so many GPUs, predicted from the configuration alone."""
    from tetrascope.tools.plan.command import Asked
    from tetrascope.tools.plan.command import plan as run

    asked = Asked(gpus, hardware, calibrate, top, pick, html, images, text, image_size, data)
    raise typer.Exit(run(config, overrides or [], asked))


class _ConvertCommand(TyperCommand):
    """`--verify` may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from tetrascope.tools.checkpoint_convert.command import bare_verify

        return super().parse_args(ctx, bare_verify(args))


@app.command(cls=_ConvertCommand)
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder; its format is recognised.", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(help="Folder to write, which must not exist or be empty.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="Format to write: hf, native or megatron.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="Of the written tensors.", show_default="as the source has them")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="hf: names and arrangement of the tensors.", show_default="the family's first")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="native, megatron: cut as ranks would, tp2pp2.", show_default="whole tensors")
    ] = None,
    file_size: Annotated[
        str | None, typer.Option(help="Begin a new file at this size.", show_default="as the source has it, or 5GB")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(help="Read it back: tensors (all bits) or logits.", show_default="no; alone: tensors")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="Tensors that may be unused or missing, a regular expression; repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Hugging Face folder that describes the model, if the source does not.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, if not where the run had it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print which tensor becomes what; write nothing.")] = False,
) -> None:
    """Convert a checkpoint between Hugging Face, native and Megatron-Core. Run again, it goes on where it stopped."""
    from tetrascope.tools.checkpoint_convert.command import parse_bytes, run
    from tetrascope.tools.checkpoint_convert.formats import Options

    options = Options(
        dtype=dtype,
        layout=layout,
        shards=shards or "",
        file_bytes=parse_bytes(file_size) if file_size else None,
        allow=tuple(allow or ()),
        config=config,
        tokenizer=tokenizer,
    )
    raise typer.Exit(run(source, destination, to, options, verify or "", dry_run))


@app.command()
def verify(
    family: Annotated[str, typer.Argument(help="Model family, such as qwen2_vl.")],
    layouts: Annotated[str | None, typer.Option(help="Only these, as in tp2,pp2,tp2xpp2.")] = None,
    world: Annotated[int, typer.Option(help="Most ranks to start.", min=1)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove that every layout computes what one process of the reference computes."""
    from tetrascope.tools.verify.command import verify as run

    raise typer.Exit(run(family, layouts, world, as_json))


@bench_app.command("train")
def bench_train(
    config: ConfigFile,
    overrides: Overrides = None,
    warmup: Annotated[int, typer.Option(help="Steps before the timed ones.", min=0)] = 3,
    steps: Annotated[int, typer.Option(help="Timed steps.", min=1)] = 10,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON line to it.", show_default="bench.jsonl in output.dir")
    ] = None,
) -> None:
    """Measure training: tokens/s, step times, MFU, memory. Checkpoints are neither read nor written."""
    from tetrascope.tools.bench.command import bench_train as run

    raise typer.Exit(run(config, overrides or [], warmup, steps, json_file))


@bench_app.command("compare")
def bench_compare(
    family: Annotated[str, typer.Argument(help="Model family.")] = "qwen2_vl",
    sizes: Annotated[str, typer.Option(help="Model sizes, comma-separated.")] = "0.5M,5M,20M",
    pairs: Annotated[int, typer.Option(help="Pairs of steps to time.", min=1)] = 15,
) -> None:
    """Compare a training step with transformers' on one CPU process: packed, and with samples of unequal lengths."""
    from tetrascope.tools.bench.compare import bench_compare as run

    raise typer.Exit(run(family, sizes.split(","), pairs))


@data_app.command("index")
def data_index(
    config: Annotated[
        Path, typer.Argument(help="YAML configuration, or with --config a data file.", show_default=False)
    ],
    overrides: Overrides = None,
    base: Annotated[
        Path | None, typer.Option("--config", help="Configuration to use for a data file.", show_default=False)
    ] = None,
    source: Annotated[str | None, typer.Option(help="Only this source.", show_default="all")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes.", min=1, show_default="data.index_workers, or one a core")
    ] = None,
) -> None:
    """Index the samples of every source, or find that they are. Exit code 1: too many cannot be used."""
    from tetrascope.tools.data.command import data_index as run

    raise typer.Exit(run(config, overrides or [], base, source, workers))


@data_app.command("inspect")
def data_inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page, with pictures.")] = None,
    samples: Annotated[int, typer.Option(help="Samples to show.", min=0)] = 4,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.", min=0)] = 0,
) -> None:
    """Show histograms of lengths, pictures and work, and samples as the model gets them."""
    from tetrascope.tools.data.command import data_inspect as run

    raise typer.Exit(run(config, overrides or [], html, samples, seed))


@data_app.command("plan")
def data_plan(
    config: ConfigFile,
    overrides: Overrides = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks.", min=1, show_default="parallel.dp")] = None,
    steps: Annotated[int, typer.Option(help="Steps to plan.", min=1)] = 10,
) -> None:
    """Plan the first steps: how full micro-batches are, and how evenly work is spread over ranks."""
    from tetrascope.tools.data.command import data_plan as run

    raise typer.Exit(run(config, overrides or [], dp, steps))


def main() -> int:
    """Entry point of the console script. Returns the exit code."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        from tetrascope.engine.launch import report

        report(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
