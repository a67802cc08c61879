"""fastomni_kernels: attention, log-probabilities, loss and sampling for group rollouts.

Everything works on packed rows, `[prompt | c1 | ... | cG]` per group, described by a `GroupLayout`.
Nothing but torch is imported; the definitions are in `reference`, the choice between
implementations is in `ops`.
"""

from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.ops import (
    gather_logprobs,
    group_advantages,
    grpo_loss,
    kl_penalty,
    linear_logprobs,
    prefix_attention,
    prefix_decode,
    sample,
)

__all__ = [
    "GroupLayout",
    "gather_logprobs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "linear_logprobs",
    "prefix_attention",
    "prefix_decode",
    "sample",
]
