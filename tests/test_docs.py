"""The pages in docs/ are true: their python blocks run, in order, on tiny models."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.name: re.findall(
        r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    for page in sorted((ROOT / "docs").glob("*.md"))
}


def test_there_is_something_to_run() -> None:
    assert len(PAGES["training.md"]) == 8


LONG = ("training.md",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
        for name, blocks in PAGES.items()
        if blocks
    ],
)
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    held: dict[str, object] = {"__name__": "documentation"}
    for number, block in enumerate(PAGES[name]):
        exec(compile(block, f"<{name}, block {number + 1}>", "exec"), held)
    assert capsys.readouterr().out
