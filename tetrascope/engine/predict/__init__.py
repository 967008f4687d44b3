"""What a step will take, without running it: hardware, costs, memory, and the prediction of a candidate layout."""

from tetrascope.engine.predict.calibrate import calibrate
from tetrascope.engine.predict.costs import Parts, parts
from tetrascope.engine.predict.hardware import Hardware, Link, hardware_names, load_hardware, save_hardware
from tetrascope.engine.predict.memory import StageMemory
from tetrascope.engine.predict.model import MicroBatchShape, Model
from tetrascope.engine.predict.step import (
    Candidate,
    Prediction,
    Prepared,
    ScheduleOf,
    fixed_schedule,
    predict,
    prepare,
)

__all__ = [
    "Candidate",
    "Hardware",
    "Link",
    "MicroBatchShape",
    "Model",
    "Parts",
    "Prediction",
    "Prepared",
    "ScheduleOf",
    "StageMemory",
    "calibrate",
    "fixed_schedule",
    "hardware_names",
    "load_hardware",
    "parts",
    "predict",
    "prepare",
    "save_hardware",
]
