"""The audit's counts against Hugging Face PEFT's own, on transformers' models (PyTorch's meta device)."""

from __future__ import annotations

import json

import pytest
from accounting_cases import on_meta

from minipeft.accounting.architectures import _published, names
from minipeft.accounting.published import _value, read_published

pytest.importorskip("torch", reason="needs PyTorch: install the extra 'oracles'")
pytest.importorskip("transformers", reason="needs transformers: install the extra 'oracles'")
peft = pytest.importorskip("peft", reason="needs PEFT: install the extra 'oracles'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT about each other

TASKS = {"t5": "SEQ_2_SEQ_LM", "mt5": "SEQ_2_SEQ_LM"}
TASKS |= dict.fromkeys(("bert", "roberta", "deberta-v2"), "FEATURE_EXTRACTION")


def comparable() -> dict[str, tuple[dict, dict]]:
    """id -> (options, method) of the shipped rows that are one of PEFT's methods on one published model."""
    rows = {}
    for row in read_published():
        options = json.loads(row["options"] or "{}")
        config, model = options.get("config"), options.get("model")
        if isinstance(config, dict) and model in names() and "num_labels" not in options and "only" not in options:
            if config["peft_type"] in peft.PeftType.__members__ and "enable_lora" not in config:
                rows.setdefault(json.dumps([model, config]), (row["id"], options, config))
    return {name: (options, config) for name, options, config in rows.values()}


ROWS = comparable()


@pytest.mark.parametrize("row", ROWS)
def test_a_rows_count_is_that_of_peft(row):
    options, method = ROWS[row]
    published, method = _published()[options["model"]]["config"], dict(method)
    family, base = published["model_type"], on_meta(published)
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method.pop("peft_type")]]
    extra = {"num_transformer_submodules": 1} if "num_virtual_tokens" in method else {}  # T5 in PEFT: one for each side
    config = cls(task_type=TASKS.get(family, "CAUSAL_LM"), **method, **extra)
    model = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert _value({"model": options["model"], "config": options["config"]}, "trainable") == expected


def test_most_methods_are_compared():
    assert {method["peft_type"] for _, method in ROWS.values()} >= {
        "LORA", "IA3", "LN_TUNING", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING",
    }  # fmt: skip
    assert len(ROWS) > 60
