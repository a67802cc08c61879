"""TRL's trainer and ours on equal tiny models, for the tests of the drop-in; a step of decoding.

TRL is imported when a test asks for one of its trainers, and not before. All of that runs on the
CPU, where TRL's own scoring is plain torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

WORDS = ["<pad>", "<eos>", *"0123456789", *"abcdefghij"]
SIZES = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
)
BATCH, PROMPT, COMPLETION = 5, 4, 7


def varied(completions: list[str], **_: object) -> list[float]:
    """A reward that differs between most completions."""
    return [sum(map(ord, text)) % 11 / 10 for text in completions]


def tiny() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for weight in model.parameters():
        weight.data.normal_(std=0.2)  # so that log-probs spread, and no gradient vanishes
    return model


@pytest.fixture(scope="session")
def trl_tools(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Both classes, `sizes` of a model, and functions: `tiny`, `build` and `pair`."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from fastomni_kernels.integrations import FastomniGRPO

    class Trainer(FastomniGRPO, GRPOTrainer):
        pass

    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    defaults = dict(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=COMPLETION,
        temperature=0.8,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    def build(kind: type, model: Any, **settings: Any) -> Any:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>"
        )
        data = Dataset.from_dict({"prompt": [f"{a} {b}" for a in "0123" for b in "abcd"]})
        config = GRPOConfig(**{**defaults, **settings})
        trainer = kind(model, varied, config, data, processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1  # what a training would set
        return trainer

    def pair(model: Any, **settings: Any) -> tuple[Any, Any]:
        theirs = build(GRPOTrainer, deepcopy(model), **settings)
        return theirs, build(Trainer, model, **settings)

    return SimpleNamespace(
        GRPOTrainer=GRPOTrainer, Trainer=Trainer, sizes=SIZES, tiny=tiny, build=build, pair=pair
    )


@pytest.fixture(scope="session")
def trl_trainers(trl_tools: SimpleNamespace) -> tuple[Any, Any]:
    """TRL's trainer and ours; tests put back what they change."""
    return trl_tools.pair(tiny())


@pytest.fixture(scope="session")
def trl_logprobs() -> Callable[..., Any]:
    """A function (trainer, batch, **options) -> log-probs, entropies and routers' loss."""

    def score(trainer: Any, batch: dict[str, Tensor], **options: Any) -> Any:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        method = trainer._get_per_token_logps_and_entropies
        with torch.no_grad():
            return method(trainer.model, ids, mask, COMPLETION, **options)

    return score


@pytest.fixture
def trl_batch(trl_trainers: tuple[Any, Any], trl_logprobs: Callable[..., Any]) -> dict[str, Tensor]:
    """A padded micro-batch; one completion has no token that counts."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> Tensor:
        return torch.randint(2, len(WORDS), (BATCH, length), generator=generator)

    def noise(scale: float) -> Tensor:
        return torch.randn(BATCH, COMPLETION, generator=generator) * scale

    position = torch.arange(COMPLETION)
    given = {
        "prompt_ids": ids(PROMPT),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([[0], [2], [1], [0], [3]])).long(),
        "completion_ids": ids(COMPLETION),
        "completion_mask": (position < torch.tensor([[7], [3], [0], [5], [6]])).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.2, 0.9]),
        "num_items_in_batch": torch.tensor(53),
    }
    logprobs = trl_logprobs(trl_trainers[0], given)[0]
    # Ratios far beyond every clip, of tokens and of sequences, so that all branches are walked.
    shift = torch.tensor([[-0.5], [0.5], [0.0], [-0.6], [0.0]])
    given["old_per_token_logps"] = logprobs + noise(0.5) + shift
    given["ref_per_token_logps"] = logprobs + noise(0.3)
    given["sampling_per_token_logps"] = logprobs + noise(0.6)
    given["sampling_per_token_logps"][0, 2] = torch.nan
    return given


@pytest.fixture(scope="session")
def trl_step() -> Callable[..., dict[str, Any]]:
    """A function (trainer, batch, model=None) -> loss, gradients by name, and metrics."""

    def step(trainer: Any, given: dict[str, Tensor], model: Any = None) -> dict[str, Any]:
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        trainer.model.zero_grad()
        loss = trainer._compute_loss(model or trainer.model, dict(given))
        loss.backward()
        return {
            "loss": loss.detach(),
            "gradients": {name: p.grad.clone() for name, p in trainer.model.named_parameters()},
            "metrics": {mode: dict(values) for mode, values in trainer._metrics.items()},
        }

    return step


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def decode_step() -> Callable[..., tuple[list[Tensor], dict[str, Any]]]:
    """A function that makes the arguments of `prefix_decode`; what it must not read is NaN."""

    def make(
        prompts: list[int],
        prompt_of: list[int],
        lengths: list[int],
        places: int,
        heads: tuple[int, int] = (4, 2),
        size: int = 16,
        dtype: torch.dtype = torch.float64,
        append: bool = True,
        rotate: bool = True,
        spare: int = 3,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(len(prompt_of) + places)
        sequences, total = len(prompt_of), sum(prompts)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device, dtype)

        def counts(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        prefix = [normal(total + spare, heads[1], size) for _ in range(2)]
        suffix = [normal(sequences, places, heads[1], size) for _ in range(2)]
        for x in prefix:
            x[total:] = torch.nan
        for s, length in enumerate(lengths):
            for x in suffix:
                # The newest is still to be stored where there is a place for it.
                x[s, max(0, length - (append and length <= places)) :] = torch.nan
        offsets = counts([sum(prompts[:i]) for i in range(len(prompts) + 1)])
        tensors = [normal(sequences, heads[0], size), *prefix, offsets]
        tensors += [*suffix, counts(lengths), counts(prompt_of)]
        options: dict[str, Any] = {}
        if append:
            options |= {name: normal(sequences, heads[1], size) for name in ("new_k", "new_v")}
        if rotate:
            angles = normal(sequences, 1, size // 2)
            sines = torch.cat((-angles.sin(), angles.sin()), -1)
            options["rotation"] = (torch.cat([angles.cos()] * 2, -1), sines)
        return tensors, options

    return make
