"""What people write to choose packed formats, and which tensor of a model that gives which format.

Owns the language (``int8,layers.0-3=bf16,lm_head=bf16``) and the rule for what nobody named. Reads no file and packs
nothing. Neighbours: `formats` has the formats; whoever builds shards asks `format_for` for every tensor.

A specification is a list, separated by commas. A word alone is the format of everything that is packed by default: the
matrices inside the layers, experts included. ``PLACE=FORMAT`` overrides it for the tensors that PLACE names; of several
that name a tensor the last one counts. A place is one of the words of `KINDS`, or some consecutive parts of a tensor's
dotted name, ``layers.<number>.<name in the layer>``, in which ``0-3`` is a range of numbers and ``*`` any text.

A head that is the embedding is one tensor under two names: a rule for either is for both, and two rules that contradict
each other are refused.

What decides over others (norms, embeddings, heads, routers), biases, other vectors and rows too short to pack stay in
full precision unless their own part of the name, or their kind, is written: ``layers.0-3=nf4`` and ``mlp=nf4`` leave
the norms and the router there alone, ``norms=int8`` and ``mlp.gate=int8`` do not.

The word ``calibrated`` has four-bit codes chosen for what the layers are given over the text that ships, and
``calibrated=FILE`` over the text in a file (`layer_inputs`, `formats.calibrated_rounding`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lamella_engine.calibration_text import CalibrationText
from lamella_engine.errors import OptionError
from lamella_engine.formats import CALIBRATED_FORMATS, FORMATS

FULL = "full"
"""Not packed: in the type that the checkpoint's weights are stored in."""
KINDS = ("norms", "embeddings", "lm_head", "routers", "biases")

CALIBRATED = "calibrated"
"""The word that has codes chosen for a text."""

_FULL_WORDS = (FULL, "bf16")
_EXAMPLE = "int8,layers.0-3=bf16,lm_head=bf16"
_MIN_COLUMNS = 16  # shorter rows (of convolutions, of states) have little to pack
_RANGE = re.compile(r"(\d+)-(\d+)")
_PART = re.compile(r"[\w*?-]+")
_HEADS = ("lm_head", "embed_out", "output_projection", "proj_out", "head")
_ROUTERS = ("gate", "router", "gating", "shared_expert_gate", "gate_network")
_NO_MATRICES = ("conv1d", "A_log", "rotary_emb", "relative_attention_bias")


@dataclass(frozen=True)
class Rule:
    """A place and its format; `place` is as written."""

    place: str
    format: str

    def __str__(self) -> str:
        return f"{self.place}={self.format}"


@dataclass(frozen=True)
class TensorName:
    """A tensor of a model: its name within its layer, or in the model if `layer` is None, and its shape.

    `tied` is another name that it goes by: a head that is the embedding is stored once, under one of the two.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    tied: str | None = None

    @property
    def path(self) -> str:
        """The dotted name that places are compared with."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


