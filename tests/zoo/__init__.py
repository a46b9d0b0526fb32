"""The zoo: every kind of model that capturing has to cover, tiny and with random weights."""

from __future__ import annotations

from tests.zoo import decoder, multimodal, text, torch_functions, torch_layers, vision
from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {
    entry.name: entry
    for module in (text, decoder, vision, multimodal, torch_layers, torch_functions)
    for entry in module.ENTRIES
}
