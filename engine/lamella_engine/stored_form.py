"""How a model is to be stored, beyond its type: copied or in place, in full precision or packed.

Plain values and the rules between them; `shard_store` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella_engine import names
from lamella_engine.errors import OptionError
from lamella_engine.quant_spec import QuantSpec, parse_quant


@dataclass(frozen=True)
class StoredForm:
    """What `ShardStore.ensure` makes of a model.

    Attributes:
        in_place: leave layers in the source's files where they lie there as they are needed, instead of a copy.
        quant: packed formats, as `quant_spec` reads them; the model's name then gets a variant, such as ``~int8``.
        quant_device: what packs: ``cpu``, ``cuda:N``, or ``auto``, a GPU if there is one.
    """

    in_place: bool = False
    quant: str | None = None
    quant_device: str = "auto"

    def __post_init__(self) -> None:
        if self.quant is not None and self.in_place:
            raise OptionError(
                "packed weights are files of their own and cannot be read in place; leave one of the two out"
            )


def packed_variant(name: str, quant: str) -> tuple[str, QuantSpec]:
    """The name of `name` packed as `quant` says, and what that means.

    Raises:
        OptionError: it cannot be understood, packs nothing, or the name is of a packed form already.
    """
    base, variant = names.split_variant(name)
    if variant is not None:
        raise OptionError(f"{name} is packed already; give quant with {base}")
    spec = parse_quant(quant)
    if spec.packs_nothing:
        raise OptionError(f"quant {quant!r} packs nothing; leave it out")
    return names.variant_name(base, str(spec)), spec
