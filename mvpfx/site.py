"""Site: one prunable weight of a model."""

from __future__ import annotations

from dataclasses import dataclass

from mvpfx.channel_unit import ChannelUnit
from mvpfx.head_unit import HeadUnit


@dataclass(frozen=True)
class Site:
    """One weight that a matmul reads, known by its canonical parameter name.

    Attributes:
        name: full parameter name, such as `encoder.layer.0.output.dense.weight`.
        shape: of the parameter as it is stored.
        out_dim: which dimension of the parameter holds the matmul's output features: 0 for
            `nn.Linear` and convolutions, 1 for weights stored `[in, out]` (`x @ w`).
        aliases: further names of the same parameter, where it is tied.
        parts: number of matrices that the parameter stacks along its first dimension: the experts
            of a mixture. No unit crosses a part, and local scope ranks within each.
        head: what one attention head has of it; None where it is no projection of an attention.
        channel: what one hidden channel has of it; None where no graph shows that other weights
            make or read the same channels, or nobody has asked.
    """

    name: str
    shape: tuple[int, ...]
    out_dim: int = 0
    aliases: tuple[str, ...] = ()
    parts: int = 1
    head: HeadUnit | None = None
    channel: ChannelUnit | None = None

    @property
    def module_name(self) -> str:
        """Full name of the module that owns the parameter; empty for the root."""
        return self.name.rpartition(".")[0]

    @property
    def parameter_name(self) -> str:
        """Name of the parameter inside its module."""
        return self.name.rpartition(".")[2]
