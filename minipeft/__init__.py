"""minipeft: fine-tuning large language models from scratch, in NumPy/CuPy, to read, run and trust.

Every public name is imported when it is first used, so `import minipeft as mp` costs little more than NumPy.

Words that mean one thing everywhere:

    base model          the pretrained language model that a method is put on
    base layer          the frozen layer that an adapter layer wraps (`base_layer`)
    adapter             what one configuration adds to a model, under a name
    adapter layer       an adapter's part at one base layer
    targets             the layers that a method is put on (`target_modules`)
    start               the values that an adapter begins with
    merge               add an adapter's change to the weights of the base layers, which then compute the same alone
    virtual tokens      trained vectors before a text (prefix tuning: keys and values), which take positions
    prompt              the text that a model continues; in prompt tuning, the virtual tokens before it
    stop tokens         the tokens that end a generated text (`stop_token_ids`)
    rollout             prompts and the responses that the policy has sampled to them
    policy              the model that learns from its own responses
    reference policy    the policy as it was at the start of the run, from which KL is measured
    score               one number for a whole response, from a reward model or function
    reward              what is maximized: the score less the price of KL, token by token
    advantage           by how much a response, or a token of it, did better than expected
    ledger              the memory of a step in bytes, line by line (`MemoryLedger`)
    block               consecutive numbers that are quantized together
    scale, absmax       the largest absolute value of a block, by which its numbers are divided
    code book           the values that the codes of quantized numbers stand for
"""

from .lazy import lazy

__version__ = "0.1.0"

_HOMES = {
    "autograd.tensor": "Tensor no_grad AutogradError",
    "autograd.gradcheck": "gradcheck GradcheckError",
    "nn.transformer": "Transformer TransformerConfig KVCache",
    "nn.heads": "SequenceClassifier ValueModel head_only",
    "train.trainer": "Trainer TrainingArguments",
    "hub.pretrained": "from_pretrained save_pretrained",
    "hub.base": "load_base",
    "evaluation.answers": "ask",
    "peft": "get_peft_model PeftModel assert_learning LoraConfig AdaLoraConfig VeraConfig IA3Config LNTuningConfig "
    "LoHaConfig LoKrConfig OFTConfig BitFitConfig BottleneckConfig PromptTuningConfig PrefixTuningConfig PromptEncoderConfig",
}
_MODULES = {"functional": "autograd.ops", "optim": "train.optim"} | {
    name: name
    for name in ("backend", "files", "nn", "quant", "peft", "train", "text", "hub", "evaluation", "rlhf", "accounting")
}

__getattr__, __dir__, __all__ = lazy(__name__, _HOMES, _MODULES)
__all__ += ["__version__"]
