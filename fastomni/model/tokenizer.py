"""The two tokenizers of a checkpoint: byte-level BPE for the decoder, WordPiece for the router.

Prompts are cut at `<image>`, `<video>` and `<audio>`; each piece of text is encoded on its own
(no merge crosses a placeholder) and the placeholder becomes its negative id, as
tokenizer_multimodal_token of the released mm_utils.py does.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer

from fastomni.model.config import CheckpointError
from fastomni.model.omni import AUDIO, IMAGE, VIDEO, OmniModel

PLACEHOLDERS = {"<image>": IMAGE, "<video>": VIDEO, "<audio>": AUDIO}
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Qwen2's pre-tokenisation: contractions, words with one leading sign, digits, signs, newlines.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class OmniTokenizer:
    """Text to ids and back for one model.

    Attributes:
        text: the decoder's tokenizer.
        wordpiece: the router's.
    """

    text: Tokenizer
    wordpiece: BertWordPieceTokenizer

    @classmethod
    def of(cls, model: OmniModel) -> OmniTokenizer:
        """The tokenizers that came with a model's checkpoint.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        for name in ("tokenizer.json", "bert/vocab.txt"):
            if name not in model.companion_files:
                raise CheckpointError(
                    f"the checkpoint has no {name}; copy it there from the model it was made from"
                )
        vocabulary = model.companion_files["bert/vocab.txt"].decode("utf-8").split("\n")
        pieces = {piece: index for index, piece in enumerate(vocabulary) if piece}
        wordpiece = BertWordPieceTokenizer(vocab=pieces, lowercase=True)
        wordpiece.enable_truncation(int(model.config.bert.max_position_embeddings))
        return cls(
            Tokenizer.from_str(model.companion_files["tokenizer.json"].decode("utf-8")), wordpiece
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; chat tokens are recognised, nothing is added."""
        return self.text.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> tuple[int, ...]:
        """Ids of a rendered prompt with negative ids at its placeholders."""
        ids: list[int] = []
        for piece in re.split("(<image>|<video>|<audio>)", prompt):
            if piece in PLACEHOLDERS:
                ids.append(PLACEHOLDERS[piece])
            elif piece:
                ids.extend(self.encode(piece))
        return tuple(ids)

    def encode_router(self, text: str) -> tuple[int, ...]:
        """WordPiece ids with [CLS] and [SEP] for the router; text beyond BERT's positions goes."""
        return tuple(self.wordpiece.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without chat tokens."""
        return self.text.decode(list(ids), skip_special_tokens=True)


def train_text_tokenizer(corpus: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE in Qwen2's format, with its chat tokens, trained on `corpus`.

    Args:
        corpus: texts.
        vocabulary: the number of tokens at most, chat tokens and 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def train_wordpiece(corpus: Iterable[str], vocabulary: int) -> list[str]:
    """A WordPiece vocabulary for `corpus`, in id order: characters, then the most frequent words.

    The library's own trainer numbers continuations in the order of a hash table, so that two runs
    of one seed would see other ids; here the order follows from the texts.

    Args:
        corpus: texts.
        vocabulary: the number of tokens at most; every character of the corpus comes first.
    """
    normaliser, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in corpus:
        pieces = splitter.pre_tokenize_str(normaliser.normalize_str(text))
        words.update(word for word, _ in pieces)
    printable = set(map(chr, range(33, 127))) - set(string.ascii_uppercase)
    letters = sorted(printable.union(*words))
    tokens = [*BERT_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    frequent = sorted(words, key=lambda word: (-words[word], word))
    return list(dict.fromkeys([*tokens, *frequent]))[: max(vocabulary, len(tokens))]


def companion_files(tokenizer: Tokenizer, wordpiece: Sequence[str]) -> dict[str, bytes]:
    """The files that make a checkpoint's tokenizers, for `OmniModel.companion_files`."""
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": stop, "pad_token_id": stop[1], "do_sample": True}
    return {
        "tokenizer.json": tokenizer.to_str().encode("utf-8"),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode("utf-8"),
        "generation_config.json": json.dumps(generation, indent=1).encode("utf-8"),
        "bert/vocab.txt": "\n".join(wordpiece).encode("utf-8"),
    }
