"""Packed rows in a transformers decoder: log-probs of completions, their prompt computed once.

Run in the folder that holds setup.py: python examples/packed_attention.py

A small random Qwen2 scores eight completions of one prompt, forward and backward, in two ways:
packed, [prompt | c1 | ... | c8] in one row, and repeated, eight rows with a prompt each. Nothing is
downloaded. A model of your own comes from AutoModelForCausalLM.from_pretrained in the same way.
"""

import time

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config

from fastomni_kernels import GroupLayout, linear_logprobs
from fastomni_kernels.transformers_attention import check_model, register


def main(prompt_length: int = 512) -> tuple[float, float, float]:
    """Return the largest difference of the log-probs, and the seconds of a step in both ways."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    check_model(model)  # refuses a model that cannot run packed rows
    prompt = torch.randint(2000, (prompt_length,))
    completions = [torch.randint(2000, (32 - 2 * i,)) for i in range(8)]
    layout = GroupLayout.build([prompt_length], [[len(c) for c in completions]])
    packed = torch.cat([prompt, *completions])[None]
    repeated = pad_sequence([torch.cat([prompt, c]) for c in completions], batch_first=True)

    def step(attention: str) -> tuple[Tensor, float]:
        model.set_attn_implementation(attention)
        start = time.perf_counter()
        if attention == "fastomni_prefix":
            where = dict(position_ids=layout.positions[None], group_layout=layout)
            hidden = model.model(packed, use_cache=False, **where)[0]
            hidden = hidden[0, layout.predictor_rows]  # of the row before each token
        else:
            hidden = model.model(repeated, use_cache=False)[0]
            hidden = layout.unpad(hidden[:, prompt_length - 1 : -1])
        logprobs, _ = linear_logprobs(hidden, model.lm_head.weight, torch.cat(completions))
        logprobs.mean().backward()
        return logprobs.detach(), time.perf_counter() - start

    difference = (step("fastomni_prefix")[0] - step("sdpa")[0]).abs().max().item()
    shared, plain = (min(step(x)[1] for _ in range(3)) for x in ("fastomni_prefix", "sdpa"))
    return difference, shared, plain


if __name__ == "__main__":
    text = "log-probs differ by {:.0e} at most; a step takes {:.2f} s packed, {:.2f} s repeated"
    print(text.format(*main()))
