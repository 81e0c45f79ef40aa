"""What the objects of a session show of themselves: short, with sizes, and never an address."""

import numpy as np
import pytest
from models import config, dialects, tokens

import minipeft as mp
from minipeft.nn import Conv1D, Linear, ModuleList, Sequential

EXAMPLES = [(np.arange(1, 7), np.arange(1, 7))] * 9


def model(dialect="llama"):
    return mp.Transformer(config(dialect), seed=1)


@dialects
def test_a_model_is_a_short_tree_with_sizes(dialect):
    lines = repr(model(dialect)).splitlines()
    assert lines[0] == "Transformer(" and lines[-1] == ")" and len(lines) < 30
    repeated = f"      (0-1): 2 x {'LlamaBlock' if dialect == 'llama' else 'GPT2Block'}("
    assert repeated in lines
    shown = (
        "(q_proj): Linear(weight [16, 16])" if dialect == "llama" else "(c_attn): Conv1D(weight [16, 48], bias [48])"
    )
    assert sum(shown in line for line in lines) == 1


def test_of_a_list_only_equal_neighbors_are_folded():
    layers = [Linear(2, 2, bias=False), Linear(2, 2, bias=False), Linear(2, 3, bias=False), Linear(2, 2, bias=False)]
    inside = [line.strip() for line in repr(ModuleList(layers)).splitlines()[1:-1]]
    assert inside == ["(0-1): 2 x Linear(weight [2, 2])", "(2): Linear(weight [3, 2])", "(3): Linear(weight [2, 2])"]
    chain = repr(Sequential(Linear(2, 2), mp.functional.relu, Linear(2, 2)))
    assert "(0): Linear" in chain and "relu" in chain and "(2): Linear" in chain


def test_a_layer_says_its_dtype_and_its_numbers():
    half = Conv1D(2, 3)
    half.weight.data = half.weight.data.astype(np.float16)
    assert repr(half) == "Conv1D(weight [2, 3] float16, bias [3])"
    assert repr(mp.nn.Dropout(0.1)) == "Dropout(p=0.1)"
    assert (
        repr(mp.quant.Linear4bit.from_linear(Linear(64, 2)))
        == "Linear4bit(weight [2, 64] in nf4, blocks of 64, bias [2])"
    )


def test_results_and_trainers_fit_a_few_lines():
    adapted = mp.get_peft_model(model(), mp.LoraConfig(r=2))
    trained = adapted.get_nb_trainable_parameters()[0]
    arguments = mp.TrainingArguments(max_steps=40, learning_rate=1e-2, eval_steps=20, progress=False)
    trainer = mp.Trainer(adapted, EXAMPLES, EXAMPLES[:2], arguments)
    assert repr(trainer) == f"Trainer(PeftModel, {trained} trainable parameters, 9 examples, 2 held out, 40 steps of 8)"
    result = trainer.train()
    first, last = result.losses()[0][1], result.losses()[-1][1]
    assert repr(result).startswith("TrainingResult(40 steps in ") and len(repr(result)) < 120
    assert f"loss {first:.3f} -> {last:.3f}, best held-out loss {result.best_eval_loss:.3f}" in repr(result)
    assert repr(trainer.optimizer).startswith("AdamW(") and "parameters" in repr(trainer.optimizer)

    options = mp.rlhf.GroupConfig(
        steps=3, batch_size=4, mini_batch_size=4, num_generations=2, response_length=2, missing_eos_score=None
    )
    online = mp.rlhf.RLOOTrainer(adapted, lambda roll: np.zeros(4), [[1, 2], [3]], options)
    shown = f"RLOOTrainer(PeftModel, {trained} trainable parameters, 2 prompts, 0 of 3 updates of 4 responses)"
    assert repr(online) == shown


@pytest.mark.parametrize(
    "make",
    [
        model,
        lambda: mp.get_peft_model(model(), mp.PromptTuningConfig(num_virtual_tokens=2)),
        lambda: mp.load_base()[1],
        lambda: mp.SequenceClassifier(model()),
        lambda: mp.rlhf.RewardModel(model()),
        lambda: mp.KVCache(),
        lambda: mp.optim.SGD(model().parameters(), lr=0.1),
        lambda: mp.accounting.architecture("gpt2"),
        lambda: mp.accounting.count_parameters(mp.accounting.architecture("gpt2"), mp.LoraConfig()),
        lambda: model()(tokens(np.random.default_rng(0), 1, 2)),
        lambda: mp.LoraConfig(),
        lambda: mp.TrainingArguments(),
    ],
)
def test_nothing_shows_an_address_or_fills_the_screen(make):
    shown = repr(make())
    assert " at 0x" not in shown and len(shown) < 2500
