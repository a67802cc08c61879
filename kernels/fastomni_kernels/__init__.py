"""fastomni_kernels: attention, log-probabilities, loss and sampling for group rollouts.

Everything works on packed rows, `[prompt | c1 | ... | cG]` per group, described by a `GroupLayout`.
Importing it imports torch and nothing else; triton comes in when the first kernel runs. The
definitions are in `reference`, the choice between implementations is in `dispatch`.
"""

from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.ops import (
    GroupAdvantages,
    LinearLoss,
    LossOptions,
    Sample,
    flash_varlen,
    gather_logprobs,
    group_advantages,
    grpo_loss,
    kl_penalty,
    linear_grpo_loss,
    linear_logprobs,
    prefix_attention,
    prefix_decode,
    sample,
)

__all__ = [
    "GroupAdvantages",
    "GroupLayout",
    "LinearLoss",
    "LossOptions",
    "Sample",
    "flash_varlen",
    "gather_logprobs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "linear_grpo_loss",
    "linear_logprobs",
    "prefix_attention",
    "prefix_decode",
    "sample",
]
