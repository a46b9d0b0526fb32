"""Result files: the figures, and what one needs to know to get them again.

Holds no date, no host name and no path: the same run writes the same file but for its timings.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mvpfx import break_even
from mvpfx.kernels.library import use_isa

FOLDER = Path(__file__).parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
"""Of a processor, those on which the speed of matmuls hangs."""
AVX2_ONLY = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""Environment variables that keep torch, MKL and oneDNN to AVX2. With all of them set, a processor
that has more stands for one that has not, and native kernels keep to AVX2, too."""
PACKAGES = ("mvpfx", "torch", "transformers", "tokenizers", "numpy", "scikit-learn")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, instruction set, device and threads of this run."""
    return {
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **({"kept_to": KEPT_TO} if KEPT_TO else {}),
    }


def avx2_only(variables: Mapping[str, str]) -> bool:
    """Whether environment variables keep all to AVX2.

    Raises:
        ValueError: they keep some to it and not others, which cannot be compared then.
    """
    found = {name: variables[name] for name in AVX2_ONLY if name in variables}
    if found and found != AVX2_ONLY:
        wanted = " ".join(f"{name}={value}" for name, value in AVX2_ONLY.items())
        raise ValueError(
            f"the environment says {found}, which limits some of what is compared and not the "
            f"rest. Set all ({wanted}) or none."
        )
    return bool(found)


def installed(package: str) -> str:
    """The version of a package, or that it was run without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name, as the system tells it."""
    return _cpu_info("model name") or platform.processor() or "unknown"


def processor_kind() -> str:
    """Of a result file that one kind of processor has for itself: instructions-maker, "amx-intel".

    Two makers' processors with the same instructions are not the same to a benchmark.
    """
    maker = re.match("[a-z0-9]+", processor().lower())
    return f"{instructions()}-{maker.group() if maker else 'unknown'}"


def instructions() -> str:
    """What products can use here, as `break_even.processor` says, or are kept to."""
    return KEPT_TO or break_even.processor()


def processor_flags() -> list[str]:
    """Those of `FLAGS` that the processor has, as the system tells them; none where it does not."""
    found = (_cpu_info("flags") or _cpu_info("Features")).split()
    return [flag for flag in FLAGS if flag in found]


def _cpu_info(field: str) -> str:
    """A field of the first processor; empty where the system has no such file or field."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() == field), "")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, its keys in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_all(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every result of a folder, in the order of the file names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def parts(table: Callable[[dict[str, Any]], str], results: list[dict[str, Any]]) -> str:
    """The table of each result below the other, or that there is none."""
    return "\n\n".join(map(table, results)) or "No result files yet."


KEPT_TO = "avx2" if avx2_only(os.environ) else None
"""Instructions that this process keeps to though the processor may have more; else None."""
if KEPT_TO:
    use_isa(KEPT_TO)
