"""Configurations that ask for more than a file's tensors can fill are refused, soon and small."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers as t
from torch import nn

from mvpfx.bounded_build import bounded
from mvpfx.file_limits import COUNT, FileLimits, Room, check_stored_plainly, plain_config
from mvpfx.skeleton import build_empty
from tests.damaged_folders import GIB, SECONDS, peak, reset_peak

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 64,
}
LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 1}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "BertForSequenceClassification": lambda: t.BertConfig(**SMALL),
    "GPT2LMHeadModel": lambda: t.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2),
    "DistilBertModel": lambda: t.DistilBertConfig(
        vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=16, sinusoidal_pos_embds=True
    ),
    "BartForConditionalGeneration": lambda: t.BartConfig(**BART),
    "SwinForImageClassification": lambda: t.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "Gemma2ForCausalLM": lambda: t.Gemma2Config(**LLAMA, head_dim=8),
    "LlamaForCausalLM": lambda: t.LlamaConfig(**LLAMA),
    "Qwen2MoeForCausalLM": lambda: t.Qwen2MoeConfig(
        **LLAMA, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "T5ForConditionalGeneration": lambda: t.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    ),
    "WhisperForConditionalGeneration": lambda: t.WhisperConfig(
        **BART, num_mel_bins=8, max_source_positions=32, max_target_positions=32, pad_token_id=1
    ),
    "ResNetForImageClassification": lambda: t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]
    ),
    "MambaForCausalLM": lambda: t.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4
    ),
    "XLMModel": lambda: t.XLMConfig(
        vocab_size=64, emb_dim=16, n_layers=1, n_heads=2, sinusoidal_embeddings=True
    ),
    "Wav2Vec2ForCTC": lambda: t.Wav2Vec2Config(
        **SMALL, conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_conv_pos_embeddings=4
    ),
    "CLIPModel": lambda: t.CLIPConfig(),
}
FIRST = {  # of each, what is quick to try
    "BertForSequenceClassification": ("num_hidden_layers", "num_labels", "vocab_size"),
    "GPT2LMHeadModel": ("n_layer", "n_positions"),
    "DistilBertModel": ("n_layers", "max_position_embeddings"),
    "BartForConditionalGeneration": ("encoder_layers", "decoder_layers"),
    "SwinForImageClassification": ("depths", "image_size"),
    "Gemma2ForCausalLM": ("num_hidden_layers",),
}


def limits_of(model: nn.Module) -> FileLimits:
    modules, tensors = len(list(model.modules())), len(model.state_dict())
    return FileLimits(4 * modules + 256, COUNT, 1.0 + 0.01 * (modules + tensors))


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each whole number in a configuration."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, inner in items:
        if type(inner) is int:
            found.append((*path, key))
        elif isinstance(inner, (dict, list)):
            found += numbers(inner, (*path, key))
    return found


def with_number(config: Any, path: tuple[Any, ...], number: int) -> dict[str, Any]:
    changed: Any = config.to_dict()
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = number
    return changed


def try_number(name: str, path: tuple[Any, ...], number: int, limits: FileLimits) -> None:
    kind = getattr(t, name)
    changed = with_number(FAMILIES[name](), path, number)
    before, start = reset_peak(), time.process_time()
    with contextlib.suppress(ValueError):
        build_empty(kind, changed, limits)
    spent, grown = time.process_time() - start, peak() - before
    assert spent < SECONDS, f"{path} = {number}: {spent:.1f} s"
    assert grown < GIB, f"{path} = {number}: {grown >> 20} MiB"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(FIRST))
def test_a_great_number(name: str) -> None:
    config = FAMILIES[name]()
    with torch.device("meta"):
        limits = limits_of(getattr(t, name)(config))
    for field in FIRST[name]:
        path = (field, 0) if isinstance(getattr(config, field), list) else (field,)
        for number in (10**9, 10**30, -(10**9)):
            try_number(name, path, number, limits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(FAMILIES))
def test_each_number_of_a_configuration(name: str) -> None:
    config = FAMILIES[name]()
    with torch.device("meta"):
        limits = limits_of(getattr(t, name)(config))
    for path in numbers(config.to_dict()):
        for number in (10**9, COUNT, 10**5):
            try_number(name, path, number, limits)


def test_great_numbers_that_count_nothing_stay() -> None:
    config = {**t.LlamaConfig(**LLAMA).to_dict(), "rope_parameters": None}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10**8}
    config["seed_of_mine"] = 10**12
    model = build_empty(t.LlamaForCausalLM, config, FileLimits(999, COUNT, 9.0))
    assert type(model.config.seed_of_mine) is int and model.config.seed_of_mine == 10**12
    assert model.config.rope_parameters["rope_theta"] == 10**8


def spin() -> None:
    while True:
        pass


def swallow() -> None:
    while True:
        try:
            spin()
        except BaseException:  # noqa: BLE001  as a careless class would
            return


def pile_up() -> None:
    held: list[str] = []
    while True:
        held.append(str(len(held)) * 9)


def nest() -> None:
    outer = nn.ModuleList()
    while True:
        outer.append(nn.Module())


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (spin, "building it took more than 0.1 seconds"),
        (swallow, "building it took more than 0.1 seconds"),
        (nest, "it has more than 50 modules"),
    ],
)
def test_what_never_ends_is_interrupted(work: Callable[[], None], reason: str) -> None:
    threads = threading.active_count()
    with (
        pytest.raises(ValueError, match=re.escape(f"{reason}, more than its tensors can fill")),
        bounded(FileLimits(50, COUNT, 0.1)),
    ):
        work()
    assert threading.active_count() == threads
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:  # nothing comes after it
        pass


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is not told here")
def test_what_grows_is_interrupted() -> None:
    with pytest.raises(ValueError, match="building it took more than 64 MiB"):  # noqa: SIM117
        with bounded(FileLimits(50, COUNT, 60.0, grows=64 << 20)):
            pile_up()


def test_other_errors_and_threads_are_left_alone() -> None:
    def other() -> None:
        for _ in range(200):
            nn.Sequential(nn.Linear(1, 1))

    thread = threading.Thread(target=other)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError, match="mine"), bounded(FileLimits(2, COUNT, 9.0)):
        raise KeyError("mine")
    with bounded(FileLimits(2, COUNT, 9.0)):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        thread.start()
        thread.join()
        nn.Sequential(nn.Linear(1, 1))
    assert offline == huggingface_hub.constants.HF_HUB_OFFLINE
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(9)))


def test_no_code_is_named() -> None:
    config = {
        "auto_map": {"AutoModel": "x--y.Z"},
        "text": {"trust_remote_code": True, "a": [2**40]},
    }
    assert plain_config(config, 99) == {"text": {"a": [2.0**40]}}
    for key in ("attn_implementation", "_attn_implementation", "_experts_implementation_internal"):
        assert plain_config({key: "sdpa"}, 9) == {key: "sdpa"}
        for value in ("me/kernel", "me/kernel@v1:f", {"text": "me/kernel"}, 3, ["sdpa"]):
            with pytest.raises(ValueError, match="code is not loaded for a file"):
                plain_config({"text": {key: value}}, 9)


def test_room_is_taken_once() -> None:
    room = Room(10)
    room.take("x", -5)
    room.take("x", 6)
    with pytest.raises(ValueError, match="y would take 5 bytes that the file has nothing for, and"):
        room.take("y", 5)


def test_what_was_compressed_is_not_read(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(9)}, tmp_path / "plain.pt")
    check_stored_plainly(tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match=r"bomb\.pt has \d+ bytes, and would take 1048576"):
        check_stored_plainly(tmp_path / "bomb.pt")
