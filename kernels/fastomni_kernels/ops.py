"""The public functions, each from its own file.

In every one arguments are checked first, then the device chooses the implementation. Checks read
shapes, dtypes, devices and host numbers only.
"""

from fastomni_kernels.advantages import GroupAdvantages, group_advantages
from fastomni_kernels.flash_varlen import flash_varlen
from fastomni_kernels.linear_policy_loss import LinearLoss, linear_grpo_loss
from fastomni_kernels.logprobs import gather_logprobs, linear_logprobs
from fastomni_kernels.options import LossOptions
from fastomni_kernels.policy_loss import grpo_loss, kl_penalty
from fastomni_kernels.prefix_attention import prefix_attention
from fastomni_kernels.prefix_decode import prefix_decode
from fastomni_kernels.sampling import Sample, sample

__all__ = [
    "GroupAdvantages",
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