@dataclass(frozen=True)
class QuantSpec:
    """Which format every tensor gets.

    Attributes:
        default: a format, or `FULL`.
        rules: exceptions from it; later ones count more.
        calibration: what codes are chosen for; None means for the weights alone.
    """

    default: str
    rules: tuple[Rule, ...] = ()
    calibration: CalibrationText | None = None

    def __str__(self) -> str:
        """The same specification in one way of writing: equal texts mean the same, so it can be part of a key."""
        return ",".join([self.default, *map(str, self.rules), *([str(self.calibration)] if self.calibration else [])])

    def is_calibrated(self, format: str) -> bool:
        """Whether the codes of a format are chosen for a text."""
        return self.calibration is not None and format in CALIBRATED_FORMATS

    @property
    def packs_nothing(self) -> bool:
        """Whether it leaves every tensor as it is."""
        return self.default == FULL and all(rule.format == FULL for rule in self.rules)

    def format_for(self, tensor: TensorName) -> str:
        """The format of a tensor, or `FULL`.

        Raises:
            OptionError: it goes by two names, and they are given different formats.
        """
        kind = _kind(tensor)
        found = [rule for each in _aliases(tensor) if (rule := self._last_rule(each)) is not None]
        if not found:
            return FULL if kind is not None else self.default
        if found[0].format != found[-1].format:
            raise OptionError(
                f"quant: {str(found[0])!r} and {str(found[-1])!r} are for one weight: the model's head is its "
                f"embedding ({tensor.name!r}, stored once). Give both the same format, or name one of them"
            )
        return found[0].format

    def _last_rule(self, tensor: TensorName) -> Rule | None:
        kind = _kind(tensor)
        return next((rule for rule in reversed(self.rules) if _names(rule.place, tensor, kind)), None)

    def check_against(self, tensors: Iterable[TensorName]) -> None:
        """Refuse rules that no tensor of the model comes under; a word of `KINDS` may find nothing to leave as it is.

        Raises:
            OptionError: a rule names nothing, or a layer that is not there.
        """
        listed = [(each, _kind(each)) for tensor in tensors for each in _aliases(tensor)]
        last = max((tensor.layer for tensor, _ in listed if tensor.layer is not None), default=-1)
        for rule in self.rules:
            highest = _highest_layer(rule.place)
            if highest is not None and highest > last:
                raise OptionError(
                    f"quant: {str(rule)!r} names layer {highest}, and the model's layers are 0 to {last}; correct the "
                    "number"
                )
            may_be_idle = rule.place in KINDS and rule.format == FULL
            if not may_be_idle and not any(_names(rule.place, tensor, kind) for tensor, kind in listed):
                reach = [tensor.path for tensor, _ in listed if _run(rule.place, tensor.path) is not None]
                raise OptionError(f"quant: {str(rule)!r} {_why_nothing(rule.place, reach, listed)}")


def parse_quant(text: str) -> QuantSpec:
    """Read a specification.

    Raises:
        OptionError: it cannot be understood; the message names the part, the known formats and an example.
    """
    default: str | None = None
    rules: dict[str, Rule] = {}
    calibration: CalibrationText | None = None
    for part in text.split(","):
        place, sign, word = (piece.strip() for piece in part.rpartition("="))
        if not word:
            raise _refused(part, text, "a format is missing" if place != CALIBRATED else "a file is missing")
        if CALIBRATED in (place, part.strip().lower()):
            if calibration is not None:
                raise _refused(part, text, "it is given twice")
            calibration = CalibrationText.read(word if sign else None)
            continue
        format = _format(word, part, text)
        if not sign:
            if default is not None:
                raise _refused(part, text, f"{default!r} is the format of everything already; write PLACE={word}")
            default = format
            continue
        _check_place(place, part, text)
        if place in rules:
            raise _refused(part, text, f"{place!r} is given twice")
        rules[place] = Rule(place, format)
    spec = QuantSpec(default or FULL, tuple(rules.values()), calibration)
    if calibration is not None and not any(spec.is_calibrated(each) for each in (spec.default, *_formats(spec.rules))):
        raise _refused(
            CALIBRATED, text, f"nothing is packed as {' or '.join(CALIBRATED_FORMATS)}, the formats it is for"
        )
    return spec


def _formats(rules: Iterable[Rule]) -> list[str]:
    return [rule.format for rule in rules]


def _format(word: str, part: str, text: str) -> str:
    lowered = word.lower()
    if lowered in _FULL_WORDS:
        return FULL
    if lowered not in FORMATS:
        raise _refused(part, text, f"{word!r} is no format")
    return lowered


def _check_place(place: str, part: str, text: str) -> None:
    if not place:
        raise _refused(part, text, "a place is missing before '='")
    for piece in place.split("."):
        if not _PART.fullmatch(piece):
            raise _refused(part, text, f"{piece!r} is no part of a tensor's name")
        bounds = _RANGE.fullmatch(piece)
        if bounds and int(bounds[1]) > int(bounds[2]):
            raise _refused(part, text, f"the range {piece} ends before it begins")


