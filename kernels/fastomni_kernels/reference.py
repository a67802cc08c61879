"""The definitions in plain torch: every kernel is judged against this file.

All functions run on any device and any float dtype and compute in fp32 or wider. The one decision
that is not obvious: log-probabilities are in `logprobs.py`, because they carry a backward of their
own (`linear_logprobs` must forget its logits and make them again); they are defined there alone and
are offered here too.

Shapes: N prompts, G completions per prompt, S sequences, T packed rows, M completion tokens, P_i
prompt tokens, H hidden, V vocabulary, Hq query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastomni_kernels.layout import GroupLayout
from fastomni_kernels.logprobs import DEFAULT_CHUNK_BYTES, gather_logprobs, linear_logprobs, widened

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "gather_logprobs",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "linear_logprobs",
    "prefix_attention",
    "prefix_decode",
]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None = None
) -> Tensor:
    """Attend within each group: prompts causally, completions to their prompt and themselves.

    Args:
        q: [T, Hq, D] queries of the packed rows.
        k: [T, Hkv, D] keys; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        v: [T, Hkv, D] values.
        layout: the rows.
        scale: factor of the scores, D ** -0.5 by default.

    Returns:
        [T, Hq, D] in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_key_head = q.shape[1] // k.shape[1]
    outputs = []
    for i, prompt in enumerate(layout.prompt_lengths):
        rows = slice(layout.group_offsets[i], layout.group_offsets[i + 1])
        query = widened(q[rows]).transpose(0, 1)
        key, value = (
            widened(x[rows]).transpose(0, 1).repeat_interleave(per_key_head, 0) for x in (k, v)
        )
        lengths = torch.tensor([prompt, *layout.completion_lengths[i]])
        part = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(q.device)
        seen = ((part == 0) | (part == part[:, None])).tril()
        scores = (scale * query @ key.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def _prompt_blocks(
    packed: Tensor, prompt_lengths: Sequence[int]
) -> Iterator[tuple[tuple[int | slice, int | slice], Tensor]]:
    """Cut [sum P, Hkv, D] into few batches of views: ((heads, prompts) index, [batch, P, D])."""
    key_heads = packed.shape[1]
    first_token = first_prompt = 0
    for length, run in groupby(prompt_lengths):
        prompts = len(list(run))
        tokens = packed[first_token : first_token + prompts * length]
        tokens = tokens.view(prompts, length, key_heads, -1)
        stop = first_prompt + prompts
        if prompts > key_heads:
            for head in range(key_heads):
                yield (head, slice(first_prompt, stop)), tokens[:, :, head]
        else:
            for i in range(prompts):
                yield (slice(None), first_prompt + i), tokens[i].transpose(0, 1)
        first_token += prompts * length
        first_prompt = stop


def prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prompt_lengths: Sequence[int],
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_length: int | Tensor,
    generations: int,
    scale: float | None = None,
) -> Tensor:
    """One decode step: every sequence attends to its prompt's keys and to its own.

    The G x R query rows that read one key head of a prompt are one matrix product over views, so
    the prompt's keys are neither copied nor read G times. Prompts of equal length that lie one
    after another share that product as a batch.

    Args:
        q: [S, Hq, D] queries of the newest tokens, S = N * generations, prompt by prompt.
        prefix_k: [sum P, Hkv, D] keys of all prompts.
        prefix_v: [sum P, Hkv, D] values of all prompts.
        prompt_lengths: N host ints P_i.
        suffix_k: [S, C_max, Hkv, D] keys of the sequences' own tokens, the newest included.
        suffix_v: [S, C_max, Hkv, D] values of the sequences' own tokens.
        suffix_length: valid suffix keys, one host int for all sequences or a tensor [S].
        generations: G, sequences per prompt.
        scale: factor of the scores, D ** -0.5 by default.

    Returns:
        [S, Hq, D] in q's dtype.
    """
    sequences, query_heads, head_size = q.shape
    key_heads = prefix_k.shape[1]
    per_key_head = query_heads // key_heads
    prompts, rows = len(prompt_lengths), generations * per_key_head
    scale = head_size**-0.5 if scale is None else scale
    own = suffix_length if isinstance(suffix_length, int) else suffix_k.shape[1]
    own_k, own_v = widened(suffix_k[:, :own]), widened(suffix_v[:, :own])

    query = (widened(q) * scale).view(sequences, key_heads, per_key_head, head_size)
    query = query.transpose(0, 1).contiguous()
    prompt_query = query.view(key_heads, prompts, rows, head_size)
    # Columns of the joint softmax: own keys, then the prompt's, then -inf up to the longest prompt.
    scores = query.new_full((key_heads, prompts, rows, own + max(prompt_lengths)), -torch.inf)
    own_scores = scores.view(key_heads, sequences, per_key_head, -1)[..., :own]
    for head in range(key_heads):
        own_scores[head] = torch.bmm(query[head], own_k[:, :, head].transpose(1, 2))
    if isinstance(suffix_length, Tensor):
        ended = torch.arange(own, device=q.device) >= suffix_length.to(q.device)[:, None]
        own_scores.masked_fill_(ended[:, None], -torch.inf)
    for index, key in _prompt_blocks(widened(prefix_k), prompt_lengths):
        product = torch.bmm(prompt_query[index], key.transpose(1, 2))
        scores[index][..., own : own + key.shape[1]] = product

    weights = scores.softmax(-1)
    own_weights = weights.view(key_heads, sequences, per_key_head, -1)[..., :own]
    out = torch.empty_like(query)
    for head in range(key_heads):
        torch.bmm(own_weights[head], own_v[:, :, head], out=out[head])
    prompt_out = out.view(key_heads, prompts, rows, head_size)
    for index, value in _prompt_blocks(widened(prefix_v), prompt_lengths):
        prompt_out[index].baddbmm_(weights[index][..., own : own + value.shape[1]], value)
    return out.transpose(0, 1).reshape(q.shape).to(q.dtype)


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Centre and scale rewards within each group: (r - mean) / (std + eps).

    Args:
        rewards: [N, G] any float dtype; NaN marks a completion without a reward, which takes no
            part in the mean and the std and gets advantage 0.
        eps: added to the std (ddof=1); 1e-4 is the GRPO trainer of TRL and R1-Omni.

    Returns:
        advantages: [N, G] fp32 (fp64 for fp64 rewards).
        no_spread: [N] bool, groups whose rewards are all equal (or fewer than two): all exactly 0.
    """
    rewards = widened(rewards)
    given = ~rewards.isnan()
    count = given.sum(1, keepdim=True)
    mean = rewards.where(given, 0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (rewards - mean).where(given, 0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # Equality, not std == 0: the mean of equal rewards may round, and 1e-8 / eps is not 0.
    largest = rewards.where(given, -torch.inf).amax(1)
    smallest = rewards.where(given, torch.inf).amin(1)
    no_spread = largest <= smallest
    return (centred / (std + eps)).masked_fill(no_spread[:, None], 0), no_spread


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL(policy || reference) of each token from one sample (Schulman, "kl approx").

    Args:
        logprobs: [M] of the policy that sampled the tokens.
        reference_logprobs: [M].
        estimator: "k1" = -d, "k2" = d^2 / 2, "k3" = exp(d) - d - 1, where d = reference - policy.

    Returns:
        [M] fp32 (fp64 for fp64), nats; k2 and k3 are never negative.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = widened(reference_logprobs) - widened(logprobs)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        # expm1, because exp(d) - 1 loses every digit while policy and reference still agree.
        return difference.expm1() - difference
    raise ValueError(f"kl_penalty: estimator={estimator!r} is unknown; use 'k1', 'k2' or 'k3'")


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    layout: GroupLayout,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
    old_logprobs: Tensor | None = None,
    reduction: str = "grpo",
    num_sequences: int | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of R1-Omni's trainer: token loss -(ratio * advantage - beta * k3).

    The ratio is exp(logp - old logp); without old log-probs it is exp(logp - logp.detach()), which
    is 1 and carries the policy gradient.

    Args:
        logprobs: [M] of the policy.
        advantages: [S], one per completion.
        layout: which token belongs to which completion.
        reference_logprobs: [M]; needed where beta is not 0, otherwise only for the KL metric.
        beta: weight of the KL penalty; R1-Omni trains with 0.04.
        old_logprobs: [M] of the policy that sampled, for more than one update per rollout.
        reduction: "grpo" takes the mean over each completion and then over completions (an empty
            one counts as 0); "dapo" takes the mean over all completion tokens.
        num_sequences: completions of the whole batch where `layout` is one of its micro-batches,
            so that the micro-batches' losses and metrics add up to the batch's.
        num_tokens: completion tokens of the whole batch, the same for "dapo".

    Returns:
        The loss, a scalar, and detached scalars reduced as the loss is: `policy_loss`, and `kl`
        (k3) where reference log-probs are given.

    Raises:
        ValueError: an unknown reduction, or beta without reference log-probs.
    """
    if beta != 0.0 and reference_logprobs is None:
        raise ValueError(
            f"grpo_loss: beta={beta} asks for a KL penalty but reference_logprobs is missing; "
            "pass the reference model's log-probs or set beta to 0"
        )
    logprobs = widened(logprobs)
    if reduction == "grpo":
        # An empty completion owns no token, so its length is never read.
        total = num_sequences or layout.num_sequences
        share = 1.0 / (layout.completion_length_tensor.to(logprobs.dtype) * total)
        weights = share[layout.sequence_of_token]
    elif reduction == "dapo":
        tokens = num_tokens or layout.num_completion_tokens
        weights = torch.full_like(logprobs, 1.0 / max(tokens, 1), requires_grad=False)
    else:
        raise ValueError(f"grpo_loss: reduction={reduction!r} is unknown; use 'grpo' or 'dapo'")
    start = logprobs.detach() if old_logprobs is None else widened(old_logprobs).detach()
    token_advantages = widened(advantages).detach()[layout.sequence_of_token]
    loss = policy_loss = -((logprobs - start).exp() * token_advantages * weights).sum()
    metrics = {"policy_loss": policy_loss.detach()}
    if reference_logprobs is not None:
        kl = (kl_penalty(logprobs, reference_logprobs.detach()) * weights).sum()
        metrics["kl"] = kl.detach()
        if beta != 0.0:
            loss = policy_loss + beta * kl
    return loss, metrics
