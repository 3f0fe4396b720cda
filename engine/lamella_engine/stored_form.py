"""How a model is to be stored, beyond its type: copied or in place, in full precision or packed.

Plain values and the rules between them; `shard_store` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella_engine import names
from lamella_engine.errors import OptionError
from lamella_engine.formats import CALIBRATED_FORMATS, FORMATS
from lamella_engine.quant_mix import SizeTarget
from lamella_engine.quant_spec import CALIBRATED, QuantSpec, parse_quant


@dataclass(frozen=True)
class StoredForm:
    """What `ShardStore.ensure` makes of a model.

    Attributes:
        in_place: leave layers in the source's files where they lie there as they are needed, instead of a copy.
        quant: packed formats, as `quant_spec` reads them; the model's name then gets a variant, such as ``~int8``.
        quant_target_bytes: bytes that all shards may take together; which format each matrix gets is then measured
            (`quant_mix`), and the variant is such as ``~mix-4gib``.
        quant_device: what packs: ``cpu``, ``cuda:N``, or ``auto``, a GPU if there is one.
    """

    in_place: bool = False
    quant: str | None = None
    quant_target_bytes: int | None = None
    quant_device: str = "auto"

    def __post_init__(self) -> None:
        if self.is_packed and self.in_place:
            raise OptionError(
                "packed weights are files of their own and cannot be read in place; leave one of the two out"
            )
        if self.quant is not None and self.quant_target_bytes is not None:
            raise OptionError("quant says which formats are used, quant_target_bytes has them picked; give one of them")
        if self.quant_target_bytes is not None and self.quant_target_bytes <= 0:
            raise OptionError(f"quant_target_bytes is {self.quant_target_bytes}; no model takes so little")

    @property
    def is_packed(self) -> bool:
        """Whether it asks for packed weights."""
        return self.quant is not None or self.quant_target_bytes is not None


def packed_variant(name: str, form: StoredForm) -> tuple[str, QuantSpec | SizeTarget]:
    """The name of `name` packed as `form` asks, and what that means.

    Raises:
        OptionError: it cannot be understood, packs nothing, or the name is of a packed form already.
    """
    base, variant = names.split_variant(name)
    if variant is not None:
        raise OptionError(f"{name} is packed already; give quant with {base}")
    if form.quant_target_bytes is not None:
        target = SizeTarget(form.quant_target_bytes)
        return names.variant_name(base, str(target)), target
    spec = parse_quant(form.quant or "")
    if spec.packs_nothing:
        raise OptionError(f"quant {form.quant!r} packs nothing; leave it out")
    format = spec.default
    is_plain_calibrated = str(spec) == f"{format},{CALIBRATED}"
    return names.variant_name(base, f"{format}-{CALIBRATED}" if is_plain_calibrated else str(spec)), spec


def meaning_of(variant: str) -> QuantSpec | SizeTarget | None:
    """What a variant in a model's name asks for; None if the name does not say."""
    format = variant.removesuffix(f"-{CALIBRATED}")
    if format in FORMATS and (format == variant or format in CALIBRATED_FORMATS):
        return parse_quant(variant.replace("-", ","))
    return SizeTarget.parse(variant)