def _refused(part: str, text: str, reason: str) -> OptionError:
    return OptionError(
        f"quant: {part.strip()!r} in {text!r} cannot be understood: {reason}. Formats are "
        f"{', '.join(FORMATS)}, and {' or '.join(_FULL_WORDS)} for full precision; for example {_EXAMPLE!r}"
    )


def _kind(tensor: TensorName) -> str | None:
    """Why a tensor stays in full precision unless it is named: one of `KINDS`, or ``other``; None if it is packed."""
    parts = tensor.name.split(".")
    if _is_bias(parts[-1]):
        return "biases"
    if tensor.layer is None:
        return _kind_outside(parts)
    if any(_is_norm(part) for part in parts):
        return "norms"
    if any(part in _ROUTERS for part in parts):
        return "routers"
    is_odd = len(tensor.shape) < 2 or tensor.shape[-1] < _MIN_COLUMNS or any(part in _NO_MATRICES for part in parts)
    return "other" if is_odd else None


def _kind_outside(parts: list[str]) -> str:
    if any(_is_norm(part) for part in parts):
        return "norms"
    if any(part in _HEADS for part in parts):
        return "lm_head"
    is_embedding = any("embed" in part or part in ("wte", "wpe") for part in parts)
    return "embeddings" if is_embedding else "other"


def _aliases(tensor: TensorName) -> list[TensorName]:
    """A tensor under each of its names."""
    others = [] if tensor.tied is None else [TensorName(tensor.tied, tensor.shape, tensor.layer)]
    return [replace(tensor, tied=None), *others]


def _is_norm(part: str) -> bool:
    lowered = part.lower()
    return "norm" in lowered or re.match(r"ln(_|\d|$)", lowered) is not None


def _is_bias(part: str) -> bool:
    return part == "bias" or part.endswith("_bias")


def _names(place: str, tensor: TensorName, kind: str | None) -> bool:
    """Whether a place means a tensor: for one that stays in full precision by default, by its own part or its kind."""
    if place in KINDS:
        return kind == place
    end = _run(place, tensor.path)
    return end is not None and (kind is None or end > _own_part(tensor, kind))


def _own_part(tensor: TensorName, kind: str) -> int:
    """Where in the path lies the part that makes a tensor what it is."""
    parts = tensor.path.split(".")
    if kind == "biases":
        return len(parts) - 1
    if kind in ("norms", "routers"):
        is_own = _is_norm if kind == "norms" else _ROUTERS.__contains__
        return next(index for index, part in enumerate(parts) if is_own(part))
    return len(parts) - (2 if parts[-1] == "weight" and len(parts) > 1 else 1)


def _run(place: str, path: str) -> int | None:
    """Where the last run of parts that match `place` ends; None if there is none."""
    wanted, parts = place.split("."), path.split(".")
    for first in range(len(parts) - len(wanted), -1, -1):
        if all(_matches(want, part) for want, part in zip(wanted, parts[first:], strict=False)):
            return first + len(wanted)
    return None


def _matches(want: str, part: str) -> bool:
    bounds = _RANGE.fullmatch(want)
    if bounds:
        return part.isdecimal() and int(bounds[1]) <= int(part) <= int(bounds[2])
    return fnmatchcase(part, want)


def _highest_layer(place: str) -> int | None:
    """The highest layer that a place of the form ``layers.N`` or ``layers.N-M`` names."""
    match = re.match(r"layers\.(?:\d+-)?(\d+)(?:\.|$)", place)
    return int(match[1]) if match else None


def _why_nothing(place: str, reach: list[str], listed: list[tuple[TensorName, str | None]]) -> str:
    if place in KINDS:
        return f"packs nothing: the model has no {place}; leave it out"
    if reach:
        return f"names no tensor that is packed without being named itself; to mean {reach[0]!r}, write that"
    known = ", ".join(repr(tensor.path) for tensor, _ in listed[:3])
    return f"names no tensor of the model; its tensors have names such as {known}, and there are the words {KINDS}"
