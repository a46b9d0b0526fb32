"""The zoo: every kind of model that capturing has to cover, tiny and with random weights."""

from __future__ import annotations

from tests.zoo import decoder, multimodal, text, torch_functions, torch_layers, vision
from tests.zoo.entry import Entry

GROUPS: dict[str, tuple[Entry, ...]] = {
    "text encoders": text.ENTRIES,
    "text decoders": decoder.DECODERS,
    "mixtures of experts": decoder.MIXTURES,
    "state-space and hybrid": decoder.STATE_SPACES,
    "encoder-decoders": decoder.ENCODER_DECODERS,
    "vision": vision.ENTRIES,
    "speech": multimodal.SPEECH,
    "images with text": multimodal.IMAGES_WITH_TEXT,
    "plain torch: layers": torch_layers.ENTRIES,
    "plain torch: functions": torch_functions.ENTRIES,
}
"""Entries by what they are for."""

ZOO: dict[str, Entry] = {entry.name: entry for group in GROUPS.values() for entry in group}
