"""A sentencepiece model as a tokenizer in the form of ``tokenizer.json``, with the same ids for the same text.

Owns the translation: character rules, joining or choosing pieces, bytes, special tokens. Neighbours:
`sentencepiece_model` reads the file, `tokenizer_hints` the files beside it, families say what is special.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.importers.byte_pairs import merges_of
from lamella_engine.importers.imported import ConvertedTokenizer
from lamella_engine.importers.sentencepiece_model import (
    Algorithm,
    Piece,
    PieceKind,
    SentencePieceModel,
    read_sentencepiece,
)
from lamella_engine.importers.tokenizer_hints import SPECIAL_NAMES, TokenizerHints

_SPACE = "\u2581"
_MAX_ADDED_IDS = 100_000  # ids that files may add behind the vocabulary; more is a damaged file


class PieceTokenizer:
    """A sentencepiece model on its way to a tokenizer; families add special tokens and then `finish` it."""

    def __init__(self, model: SentencePieceModel, hints: TokenizerHints, *, uses_added_tokens: bool) -> None:
        self._model = model
        self._hints = hints
        self._pieces = list(model.pieces)
        self._special: dict[str, None] = {}
        self.mark_special(*(piece.text for piece in self._pieces if piece.kind is PieceKind.CONTROL))
        if uses_added_tokens:
            for token_id, (text, is_special) in sorted(hints.added_tokens.items()):
                self.put(token_id, text, is_special=is_special)
            self.mark_special(*hints.additional_special_tokens)

    @classmethod
    def read(cls, path: Path, hints: TokenizerHints, *, uses_added_tokens: bool = True) -> PieceTokenizer | None:
        """Read the sentencepiece model `path`; None if there is none.

        Args:
            path: the model file.
            hints: of the checkpoint that it lies in.
            uses_added_tokens: whether to take the tokens that the hints add; else the family puts its own.

        Raises:
            CheckpointError: the file is damaged.
            UnsupportedModel: it works in a way that is not known.
        """
        if not path.is_file():
            return None
        model = read_sentencepiece(path)
        if model.algorithm not in (Algorithm.BPE, Algorithm.UNIGRAM) or model.is_whitespace_suffix:
            raise UnsupportedModel(
                f"{path} is a sentencepiece model of the kind {model.algorithm.name}, which is not converted; only BPE "
                "and UNIGRAM with spaces in front of words are"
            )
        return cls(model, hints, uses_added_tokens=uses_added_tokens)

    @property
    def size(self) -> int:
        """How many ids there are."""
        return len(self._pieces)

    def has(self, text: str) -> bool:
        """True if the vocabulary has that piece."""
        return any(piece.text == text for piece in self._pieces)

    def token(self, token_id: int | None) -> str | None:
        """The piece with that id, if there is one."""
        return self._pieces[token_id].text if token_id is not None and token_id < len(self._pieces) else None

    def put(self, token_id: int, text: str, *, is_special: bool) -> None:
        """Give `text` the id, in place of the piece that has it.

        Raises:
            CheckpointError: the id is far behind the vocabulary.
        """
        if token_id > len(self._model.pieces) + _MAX_ADDED_IDS:
            raise CheckpointError(f"the token {text!r} has the id {token_id}, far behind the vocabulary")
        while len(self._pieces) <= token_id:
            self._pieces.append(Piece(f"<|unused {len(self._pieces)}|>", 0.0, PieceKind.UNUSED))
        kind = self._pieces[token_id].kind
        if self._pieces[token_id].text != text:
            kind = PieceKind.CONTROL if is_special else PieceKind.USER_DEFINED
        self._pieces[token_id] = Piece(text, self._pieces[token_id].score, kind)
        if is_special:
            self._special[text] = None

    def mark_special(self, *texts: str) -> None:
        """Those of `texts` that the vocabulary has are found in any text and not shown."""
        known = {piece.text for piece in self._pieces}
        self._special.update(dict.fromkeys(text for text in texts if text in known))

    def finish(
        self,
        *,
        begins_with_bos: bool,
        prefix: tuple[str, ...] = (),
        chat_template: str | None = None,
        end_tokens: tuple[str, ...] = (),
    ) -> ConvertedTokenizer:
        """The tokenizer.

        Args:
            begins_with_bos: whether raw text begins with the first token.
            prefix: special tokens that raw text begins with, besides.
            chat_template: see `ConvertedTokenizer`.
            end_tokens: see `ConvertedTokenizer`.
        """
        named = self._named()
        self.mark_special(*named.values())
        tokenizer = Tokenizer(self._choice())
        if rules := self._text_rules():
            tokenizer.normalizer = normalizers.Sequence(rules)
        if whole := [piece.text for piece in self._pieces if piece.kind is PieceKind.USER_DEFINED]:
            longest_first = "|".join(re.escape(text) for text in sorted(whole, key=len, reverse=True))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
        tokenizer.decoder = self._decoder()
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in self._special])
        begin = (named["bos_token"],) if begins_with_bos and "bos_token" in named else ()
        if front := (*begin, *prefix):
            ids = [(text, tokenizer.token_to_id(text)) for text in front]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*front, "$A"], pair=[*front, "$A", "$B"], special_tokens=ids
            )
        return ConvertedTokenizer(tokenizer, named, chat_template, end_tokens)

    def _named(self) -> dict[str, str]:
        """Special tokens by transformers' names: as the files have it, else by the config's ids, else by the model."""
        known = {piece.text for piece in self._pieces}
        found: dict[str, str] = {}
        for name in SPECIAL_NAMES:
            text = self._hints.special_token(name) or self.token(self._hints.special_id(name))
            if text in known and text is not None:
                found[name] = text
        unknown = next((piece.text for piece in self._pieces if piece.kind is PieceKind.UNKNOWN), None)
        if unknown is not None:
            found.setdefault("unk_token", unknown)
        return found

    def _choice(self) -> models.Model:
        """How pieces are chosen: by joining neighbours in the order of scores, or by the best sum of scores."""
        unknown = next((index for index, piece in enumerate(self._pieces) if piece.kind is PieceKind.UNKNOWN), None)
        has_bytes = self._model.has_byte_fallback
        if self._model.algorithm is Algorithm.UNIGRAM:
            scores = [(piece.text, _unigram_score(piece)) for piece in self._pieces]
            return models.Unigram(scores, unk_id=unknown, byte_fallback=has_bytes)
        joined = [piece for piece in self._pieces if piece.kind is PieceKind.NORMAL]
        order = {piece.text: rank for rank, piece in enumerate(sorted(joined, key=lambda piece: -piece.score))}
        return models.BPE(
            {piece.text: index for index, piece in enumerate(self._pieces)},
            merges_of(order),
            unk_token=None if unknown is None else self._pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=has_bytes,
            # User-defined pieces are cut out first, and must then be found whole.
            ignore_merges=any(piece.kind is PieceKind.USER_DEFINED for piece in self._pieces),
        )

    def _text_rules(self) -> list[normalizers.Normalizer]:
        model = self._model
        rules: list[normalizers.Normalizer] = []
        if model.charsmap:
            rules.append(normalizers.Precompiled(model.charsmap))
        if model.removes_extra_whitespace:
            rules += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        if model.has_dummy_prefix:
            rules.append(normalizers.Prepend(_SPACE))
        return [*rules, normalizers.Replace(" ", _SPACE)]

    def _decoder(self) -> decoders.Decoder:
        steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._model.has_dummy_prefix:
            steps.append(decoders.Strip(" ", 1, 0))
        return decoders.Sequence(steps)


def _unigram_score(piece: Piece) -> float:
    """Pieces that text is never cut into get a score that no text would choose."""
    never = -1e6
    if piece.kind is PieceKind.USER_DEFINED:
        return 0.0
    return piece.score if piece.kind in (PieceKind.NORMAL, PieceKind.BYTE) else never
