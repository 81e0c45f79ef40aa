"""Drawings of what the lessons explain: each a figure of a phone's width, whose numbers come from configurations.

    prediction       from a text to a loss: token ids, logits, softmax, cross-entropy
    block            one transformer block, from token ids to logits, with shapes; a method drawn in
    low_rank         W, B and A as a square and two strips
    dora             a row of W and LoRA's update of it, in LoRA and in DoRA
    number_formats   the bits of float32, bfloat16 and float16
    scalar_graph     a loss of three numbers: values on the way down, gradients on the way up
    attention_mask   who attends to whom
    ties             two updates of four numbers, added, and merged by TIES
    rlhf_stages      the three stages of RLHF, and which of the four models each has in memory
    ranking          k answers, each scored once, in all their pairs
    ppo_update       one update of PPO, from prompts to losses
    watched          a judge who is optimized, and a gold that only watches
    two_ways         from comparisons to a policy: PPO, and DPO
"""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:  # the public names; each is imported when it is first used
    from .attention import attention_mask as attention_mask, masks as masks
    from .blocks import block as block
    from .directions import dora as dora
    from .feedback import ppo_update as ppo_update, ranking as ranking, two_ways as two_ways, watched as watched
    from .formats import number_formats as number_formats
    from .losses import prediction as prediction
    from .merging import ties as ties
    from .strips import low_rank as low_rank
    from .stages import rlhf_stages as rlhf_stages
    from .graphs import scalar_graph as scalar_graph
else:
    __getattr__, __dir__, __all__ = lazy(__name__)
