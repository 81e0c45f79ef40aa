"""Where each method is put when nothing is said: the tables of Hugging Face PEFT, for the families counted here."""

from __future__ import annotations

import pytest

from minipeft.peft.huggingface import config_class
from minipeft.peft.ia3 import FEEDFORWARD, SCALED

constants = pytest.importorskip("peft.utils.constants", reason="needs the extra 'oracles'")

TABLES = {
    "LORA": "LORA", "VERA": "VERA", "ADALORA": "ADALORA", "IA3": "IA3", "LN_TUNING": "LNTUNING",
    "LOHA": "LOHA", "LOKR": "LOKR", "OFT": "OFT",
}  # fmt: skip


@pytest.mark.parametrize("peft_type", TABLES)
def test_the_usual_targets_are_pefts(peft_type):
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{TABLES[peft_type]}_TARGET_MODULES_MAPPING")
    ours = config_class(peft_type).usual_targets
    shared = {family for family in ours if theirs.get(family)}
    assert {"gpt2", "llama", "t5", "bloom"} <= shared
    assert {family: ours[family] for family in shared} == {family: layers(theirs, family) for family in shared}


def layers(table, family):
    """Without the names of Mixtral's experts, which transformers 5 holds in one array: no layers, so no targets."""
    return [name for name in table[family] if (family, name) != ("mixtral", "w2")]


def test_the_feedforward_layers_of_ia3_are_pefts():
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    ours = {family: [name for name in names if name in FEEDFORWARD] for family, names in SCALED.items()}
    assert ours == {family: layers(theirs, family) for family in ours}
