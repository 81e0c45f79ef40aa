"""Bottleneck adapters: a small network after (or beside) a sublayer, with a narrow middle.

    a(z) = W_up f(W_down z + b_down) + b_up        W_down [m, d], W_up [d, m]: 2 m d + m + d parameters

    houlsby    h + a(h), h = s(x)   after attention and the MLP   Houlsby et al. 2019, arXiv:1902.00751, section 2.1
    pfeiffer   h + a(h), h = s(x)   after the MLP alone           Pfeiffer et al. 2020, arXiv:2005.00247, section 3
    parallel   s(x) + scaling a(x)  beside the MLP                He et al. 2021, arXiv:2110.04366, section 3.3
    ln_before  a(LN(z)) for a(z), a norm of the adapter's own     Bapna & Firat 2019, arXiv:1909.08478; Lin et al. 2020

s is the sublayer, without the residual connection around it. W_up and b_up start at zero, so the adapted model starts
as the base, exactly; Houlsby et al. start from small random numbers. The function between the two matrices is not
linear, so no plain layer equals an adapted one: adapters cannot be merged, and cost time in every forward pass.

Departure: the papers' models normalize after the residual connection, where some variants move or add a layer norm;
these models normalize before, and the sublayer's output is the one place there is.

PEFT has no bottleneck adapters; names are those of the `adapters` library (AdapterHub), and the files are this
package's own (peft_type BOTTLENECK, <path of the sublayer>.down_weight ...).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import Rng
from ..nn.module import Module
from ..options import configuration, option
from .config import PeftConfig, PeftError, Shape, kind_of, shape_of
from .layer import Adapter, Inner
from .targets import out_in_shape
from .weights import fill, kaiming_uniform

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_BERT = (r"attention\.output", r"layer\.\d+\.output")
SUBLAYERS = {  # model_type -> attention, MLP (names, or ends of paths as regular expressions)
    "gpt2": ("attn", "mlp"), "llama": ("self_attn", "mlp"), "bert": _BERT, "roberta": _BERT, "deberta-v2": _BERT,
    "t5": ("SelfAttention", "DenseReluDense"), "mt5": ("SelfAttention", "DenseReluDense"),
    "bloom": ("self_attention", "mlp"),
}  # fmt: skip
PRESETS = {  # placement -> reduction_factor, non_linearity, scaling: AdapterHub's double_seq_bn, seq_bn and par_bn
    "houlsby": (16, "silu", 1.0), "pfeiffer": (16, "relu", 1.0), "parallel": (2, "relu", 4.0)
}  # fmt: skip
# the layers that end a sublayer, whose output is the sublayer's
LAST = ("c_proj", "o_proj", "down_proj", "dense", "o", "wo", "dense_4h_to_h")


class Bottleneck(Adapter):
    """a(z): down_weight [m, d], down_bias [m], up_weight [d, m], up_bias [d]; ln_before_weight, ln_before_bias [d]."""

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        fill(self.down_weight, kaiming_uniform(generator, self.down_weight.shape))
        if self.config.ln_before:
            self.ln_before_weight.data += 1

    def forward(self, x: Tensor, inner: Inner, base: Module, rng: Rng | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        c, h = self.config, inner(x)
        z = x if c.placement == "parallel" else h
        if c.ln_before:
            z = F.layer_norm(z, self.ln_before_weight, self.ln_before_bias)
        z = F.linear(z, self.down_weight, self.down_bias)  # [..., m]
        a = F.linear(NON_LINEARITIES[c.non_linearity](z), self.up_weight, self.up_bias)
        return h + (a if c.scaling == 1 else a * c.scaling)

    def merge(self, layer: Module, base: Module) -> Module:
        raise PeftError("a bottleneck adapter is not linear, so it cannot be merged; unload() gives the base alone")


@configuration
class BottleneckConfig(PeftConfig):
    """The options of bottleneck adapters, a(z) = W_up f(W_down z + b_down) + b_up.

    Where one is None it is AdapterHub's for the placement (`PRESETS`). target_modules None: the placement's sublayers;
    or the names of any modules of one input and one output.
    """

    placement: str = option("pfeiffer", "where the adapters stand", choices=("houlsby", "pfeiffer", "parallel"))
    reduction_factor: float | None = option(None, "the middle has d // reduction_factor numbers", above=0)
    bottleneck_size: int | None = option(None, "numbers in the middle, in place of reduction_factor", least=1)
    non_linearity: str | None = option(None, "function between the matrices", choices=(None, "relu", "gelu", "silu"))
    scaling: float | None = option(None, "factor of the adapter's output (4 in He et al.)")
    ln_before: bool = option(False, "a layer norm of the adapter's own before it (Lin et al. 2020, arXiv:2004.03829)")

    peft_type, adapter_class = "BOTTLENECK", Bottleneck
    kinds = ()  # any module of one input and one output

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in zip(("reduction_factor", "non_linearity", "scaling"), PRESETS[self.placement]):
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def usual_targets(self) -> dict[str, list[str] | str]:
        """{model_type: target_modules}: the sublayers of the placement, by name or by a regular expression."""
        sublayers = {family: ends[self.placement != "houlsby" :] for family, ends in SUBLAYERS.items()}
        return {
            family: rf".*\.({'|'.join(ends)})" if SUBLAYERS[family] is _BERT else list(ends)
            for family, ends in sublayers.items()
        }

    def check_target(self, name: str, module: Module) -> None:
        _widths(name, module)

    def bottleneck_shapes(self, name: str, n_in: int, n_out: int) -> dict[str, Shape]:
        """{name: shape} of the adapter on a sublayer with this many inputs and outputs.

        Raises PeftError for a reduction_factor that leaves no number in the middle.
        """
        n_in = n_in if self.placement == "parallel" else n_out
        m = self.bottleneck_size or int(n_in // self.reduction_factor)
        if m < 1:
            raise PeftError(f"{name}: reduction_factor={self.reduction_factor} leaves nothing of a width of {n_in}")
        norm = {"ln_before_weight": (n_in,), "ln_before_bias": (n_in,)} if self.ln_before else {}
        return {**norm, "down_weight": (m, n_in), "down_bias": (m,), "up_weight": (n_out, m), "up_bias": (n_out,)}

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        """As in PeftConfig. A sublayer's adapter is counted at the layer that ends it."""
        if kind not in ("linear", "conv1d"):
            return {}
        n_out, n_in = out_in_shape(kind, shape)
        parent, _, last = name.rpartition(".")
        own = self.bottleneck_shapes(name, n_in, n_out) if self.targets(name, kind) else {}
        if last not in LAST or not self.targets(parent, ""):
            return own
        around = self.bottleneck_shapes(parent, n_out, n_out)  # a residual connection: as wide before as after
        return own | {f"sublayer.{key}": shape for key, shape in around.items()} if own else around

    def layer_shapes(self, name: str, layer: Module) -> dict[str, Shape]:
        return self.bottleneck_shapes(name, *_widths(name, layer))


def _widths(name: str, module: Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer; of a sublayer, inputs of its first linear layer and outputs of its last."""
    layers = [m for _, m in module.named_modules() if kind_of(m) in ("linear", "conv1d")]
    if not layers:
        raise PeftError(f"target_modules: {name!r}, a {type(module).__name__}, holds no linear layer, so has no width")
    ends = [out_in_shape(kind_of(m), shape_of(m)) for m in (layers[0], layers[-1])]
    return ends[0][1], ends[1][0]
