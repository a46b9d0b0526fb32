"""Folders of transformers 4 and nn_pruning: heads and hidden units that are really absent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mvpfx
from mvpfx.hf import load_pruned
from tests.graphs import outputs
from tests.pruned_folders import WIDTH, families, write_folder

HEADS = {0: [1, 3], 1: [0]}
UNITS = {0: list(range(5, 29)), 1: [47]}
BATCH = {"input_ids": torch.arange(4, 20).view(2, 8), "attention_mask": torch.ones(2, 8).long()}
LAYER = "bert.encoder.layer.0."


@pytest.mark.parametrize(
    ("name", "file"),
    [("BERT", "model.safetensors"), *((name, "pytorch_model.bin") for name in families())],
)
def test_a_pruned_folder_computes_what_it_computed(name: str, file: str, tmp_path: Path) -> None:
    family = families()[name]
    reference = write_folder(tmp_path, family, HEADS, UNITS, file)
    model: Any = load_pruned(tmp_path)
    wanted = outputs(reference, BATCH)
    assert (outputs(model, BATCH) - wanted).abs().max() <= 1e-5
    assert type(model).__name__ == family.kind and not model.training
    assert not hasattr(model.config, "pruned_heads")
    small = mvpfx.convert(model, example_inputs=BATCH, lowering="dense")
    assert (outputs(small, BATCH) - wanted).abs().max() <= 1e-5
    for layer, heads in HEADS.items():
        inner = 8 * (4 - len(heads))
        assert inner in small.get_parameter(family.output.format(layer) + ".weight").shape
        assert (
            48 - len(UNITS[layer])
            in small.get_parameter(family.narrow.format(layer) + ".weight").shape
        )


def test_absent_heads_come_back_as_zeros(tmp_path: Path) -> None:
    reference = write_folder(tmp_path, families()["BERT"], HEADS, {})
    model = load_pruned(tmp_path)
    for name in ("query", "key", "value"):
        found, whole = (
            m.get_submodule(f"{LAYER}attention.self.{name}") for m in (model, reference)
        )
        for leaf in ("weight", "bias"):
            rows: Tensor = found.get_parameter(leaf).view(4, 8, -1)
            assert not rows[[1, 3]].any()
            assert torch.equal(rows[[0, 2]], whole.get_parameter(leaf).view(4, 8, -1)[[0, 2]])
    columns = model.get_parameter(f"{LAYER}attention.output.dense.weight").view(WIDTH, 4, 8)
    assert not columns[:, [1, 3]].any() and columns[:, [0, 2]].all()


def test_all_heads_of_a_layer_may_be_absent(tmp_path: Path) -> None:
    reference = write_folder(tmp_path, families()["BERT"], {1: [0, 1, 2, 3]}, {})
    small = mvpfx.convert(load_pruned(tmp_path), example_inputs=BATCH)
    assert (outputs(small, BATCH) - outputs(reference, BATCH)).abs().max() <= 1e-5


def test_old_names_buffers_and_half_precision(tmp_path: Path) -> None:
    reference = write_folder(tmp_path, families()["BERT"], HEADS, {})
    tensors = torch.load(tmp_path / "pytorch_model.bin")
    tensors = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value.half()
        for name, value in tensors.items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load_pruned(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    difference = outputs(model.float(), BATCH) - outputs(reference, BATCH)
    assert difference.abs().max() <= 1e-2


def test_a_folder_without_a_list_of_heads(tmp_path: Path) -> None:
    reference = write_folder(tmp_path, families()["BERT"], {}, UNITS)
    body = json.loads((tmp_path / "config.json").read_text())
    del body["pruned_heads"]
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert (outputs(load_pruned(tmp_path), BATCH) - outputs(reference, BATCH)).abs().max() <= 1e-5


Damage = Callable[[Path], object]


def config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def tensors(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = torch.load(folder / "pytorch_model.bin")
        change(held)
        torch.save(held, folder / "pytorch_model.bin")

    return damage


class Hostile:
    """Unpickled, it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code was run')",)


