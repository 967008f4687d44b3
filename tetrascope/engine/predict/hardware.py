"""What a machine can do: profiles that come with the package (hardware.yaml, where each figure has its source), and
files of the user's in the same form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, PositiveFloat, PositiveInt

from tetrascope.engine.config_file import validated
from tetrascope.errors import UserError

Share = Annotated[float, Field(gt=0, le=1)]
"""Part of a peak that is reached."""

Seconds = Annotated[float, Field(ge=0)]
"""A time that may be nothing."""

_PROFILES = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Link:
    """How ranks talk. latency: seconds; bandwidth: bytes/s of a GPU in one direction, as it is reached."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    latency: Seconds
    bandwidth: PositiveFloat

    def point_to_point(self, size: float) -> float:
        """Seconds for `size` bytes to the neighbour."""
        return self.latency + size / self.bandwidth

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather that gives every rank `size` bytes, or of a reduce-scatter of as many, in a ring:
        n − 1 steps of size / n bytes."""
        return (ranks - 1) * (self.latency + size / ranks / self.bandwidth)

    def reduce(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, ranks)


@dataclass(frozen=True)
class Hardware:
    """A machine; the fields are explained in hardware.yaml."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    gpus_per_node: PositiveInt
    memory_bytes: PositiveFloat
    peak_flops: dict[str, PositiveFloat]
    matmul_share: Share
    attention_share: Share
    memory_bandwidth: PositiveFloat
    intra_node: Link
    inter_node: Link
    kernel_seconds: Seconds
    name: str = ""

    def peak(self, dtype: str) -> float:
        """FLOP/s at a dtype. Raises UserError when the profile has none for it."""
        if dtype not in self.peak_flops:
            raise UserError(
                f"hardware {self.name}: peak_flops has no {dtype}, only {', '.join(self.peak_flops)}; add it, or "
                "change train.dtype"
            )
        return self.peak_flops[dtype]

    def link(self, span: int) -> Link:
        """The link of ranks that lie among `span` consecutive ones: inside a node, or across the slowest border."""
        return self.intra_node if span <= self.gpus_per_node else self.inter_node


def hardware_names() -> list[str]:
    """The profiles that come with the package."""
    return list(_read(_PROFILES))


def load_hardware(name_or_path: str) -> Hardware:
    """A profile by name, or that of a YAML file. Raises UserError for neither, and for a wrong, unknown or missing
    field."""
    profiles = _read(_PROFILES)
    if name_or_path in profiles:
        return _checked(profiles[name_or_path], name_or_path, f"hardware.yaml: {name_or_path}")
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"--hardware: {name_or_path!r} is neither a profile ({', '.join(profiles)}) nor a file; choose a profile, "
            "or measure one with --calibrate"
        )
    return _checked(_read(path), path.stem, str(path))


def save_hardware(found: Hardware, path: Path) -> None:
    """Writes a file that `load_hardware` reads. Raises UserError when it cannot be written."""
    values = dataclasses.asdict(found)
    values.pop("name")
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file") from error


def _checked(raw: Any, name: str, where: str) -> Hardware:
    found: Hardware = validated(Hardware, {"name": name, **raw}, where)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}); see --calibrate for a file in its form") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected the fields of a hardware profile, such as memory_bytes; see --calibrate")
    return raw
