"""A CLIP-style byte-level BPE tokenizer, trained on the toy captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 64
"""Tokens of a prompt, start and end included; the longest detailed caption of two people has 49."""


def train_tokenizer(captions: Iterable[str], vocabulary: int = 1024) -> CLIPTokenizer:
    """Learn merges on lower-cased captions; start and end get the two highest ids, as in CLIP.

    Args:
        captions: the corpus.
        vocabulary: upper bound of the number of tokens (512 of them are the byte alphabet).
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    with TemporaryDirectory() as folder:
        _, merges_file = tokenizer.model.save(folder)
        merges = [line for line in Path(merges_file).read_text("utf-8").splitlines() if not line.startswith("#")]
    pairs = [(left, right) for left, right in (line.split(" ") for line in merges)]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += [left + right for left, right in pairs if left + right not in set(words)]
    vocab = {word: number for number, word in enumerate([*dict.fromkeys(words), START, END])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=CONTEXT_LENGTH)


def encode_captions(tokenizer: CLIPTokenizer, captions: list[str]) -> Int[Tensor, "b k"]:
    """Token ids, padded to `model_max_length` and truncated there."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return torch.as_tensor(encoded.input_ids)
