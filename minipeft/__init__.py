"""minipeft: fine-tuning large language models from scratch, in NumPy/CuPy, to read, run and trust.

Every public name is imported when it is first used, so `import minipeft as mp` costs little more than NumPy.

Words that mean one thing everywhere:

    base model          the pretrained language model that a method is put on
    base layer          the frozen layer that an adapter layer wraps (`base_layer`)
    adapter             what one configuration adds to a model, under a name
    adapter layer       an adapter's part at one base layer
    targets             the layers that a method is put on (`target_modules`)
    start               the values that an adapter begins with
    rank                of LoRA: how many numbers its two strips share, so the rank of the change at most
    alpha               of LoRA: the change is multiplied by alpha / rank (rsLoRA: by alpha over the root of the rank)
    bottleneck          an adapter of two layers, from a width to a few numbers and back, after or beside a sublayer
    league              all methods tuned by one protocol, and reported on test items under seeds that chose nothing
    merge               add an adapter's change to the weights of the base layers, which then compute the same alone
    task vector         what fine-tuning has changed, tuned weights minus the base's
    interference        what a task loses by another one's update in the same weights
    density             the share of an update that trimming or dropping keeps
    storage dtype       what a frozen weight is kept in; its compute dtype is what a product is made in
    virtual tokens      trained vectors before a text (prefix tuning: keys and values), which take positions
    prompt              the text that a model continues; in prompt tuning, the virtual tokens before it
    stop tokens         the tokens that end a generated text (`stop_token_ids`)
    rollout             prompts and the responses that the policy has sampled to them
    policy              the model that learns from its own responses
    reference policy    the policy as it was at the start of the run, from which KL is measured
    score               one number for a whole response, from a reward model or function
    reward              what is maximized: the score less the price of KL, token by token
    advantage           by how much a response, or a token of it, did better than expected
    baseline            what was expected of a response; subtracted from its reward, it changes no mean gradient
    ratio               the probability of a token now, over that when it was drawn
    KL                  by how much more probable a policy finds its own responses than the reference does, in nats
    judge, proxy        a reward model that is optimized, and its score
    gold                what is meant: the reward that a judge was to learn, which is only watched
    margin              by how much more a policy has raised a chosen response than the rejected one, times beta
    master weights      the trained weights in float32, of which rounded ones are made where they are used
    overflow, flush     a number that rounding makes infinite; one that it makes zero
    ledger              the memory of a step in bytes, line by line (`MemoryLedger`)
    block               consecutive numbers that are quantized together
    scale, absmax       the largest absolute value of a block, by which its numbers are divided
    code book           the values that the codes of quantized numbers stand for
"""

from typing import TYPE_CHECKING

from .lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from . import (
        backend as backend, files as files, directory as directory, autograd as autograd, nn as nn, quant as quant, peft as peft,
        train as train, text as text, hub as hub, evaluation as evaluation, rlhf as rlhf,
        accounting as accounting, diagrams as diagrams, experiments as experiments, claims as claims,
    )  # fmt: skip
    from .autograd import ops as functional
    from .train import optim as optim
    from .autograd.tensor import Tensor as Tensor, no_grad as no_grad, AutogradError as AutogradError
    from .autograd.autocast import autocast as autocast
    from .autograd.gradcheck import gradcheck as gradcheck, GradcheckError as GradcheckError
    from .nn.transformer import Transformer as Transformer, TransformerConfig as TransformerConfig, KVCache as KVCache
    from .nn.heads import SequenceClassifier as SequenceClassifier, ValueModel as ValueModel, head_only as head_only
    from .nn.precision_report import PrecisionReport as PrecisionReport
    from .nn.why import why_unmoved as why_unmoved
    from .train.grad_scaler import GradScaler as GradScaler
    from .train.trainer import Trainer as Trainer, TrainingArguments as TrainingArguments
    from .hub.pretrained import from_pretrained as from_pretrained, save_pretrained as save_pretrained
    from .hub.base import load_base as load_base
    from .evaluation.answers import ask as ask
    from .experiments.sweep import grid as grid, sweep as sweep
    from .peft import (
        get_peft_model as get_peft_model, PeftModel as PeftModel, assert_learning as assert_learning,
        LoraConfig as LoraConfig, AdaLoraConfig as AdaLoraConfig, VeraConfig as VeraConfig, IA3Config as IA3Config,
        LoHaConfig as LoHaConfig, LoKrConfig as LoKrConfig, OFTConfig as OFTConfig, LNTuningConfig as LNTuningConfig,
        BitFitConfig as BitFitConfig, BottleneckConfig as BottleneckConfig,
        PromptTuningConfig as PromptTuningConfig, PrefixTuningConfig as PrefixTuningConfig,
        PromptEncoderConfig as PromptEncoderConfig, TrainableTokensConfig as TrainableTokensConfig,
    )  # fmt: skip

    __all__ = ["functional"]  # to type checkers, a name that is not the module's own is private unless listed
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
