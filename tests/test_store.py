"""Converted models through a folder and back, in this process and in a fresh one."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mvpfx
from mvpfx.manifest import digest_of, measured
from mvpfx.packing import unpack_indices
from mvpfx.store import DESCRIPTION, TENSORS
from tests.graphs import mlp, outputs, zero_
from tests.models import build
from tests.test_coverage import FAST
from tests.test_exact import zero_units
from tests.zoo import ZOO
from tests.zoo.entry import output

MODELS = ("bert", "gpt2", "llama", "vit")


def converted(name: str, lowering: str = "dense") -> tuple[nn.Module, Any]:
    """A converted model with dead units and single zeros, and its batch."""
    model, batch = build(name)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] != 99:
            zero_(parameter[::3])
            with torch.no_grad():
                parameter *= torch.rand_like(parameter) < 0.15
    return mvpfx.convert(model.eval(), example_inputs=batch, lowering=lowering), batch


@pytest.mark.parametrize("lowering", ["dense", "csr", "bsr", "native"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_same_to_the_bit(name: str, lowering: str, tmp_path: Path) -> None:
    small, batch = converted(name, lowering)
    assert mvpfx.save(small, tmp_path / "m") == tmp_path / "m"
    loaded = mvpfx.load(tmp_path / "m")
    assert type(loaded) is type(small) and not loaded.training
    assert torch.equal(outputs(loaded, batch), outputs(small, batch))
    assert mvpfx.sparsity_table(loaded) == mvpfx.sparsity_table(small)
    assert mvpfx.explain(loaded) == mvpfx.explain(small)
    trains = {n: p.requires_grad for n, p in loaded.named_parameters()}
    assert trains == {n: p.requires_grad for n, p in small.named_parameters()}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_every_model_of_the_zoo(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    model, batch = entry.model().eval(), entry.batch(0)
    before = copy.deepcopy(model)
    zero_units(model, 0.5, whole=False)
    small = mvpfx.convert(model, example_inputs=batch)
    mvpfx.save(small, tmp_path / "m")
    loaded = mvpfx.load(tmp_path / "m", None if entry.kind == "hf" else before)
    with torch.no_grad():
        expected, found = output(small(**batch)), output(loaded(**batch))
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_in_a_fresh_process(tmp_path: Path) -> None:
    small, batch = converted("bert", "csr")
    mvpfx.save(small, tmp_path / "m")
    torch.save((batch, outputs(small, batch)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, mvpfx; folder = sys.argv[1]\n"
        "batch, expected = torch.load(folder + '/expected.pt')\n"
        "model = mvpfx.load(folder + '/m')\n"
        "with torch.no_grad(): assert torch.equal(model(**batch).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_loaded_model_trains_and_is_saved_again(tmp_path: Path) -> None:
    small, batch = converted("bert", "csr")
    mvpfx.save(small, tmp_path / "m")
    loaded = mvpfx.load(tmp_path / "m").train().requires_grad_()
    loaded(**batch).loss.backward()
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "key.bias" not in n)
    mvpfx.save(loaded, tmp_path / "again")
    again = mvpfx.load(tmp_path / "again")
    assert torch.equal(outputs(again, batch), outputs(small, batch))


def test_any_other_class_is_filled_into_a_model_of_it(tmp_path: Path) -> None:
    model, x = mlp(nn.ReLU()), torch.randn(3, 4)
    fresh = copy.deepcopy(model)
    zero_(model.get_parameter("0.weight")[:4])
    small = mvpfx.convert(model, example_inputs=x)
    mvpfx.save(small, tmp_path / "m")
    with pytest.raises(ValueError, match="Sequential is no transformers model, and code is not"):
        mvpfx.load(tmp_path / "m")
    loaded = mvpfx.load(tmp_path / "m", fresh)
    assert loaded is fresh and torch.equal(outputs(loaded, x), outputs(small, x))
    with pytest.raises(ValueError, match="a Sequential was saved, not a Linear"):
        mvpfx.load(tmp_path / "m", nn.Linear(4, 3))


@pytest.mark.parametrize(("values", "tolerance"), [("bf16", 2e-2), ("int8", 5e-2)])
def test_shorter_values_are_near(values: str, tolerance: float, tmp_path: Path) -> None:
    small, batch = converted("bert")
    exact = mvpfx.save(small, tmp_path / "exact")
    folder = mvpfx.save(small, tmp_path / "short", values=values)
    assert (folder / TENSORS).stat().st_size < (exact / TENSORS).stat().st_size
    expected, found = outputs(small, batch), outputs(mvpfx.load(folder), batch)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_indices_out_of_order_are_stored_as_they_are(tmp_path: Path) -> None:
    small, batch = converted("bert", "csr")
    layer: Any = small.get_submodule(FFN)
    with torch.no_grad():
        layer.col_indices[:2] = layer.col_indices[:2].flip(0)
        layer.values[:2] = layer.values[:2].flip(0)
    mvpfx.save(small, tmp_path / "m")
    assert f"{FFN}.col_indices" in load_file(tmp_path / "m" / TENSORS)
    assert torch.equal(outputs(mvpfx.load(tmp_path / "m"), batch), outputs(small, batch))


def test_a_folder_of_the_first_version(saved: Path, tmp_path: Path) -> None:
    first = tmp_path / "m"
    shutil.copytree(saved, first)
    first_version(lambda _: None)(first)
    tensors = load_file(first / TENSORS)
    assert f"{FFN}.crow_indices" in tensors and f"{FFN}.gaps" not in tensors
    body = json.loads((first / DESCRIPTION).read_text())
    assert body["version"] == 1 and "indices" not in body
    batch = build("bert")[1]
    assert torch.equal(outputs(mvpfx.load(first), batch), outputs(mvpfx.load(saved), batch))


def test_what_was_not_converted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Linear was not converted\. mvpfx\.save is for what"):
        mvpfx.save(nn.Linear(2, 2), tmp_path / "m")
    small, _ = converted("bert")
    with pytest.raises(ValueError, match="values must be one of exact, bf16, int8; found 'fp4'"):
        mvpfx.save(small, tmp_path / "m", values="fp4")


Damage = Callable[[Path], object]


def rewritten(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the description and make its digest right again, as somebody hostile would."""

    def damage(folder: Path) -> None:
        path = folder / DESCRIPTION
        body = json.loads(path.read_text())
        body.pop("digest")
        change(body)
        path.write_text(json.dumps({**body, "digest": digest_of(body)}))

    return damage


