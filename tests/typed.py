"""What mypy must see of the package (test_typing.py): no line of it is run. What it refuses is marked with the error."""

from typing import assert_type

import numpy as np

import minipeft as mp
from minipeft.nn.transformer import Transformer
from minipeft.peft.lora import LoraConfig
from minipeft.text.tokenizer import Tokenizer
from minipeft.train.trainer import TrainingResult

model, tokenizer = mp.load_base()
assert_type(model, Transformer)
assert_type(model.copy(), Transformer)
assert_type(tokenizer, Tokenizer)

config = mp.LoraConfig(r=8, target_modules="all-linear")
assert_type(config, LoraConfig)
mp.LoraConfig(rr=8)  # error: Unexpected keyword argument "rr"
mp.LoraConfig(r="8")  # error: incompatible type "str"
mp.TrainingArguments(lr=1)  # error: Unexpected keyword argument "lr"
mp.rlhf.PPOConfig(step=1)  # error: Unexpected keyword argument "step"
mp.TransformerConfig(vocab=1)  # error: Unexpected keyword argument "vocab"
mp.AdaLoraConfig(total_step=10)
mp.PromptTuningConfig(num_virtual_tokens=4)

adapted = mp.get_peft_model(model, config)
assert_type(adapted, mp.PeftModel[Transformer])
assert_type(adapted.merge_and_unload(), Transformer)
assert_type(adapted.base_model.generate([[1]]), np.ndarray)
whatever: mp.PeftModel = adapted
assert_type(mp.Trainer(adapted, [], args=mp.TrainingArguments(learning_rate=1e-3)).train(), TrainingResult)
mp.optim.AdamW(adapted.parameters(), lr=1e-3, beta=0.9)  # error: Unexpected keyword argument "beta"

x = mp.Tensor(np.ones((2, 3)))
assert_type((x @ x.transpose() + 1 - x[0] * 2).sum(axis=0, keepdims=True), mp.Tensor)
assert_type(mp.functional.softmax(x, axis=-1), mp.Tensor)
mp.functional.softmax(x, dim=-1)  # error: Unexpected keyword argument "dim"
mp.functional.sofmax(x)  # error: Module has no attribute "sofmax"
mp.Lora()  # error: Module has no attribute "Lora"
