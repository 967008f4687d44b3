"""The command line: tetrascope train | convert | verify | bench | data.

Bad input ends with one message on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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
) -> None:
    """Train. Starts the ranks the configuration asks for, unless torchrun or the like has started them."""
    from tetrascope.engine.config import load_config

    if dry_run:
        return _dry_run(config, overrides)
    from tetrascope.engine.launch import INTERRUPTED, launch, launched, world_from_environment
    from tetrascope.engine.setup import prepare
    from tetrascope.tools.checkpoint_convert.native_to_hf import check_destination, native_to_hf

    loaded = load_config(config, overrides)
    setup = prepare(loaded, world_from_environment())
    hf_folder = loaded.output.dir / "hf"
    if loaded.output.export_hf:
        check_destination(hf_folder)
    if not launched():
        _index(setup)
        flags = ["--resume"] if resume else []
        raise typer.Exit(launch(["train", str(config), *(overrides or []), *flags], setup.layout.world, loaded))
    from tetrascope.engine.trainer import train as run

    outcome = run(setup, resume)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if loaded.output.export_hf and os.environ["RANK"] == "0":
        native_to_hf(outcome.checkpoint, hf_folder, loaded.train.dtype)
        print(f"exported for transformers: {hf_folder}", file=sys.stderr)


def _index(setup: Any) -> None:
    """Indexes the run's data before any rank starts, so that what is wrong with it is said once."""
    from tetrascope.engine.setup import open_data
    from tetrascope.tools.data.sources import progress_bar

    with progress_bar() as progress:
        open_data(setup, progress)


def _dry_run(config: Path, overrides: list[str] | None) -> None:
    from rich.console import Console

    from tetrascope.engine.config import load_config
    from tetrascope.engine.dryrun import describe, dry_run

    table, lines = describe(dry_run(load_config(config, overrides)))
    Console().print(table)
    for line in lines:
        print(line)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder of a run (checkpoints/step-…).")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format to write: hf.")] = "hf",
    dtype: Annotated[str, typer.Option(help="Type of the written tensors.")] = "float32",
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, if not where the run had it.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Names and arrangement of the tensors.", show_default="the family's first"),
    ] = None,
) -> None:
    """Convert a checkpoint."""
    from tetrascope.tools.checkpoint_convert.native_to_hf import native_to_hf

    if to != "hf":
        raise UserError(f"--to: unknown format {to!r}; this version writes hf")
    native_to_hf(source, destination, dtype, tokenizer, layout)
    print(f"wrote {destination}")


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
