"""A tiktoken vocabulary (a line a token: base64 and rank) as a tokenizer that works on bytes.

Owns reading and checking such a file. Neighbours: `qwen` and `chatglm_tokenizer` know pattern and special tokens,
`byte_pairs` finds the merges.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lamella_engine.errors import CheckpointError
from lamella_engine.importers.byte_pairs import merges_of

_BYTES = 256


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of `path` with their ranks, which are their ids.

    Raises:
        CheckpointError: it is not such a file, a byte has no token, or ranks are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} is not a tiktoken vocabulary: {error}; fetch it again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(_BYTES)):
        raise CheckpointError(f"{path} lacks tokens: its ranks have gaps, or a byte has no token; fetch it again")
    return ranks


def looks_like_ranks(path: Path) -> bool:
    """True if the file begins as a tiktoken vocabulary does, and not as a sentencepiece model."""
    with path.open("rb") as file:
        first = file.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def tiktoken_tokenizer(
    ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str, *, is_nfc: bool
) -> Tokenizer:
    """A tokenizer that cuts text by `pattern` and joins bytes by rank.

    Args:
        ranks: see `read_ranks`.
        special: special tokens with their ids, which follow the ranks without gaps.
        pattern: regular expression of the pieces that are encoded one by one.
        is_nfc: whether text is composed (NFC) first.

    Raises:
        CheckpointError: the special tokens leave gaps.
    """
    if sorted(special.values()) != list(range(len(ranks), len(ranks) + len(special))):
        raise CheckpointError(f"the special tokens do not follow the {len(ranks)} tokens of the vocabulary")
    shown = bytes_to_unicode()
    vocabulary = {"".join(shown[byte] for byte in token): rank for token, rank in ranks.items()}
    # A piece that is a token of its own is never put together from others.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges_of(vocabulary), ignore_merges=True))
    if is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(name, normalized=False, special=True)
            for name, _ in sorted(special.items(), key=lambda item: item[1])
        ]
    )
    return tokenizer
