"""Tokenizers of CLIP and T5 with a vocabulary of few words, for small models that raysweep trains itself.

CLIP's has only the merges of open_clip's bundled vocabulary that the words need. Other words are split into letters, so any text
can be tokenized.
"""

from __future__ import annotations

import itertools
import json
import string
import tempfile
from functools import lru_cache
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from transformers import CLIPTokenizer, T5Tokenizer

ENDS = ("<|startoftext|>", "<|endoftext|>")


@lru_cache(maxsize=8)
def tokenizer_of(words: tuple[str, ...], length: int) -> CLIPTokenizer:
    """The tokenizer that knows `words` as single tokens where CLIP does, with prompts of `length` tokens."""
    ranks = SimpleTokenizer().bpe_ranks
    merges = sorted({m for word in words for m in _merges(word, ranks)}, key=ranks.__getitem__)
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges), *ENDS]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merged = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        merged.write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


@lru_cache(maxsize=8)
def t5_tokenizer_of(words: tuple[str, ...], length: int) -> T5Tokenizer:
    """T5's tokenizer with a vocabulary of `words` and printable characters, with prompts of `length` tokens."""
    letters = [c for c in string.printable if not c.isspace()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # the scores of a unigram model are log probabilities: one word must be likelier than its letters
    pieces = [("\u2581", -4.0), *((f"\u2581{word}", -2.0) for word in words), *((c, -8.0) for c in letters)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=length)


def _merges(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges by which byte-pair encoding puts a word together."""
    parts, used = [*word[:-1], word[-1] + "</w>"], []
    while len(parts) > 1:
        pairs = [p for p in itertools.pairwise(parts) if p in ranks]
        if not pairs:
            break
        best = min(pairs, key=ranks.__getitem__)
        used.append(best)
        merged, i = [], 0
        while i < len(parts):
            if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return used
