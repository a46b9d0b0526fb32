"""mvpfx: a torch.fx compiler for movement pruning."""

from mvpfx.api import convert, graphs, prepare
from mvpfx.config import PruningConfig
from mvpfx.report import explain, sparsity_table
from mvpfx.schedule import ConstantSchedule, CubicSchedule, LinearSchedule

__all__ = [
    "ConstantSchedule",
    "CubicSchedule",
    "LinearSchedule",
    "PruningConfig",
    "convert",
    "explain",
    "graphs",
    "prepare",
    "sparsity_table",
]