LISTED = 'Needed: layers with lists of heads, counted from 0, such as {"0": [1, 3]}.'
ABSENT = (
    "Absent may be heads that pruned_heads lists, and hidden units of a feed-forward layer, from "
    "all of its weights alike."
)
WIDE, NARROW = f"{LAYER}intermediate.dense.weight", f"{LAYER}output.dense.weight"
QUERY = f"{LAYER}attention.self.query"
PASS = "Pass the class whose tensors these are: kind=..."
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        "it has no config.json. Needed: a folder that save_pretrained wrote.",
    ),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json holds no JSON object. Needed: what save_pretrained wrote.",
    ),
    "no class": (
        config(architectures=[]),
        "config.json names no class in architectures. Pass it: kind=...",
    ),
    "other norms": (
        config(layer_norm_type="no_norm"),
        "it was trained with layer_norm_type 'no_norm', and the class in transformers has "
        "nn.LayerNorm there. Needed: a model that was pruned with its norms as they were.",
    ),
    "heads that are no dictionary": (
        config(pruned_heads=[1]),
        f"pruned_heads in config.json is [1]. {LISTED}",
    ),
    "a head that is no number": (
        config(pruned_heads={"0": ["1"]}),
        f"pruned_heads in config.json is {{'0': ['1']}}. {LISTED}",
    ),
    "a negative head": (
        config(pruned_heads={"1": [0], "0": [-1]}),
        f"pruned_heads in config.json is {{'1': [0], '0': [-1]}}. {LISTED}",
    ),
    "a layer that is no number": (
        config(pruned_heads={"first": [1]}),
        f"pruned_heads in config.json is {{'first': [1]}}. {LISTED}",
    ),
    "a layer out of range": (
        config(pruned_heads={"2": [1]}),
        "pruned_heads names layer 2, and the model has 2 attentions, counted from 0.",
    ),
    "a head out of range": (
        config(pruned_heads={"0": [1, 4]}),
        "pruned_heads names head 4 of layer 0, and bert.encoder.layer.0.attention has 4 heads, "
        "counted from 0.",
    ),
    "too few heads listed": (
        config(pruned_heads={"0": [1]}),
        f"{QUERY}.weight is 16 x 32, and 24 x 32 was needed: pruned_heads leaves 3 of 4 heads.",
    ),
    "heads that are there": (
        config(pruned_heads={"0": [1, 3], "1": [0, 1]}),
        "bert.encoder.layer.1.attention.self.query.weight is 24 x 32, and 16 x 32 was needed: "
        "pruned_heads leaves 2 of 4 heads.",
    ),
    "heads not listed": (
        config(pruned_heads={}),
        f"{QUERY}.weight is 16 x 32, and 32 x 32 by the configuration. {ABSENT}",
    ),
    "a bias that is whole": (
        tensors(lambda held: held.update({f"{QUERY}.bias": torch.zeros(32)})),
        f"{QUERY}.bias is 32, and 16 was needed: pruned_heads leaves 2 of 4 heads.",
    ),
    "a pooler that is smaller": (
        tensors(lambda held: held.update({"bert.pooler.dense.weight": torch.zeros(31, 32)})),
        f"bert.pooler.dense.weight is 31 x 32, and 32 x 32 by the configuration. {ABSENT}",
    ),
    "hidden units that are read only": (
        tensors(lambda held: held.update({WIDE: torch.zeros(48, 32)})),
        f"the weights of bert.encoder.layer.0 lack hidden units, but not alike: {NARROW} 32 x 24 "
        "of 32 x 48. Needed: the weight that makes them and the one that reads them, without the "
        "same number.",
    ),
    "hidden units of two numbers": (
        tensors(lambda held: held.update({WIDE: torch.zeros(23, 32)})),
        f"the weights of bert.encoder.layer.0 lack hidden units, but not alike: {WIDE} 23 x 32 of "
        f"48 x 32, {NARROW} 32 x 24 of 32 x 48. Needed: the weight that makes them and the one "
        "that reads them, without the same number.",
    ),
    "a hidden unit too many": (
        tensors(lambda held: held.update({WIDE: torch.zeros(49, 32)})),
        f"the weights of bert.encoder.layer.0 lack hidden units, but not alike: {NARROW} 32 x 24 "
        "of 32 x 48. Needed: the weight that makes them and the one that reads them, without the "
        "same number.",
    ),
    "a missing tensor": (
        tensors(lambda held: held.pop("classifier.bias")),
        "tensors of BertForSequenceClassification are missing: 1, classifier.bias. " + PASS,
    ),
    "tensors left over": (
        tensors(lambda held: held.update({f"qa.{i}": torch.zeros(1) for i in range(4)})),
        "tensors of BertForSequenceClassification belong to no parameter of it: 4, qa.0, qa.1, "
        "qa.2, .... " + PASS,
    ),
    "no tensors": (
        lambda folder: (folder / "pytorch_model.bin").unlink(),
        "it has neither model.safetensors nor pytorch_model.bin, in one file each.",
    ),
    "a list of tensors": (
        lambda folder: torch.save([torch.zeros(1)], folder / "pytorch_model.bin"),
        "pytorch_model.bin holds no state dict. Needed: tensors by their names.",
    ),
}


DAMAGED: dict[str, tuple[Damage, str]] = {
    "code": (
        lambda folder: torch.save(Hostile(), folder / "pytorch_model.bin"),
        "pytorch_model.bin is damaged or holds more than tensors: Weights only load failed.",
    ),
    "a file cut short": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(
            (folder / "pytorch_model.bin").read_bytes()[:5000]
        ),
        "pytorch_model.bin is damaged or holds more than tensors: ",
    ),
    "an empty file": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
        "pytorch_model.bin is damaged or holds more than tensors: it is empty",
    ),
    "safetensors that are none": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"no"),
        "model.safetensors is no safetensors file: Error while deserializing header",
    ),
    "a class that is no model": (
        config(architectures=["os.system"]),
        "transformers 5.",
    ),
    "sizes that are no numbers": (
        config(hidden_size="wide"),
        "BertForSequenceClassification does not take its configuration: ",
    ),
}


@pytest.mark.parametrize("name", [*DAMAGES, *DAMAGED])
def test_what_does_not_fit_or_is_damaged_is_an_error(name: str, tmp_path: Path) -> None:
    """What DAMAGED lists ends in a message of torch, safetensors or transformers."""
    damage, reason = (DAMAGES | DAMAGED)[name]
    write_folder(tmp_path, families()["BERT"], HEADS, UNITS)
    damage(tmp_path)
    end = "$" if name in DAMAGES else ""
    message = f"{tmp_path} cannot be loaded: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}{end}"):
        load_pruned(tmp_path)
