"""mvpfx: a torch.fx compiler for movement pruning.

`prepare` before fine-tuning, `convert` for deployment, `sparsity_table` to see what happened.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mvpfx import _supported_torch as _supported_torch  # first: it names what torch lacks
from mvpfx import distributed
from mvpfx.api import graphs, prepare
from mvpfx.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mvpfx.config import PruningConfig
from mvpfx.conversion import convert, load
from mvpfx.cut_schedule import OneShotSchedule, StepSchedule
from mvpfx.distillation import Distillation, distillation_loss
from mvpfx.explanation import explain
from mvpfx.optim import parameter_groups
from mvpfx.penalty import penalty
from mvpfx.report import Report, sparsity_table
from mvpfx.saved_config import pruning_config
from mvpfx.schedule import ConstantSchedule, CubicSchedule, ExponentialSchedule, LinearSchedule
from mvpfx.scheduler import SparsityScheduler
from mvpfx.state import report_of
from mvpfx.store import save
from mvpfx.views import masks, scores

if TYPE_CHECKING:
    from mvpfx import hf

__all__ = [
    "ConstantSchedule",
    "CubicSchedule",
    "Distillation",
    "ExponentialSchedule",
    "LinearSchedule",
    "OneShotSchedule",
    "PruningConfig",
    "Report",
    "SparsityScheduler",
    "StepSchedule",
    "convert",
    "distillation_loss",
    "distributed",
    "explain",
    "graphs",
    "hf",
    "latest_checkpoint",
    "load",
    "load_checkpoint",
    "masks",
    "parameter_groups",
    "penalty",
    "prepare",
    "pruning_config",
    "report_of",
    "save",
    "save_checkpoint",
    "scores",
    "sparsity_table",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`mvpfx.hf`, which imports transformers, when it is first asked for."""
    if name == "hf":
        return importlib.import_module("mvpfx.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
