"""Random pruning: what every criterion has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mvpfx.criterion import Criterion, Option

if TYPE_CHECKING:
    from mvpfx.mask import Mask


class Random(Criterion):
    """Keep units that are drawn once: uniform noise for scores, the same for the same seed.

    The noise depends on the option `seed` and the name of the site, not on torch's generator.
    """

    name = "random"
    stored = "buffer"
    options: ClassVar[Mapping[str, Option]] = {"seed": Option(0, whole=True)}

    def initial(self, mask: Mask) -> Tensor:
        """Uniform in [0, 1)."""
        like = mask.unit_weights()
        name = f"{mask.option('seed'):g} {mask.site.name}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.rand(like.shape, generator=generator).to(like.device)
