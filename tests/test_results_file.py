"""Result files: which processor is theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results_file
from benchmarks.results_file import AVX2_ONLY, avx2_only
from mvpfx.kernels.library import INSTRUCTIONS, isa

HAS_AVX2 = isa() in INSTRUCTIONS[: INSTRUCTIONS.index("avx2") + 1]


@pytest.mark.parametrize(
    ("name", "maker"),
    [("AMD EPYC", "amd"), ("Intel(R) Xeon(R) Processor", "intel"), ("(unnamed)", "unknown")],
)
def test_processors_of_two_makers_have_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch, name: str, maker: str
) -> None:
    monkeypatch.setattr(results_file, "processor", lambda: name)
    monkeypatch.setattr(results_file.break_even, "processor", lambda: "avx512_bf16")
    assert results_file.processor_kind() == f"avx512_bf16-{maker}"


def test_no_limit_is_no_limit() -> None:
    assert not avx2_only({"PATH": "/bin"})


@pytest.mark.parametrize(
    "variables",
    [
        {name: value for name, value in AVX2_ONLY.items() if name != "ONEDNN_MAX_CPU_ISA"},
        AVX2_ONLY | {"ATEN_CPU_CAPABILITY": "default"},
    ],
    ids=["one missing", "another value"],
)
def test_all_are_limited_or_none(variables: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"Set all .*MKL_ENABLE_INSTRUCTIONS=AVX2.* or none"):
        avx2_only(variables)


@pytest.mark.skipif(not HAS_AVX2, reason="the processor or the library has no AVX2 kernels")
def test_a_processor_stands_for_one_with_avx2_only() -> None:
    """Torch, the native kernels and the name of the result file keep to it."""
    code = (
        "from benchmarks import results_file; from mvpfx.kernels.library import isa; import torch;"
        "found = results_file.environment(torch.device('cpu'));"
        "print(isa(), found['kept_to'], found['instructions'], results_file.processor_kind())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | AVX2_ONLY,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    *limits, kind = done.stdout.split()
    assert limits == ["avx2", "avx2", "AVX2"]
    assert kind.startswith("avx2-")
