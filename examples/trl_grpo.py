"""TRL's GRPOTrainer with fastomni's log-probs and loss: a tiny model learns to repeat a digit.

Run in the folder that holds setup.py:
    pip install -e ".[trl]" --no-build-isolation
    python examples/trl_grpo.py

Nothing is downloaded. It takes under a minute on a CPU; a GPU is used where there is one.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from fastomni_kernels.integrations import FastomniGRPO


class Trainer(FastomniGRPO, GRPOTrainer):
    """All that is to be done."""


def repeats(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Share of four places in which the completion says the prompt's digit."""
    pairs = zip(prompts, completions, strict=True)
    return [completion.split()[:4].count(prompt) / 4 for prompt, completion in pairs]


def main(steps: int = 80) -> tuple[float, float]:
    """Train, and return the mean reward of the first and of the last ten steps."""
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", *"0123456789"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>"
    )
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=80,
            num_generations=8, max_completion_length=4, loss_type="dapo", bf16=False,
            logging_steps=10, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": list("0123456789")})
        model = Qwen2ForCausalLM(config)
        trainer = Trainer(model, repeats, settings, data, processing_class=tokenizer)
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    print("mean reward of the first ten steps {:.2f}, of the last ten {:.2f}".format(*main()))
