"""P-tuning: soft tokens computed by a small network (Liu et al. 2021, arXiv:2103.10385).

    P = W₃ relu(W₂ relu(W₁ e + b₁) + b₂) + b₃        e [p, d], p = num_virtual_tokens, all of it trained       section 3

Tokens that come from one network are tied to each other, and optimization moves them together. When training is over,
only P is needed, and only P is saved: the network cannot be restored from the file.

As PEFT builds it: an MLP of three layers, soft tokens in front of the input. The paper also puts an LSTM before the
MLP; training that is not built here, and files of such adapters load like any other, since they hold only P.
"""

from __future__ import annotations

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..options import configuration, option
from .config import PeftError, Shape
from .prompt_learning import STORED, PromptLearningConfig, network_shapes
from .prompt_tuning import SoftTokens


class PromptEncoder(SoftTokens):
    """The network: e [p, d], W1 [h, d], b1 [h], W2 [h, h], b2 [h], W3 [d, h], b3 [d]."""

    def vectors(self) -> Tensor:
        z = F.relu(F.linear(self.e, self.W1, self.b1))
        z = F.relu(F.linear(z, self.W2, self.b2))
        return F.linear(z, self.W3, self.b3)


@configuration
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning's options, with PEFT's names (and `folded`): P = W₃ relu(W₂ relu(W₁ e + b₁) + b₂) + b₃."""

    encoder_hidden_size: int | None = option(None, "width of the network; None: the model's", least=1)
    encoder_reparameterization_type: str = option("MLP", "LSTM only of a file's adapter", choices=("MLP", "LSTM"))
    folded: bool = option(False, "the vectors are trained themselves, without the network; so is what a file holds")

    peft_type = "P_TUNING"
    usual_learning_rate = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type == "LSTM" and not self.folded:
            raise PeftError("encoder_reparameterization_type='LSTM' is not built for training; 'MLP' is")

    def prompt_shapes(self, width: int) -> dict[str, Shape]:
        p, d = self.num_virtual_tokens, self.token_dim or width
        if self.folded:
            return {STORED: (p, d)}
        h = self.encoder_hidden_size or d
        return network_shapes(p, d, h, h, d)

    @property
    def adapter_class(self) -> type[SoftTokens]:
        """Whether a network computes the vectors, or they are trained themselves."""
        return SoftTokens if self.folded else PromptEncoder
