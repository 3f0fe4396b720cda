"""Small vocabularies made in tests, and what they mean, stated without the product's tokenizers."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import regex
import sentencepiece

from tests.tiny_models import SENTENCES

QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}

Ranks = dict[bytes, int]


def train_ranks(num_merges: int = 40) -> Ranks:
    """A byte-pair vocabulary: all bytes, then the most frequent pair in SENTENCES, again and again."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [
        [bytes([byte]) for byte in text.encode()] for line in SENTENCES for text in regex.findall(QWEN_PIECES, line)
    ]
    for _ in range(num_merges):
        pairs = [left + right for word in words for left, right in itertools.pairwise(word)]
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks[best] = len(ranks)
        words = [_join(word, {best: 0}) for word in words]
    return ranks


def _join(parts: list[bytes], ranks: Ranks) -> list[bytes]:
    """Join the neighbours of lowest rank, leftmost first, until no two neighbours make a token."""
    parts = list(parts)
    while True:
        unions = enumerate(left + right for left, right in itertools.pairwise(parts))
        found = [(ranks[union], at) for at, union in unions if union in ranks]
        if not found:
            return parts
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def ids_by_rank(text: str, ranks: Ranks, pieces: str) -> list[int]:
    """What a tiktoken vocabulary means: cut into pieces, each a token or joined from bytes by rank."""
    found: list[int] = []
    for piece in regex.findall(pieces, text):
        data = piece.encode()
        found += [ranks[data]] if data in ranks else [ranks[part] for part in _join([bytes([b]) for b in data], ranks)]
    return found


def save_ranks(path: Path, ranks: Ranks) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))


def train_pieces(path: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """Train a sentencepiece model on SENTENCES, write it to `path`, and open it with sentencepiece itself."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=written, hard_vocab_limit=False, minloglevel=2,
        num_threads=1, **{"model_type": "bpe", "vocab_size": 460, **options},
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