def restored(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors, and make the description fit."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        rewritten(lambda b: b["files"].update({TENSORS: measured(folder / TENSORS)}))(folder)

    return damage


def first_version(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Store indices as they are, as the first version of the format did, and change the tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        body = json.loads((folder / DESCRIPTION).read_text())
        for layer, size in body["indices"].items():
            found = unpack_indices(tensors.pop(f"{layer}.gaps"), size["rows"], size["columns"])
            tensors[f"{layer}.crow_indices"], tensors[f"{layer}.col_indices"] = found
        save_file(tensors, folder / TENSORS)
        rewritten(lambda b: (b.pop("indices"), b.update(version=1)))(folder)
        restored(change)(folder)

    return damage


def plan(change: Callable[[dict[str, Any]], object]) -> Damage:
    return rewritten(lambda body: change(body["blueprint"]))


def cut(name: str, part: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return damage


def flip(name: str, part: float) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * part)] ^= 255
        (folder / name).write_bytes(bytes(data))

    return damage


QUERY = "bert.encoder.layer.0.attention.self.query"
FFN = "bert.encoder.layer.0.intermediate.dense"
HOSTILE: dict[str, Damage] = {
    **{
        f"{name} cut at {p}": cut(name, p)
        for name in (TENSORS, DESCRIPTION)
        for p in (0, 0.3, 0.99)
    },
    **{f"{n} flipped at {p}": flip(n, p) for n in (TENSORS, DESCRIPTION) for p in (0, 0.4, 0.99)},
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "no description": lambda folder: (folder / DESCRIPTION).unlink(),
    "a list": lambda folder: (folder / DESCRIPTION).write_text("[]"),
    "another format": rewritten(lambda b: b.update(format="other")),
    "another version": rewritten(lambda b: b.update(version=3)),
    "another file": rewritten(lambda b: b["files"].update({"../x": {}})),
    "no file": rewritten(lambda b: b["files"].clear()),
    "no blueprint": rewritten(lambda b: b.pop("blueprint")),
    "no report": rewritten(lambda b: b.pop("report")),
    "a class of os": plan(lambda b: b.update(kind="os.system")),
    "a class that is no model": plan(lambda b: b.update(kind="Trainer")),
    "another model": plan(lambda b: b.update(kind="BertModel")),
    "a further field": plan(lambda b: b.update(code="x")),
    "many layers": plan(lambda b: b["config"].update(num_hidden_layers=10**9)),
    "more layers": plan(lambda b: b["config"].update(num_hidden_layers=3)),
    "another type of size": plan(lambda b: b["config"].update(hidden_size="x")),
    "a module less": plan(lambda b: b["modules"].pop(FFN)),
    "a module more": plan(lambda b: b["modules"].update(more="Linear")),
    "another module": plan(lambda b: b["modules"].update({FFN: "Embedding"})),
    "an attribute more": plan(lambda b: b["sizes"][FFN].update(forward=1)),
    "another size": plan(lambda b: b["sizes"][FFN].update(out_features=7)),
    "a tensor less": plan(lambda b: b["tensors"].pop(f"{FFN}.bias")),
    "a tensor more": plan(lambda b: b["tensors"].update({"x.y": b["tensors"][f"{FFN}.bias"]})),
    "another shape": plan(lambda b: b["tensors"][f"{FFN}.bias"].update(shape=[3])),
    "another dtype": plan(lambda b: b["tensors"][f"{FFN}.bias"].update(dtype="int8")),
    "tied to nothing": plan(lambda b: b["tied"].update({f"{FFN}.bias": "nothing"})),
    "another layout": plan(lambda b: b["layouts"].update({FFN: "other"})),
    "a shape of a packed tensor": rewritten(
        lambda b: next(iter(b["packed"].values())).update(shape=[1, 1])
    ),
    "a column out of range": first_version(lambda t: t[f"{FFN}.col_indices"].fill_(10**6)),
    "a negative column": first_version(lambda t: t[f"{FFN}.col_indices"].fill_(-1)),
    "falling row pointers": first_version(
        lambda t: t[f"{FFN}.crow_indices"].copy_(t[f"{FFN}.crow_indices"].flip(0))
    ),
    "row pointers too far": first_version(lambda t: t[f"{FFN}.crow_indices"][-1:].fill_(10**6)),
    "gaps of nothing": restored(lambda t: t[f"{FFN}.gaps"].zero_()),
    "gaps that never end": restored(lambda t: t[f"{FFN}.gaps"].fill_(255)),
    "gaps too far": restored(lambda t: t[f"{FFN}.gaps"].fill_(254)),
    "gaps too few": restored(lambda t: t.update({f"{FFN}.gaps": t[f"{FFN}.gaps"][:-1].clone()})),
    "gaps of another type": restored(lambda t: t.update({f"{FFN}.gaps": t[f"{FFN}.gaps"].int()})),
    "other columns": rewritten(lambda b: b["indices"][FFN].update(columns=10**6)),
    "no columns": rewritten(lambda b: b["indices"][FFN].update(columns=0)),
    "other rows": rewritten(lambda b: b["indices"][FFN].update(rows=1)),
    "negative rows": rewritten(lambda b: b["indices"][FFN].update(rows=-1)),
    "columns less": rewritten(lambda b: b["indices"][FFN].pop("columns")),
    "indices of no layer": rewritten(lambda b: b["indices"].update(x=b["indices"][FFN])),
    "a tensor lost": restored(lambda t: t.pop(f"{FFN}.bias")),
    "a tensor turned": restored(lambda t: t.update({f"{FFN}.bias": t[f"{FFN}.bias"][:-1].clone()})),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small, _ = converted("bert", "csr")
    return mvpfx.save(small, tmp_path_factory.mktemp("store") / "m")


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_damaged_folder_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    mvpfx.load(folder)
    HOSTILE[name](folder)
    with pytest.raises(ValueError, match="cannot be loaded: ") as error:
        mvpfx.load(folder)
    assert str(error.value).endswith("Save the model again with mvpfx.save.")


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 40


class Sliced(nn.Module):
    """Multiplies by a half of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight[:32].T)


def test_a_parameter_that_alone_became_smaller(tmp_path: Path) -> None:
    """No number of a module and no other tensor tells its size; the report does."""
    x = torch.randn(2, 32)
    small = mvpfx.convert(Sliced(), example_inputs=x, lowering="dense")
    assert small.get_parameter("weight").shape == (32, 32)
    mvpfx.save(small, tmp_path / "m")
    assert torch.equal(mvpfx.load(tmp_path / "m", Sliced())(x), small(x))
    path = tmp_path / "m" / DESCRIPTION
    body = json.loads(path.read_text())
    body["report"]["rows"] = []
    body["digest"] = digest_of({k: v for k, v in body.items() if k != "digest"})
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"weight is \[32, 32\], and a Sliced with"):
        mvpfx.load(tmp_path / "m", Sliced())
