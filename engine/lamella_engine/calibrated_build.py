"""Shards whose codes are chosen for a text: layer after layer is measured, packed, and passed as it was packed.

Owns the order of these steps and the model they are measured on. `shard_builder` asks for one layer at a time and
writes it; a build that was killed has the text pass the layers that are written already.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lamella_engine import architecture
from lamella_engine.alibi import slopes_of
from lamella_engine.binding import TORCH_DTYPES
from lamella_engine.build_plan import PlannedShard
from lamella_engine.calibration_text import CalibrationText
from lamella_engine.compute_dtype import choose_dtype
from lamella_engine.convert import ModelPlan, ShardPlan
from lamella_engine.errors import CheckpointError, OptionError
from lamella_engine.kv_shape import context_tokens
from lamella_engine.layer_inputs import LayerInputs
from lamella_engine.packed_shard import read_unpacked
from lamella_engine.quant_spec import FULL
from lamella_engine.text import load_codec
from lamella_engine.weight_source import Conversion

logger = logging.getLogger(__name__)


class CalibratedBuild:
    """The layers of one model, on their way into packed shards.

    Args:
        text: what the codes are chosen for.
        built: the model, on the meta device, of the config that the shards will have.
        plan: what makes its weights.
        directory: where the model's tokenizer lies.
        device: where it is measured and packed.

    Raises:
        CheckpointError: the model has no tokenizer, or not its own.
        OptionError: the text is too short, or the model cannot be run on its own.
    """

    def __init__(
        self,
        text: CalibrationText,
        built: architecture.Architecture,
        plan: ModelPlan,
        directory: Path,
        device: torch.device,
    ) -> None:
        if slopes_of(built.config) is not None:
            raise OptionError(
                f"quant: {built.family} models add linear position biases outside their modules, so their "
                "layers' inputs cannot be measured; leave 'calibrated' out"
            )
        codec = load_codec(directory)
        if codec is None:
            raise CheckpointError(
                "quant: the model has no tokenizer, so no text can be brought to its tokens; add tokenizer.json or "
                "tokenizer.model to the source, or leave 'calibrated' out"
            )
        windows = text.windows(codec.tokenizer, int(built.config.vocab_size), context_tokens(built.config))
        dtype = choose_dtype(None, _stored_dtype(plan), device, built.family)
        self._inputs = LayerInputs(architecture.build(built.model.config, dtype), plan, windows, device)
        logger.info("choosing codes for %d tokens in windows of %d", windows.numel(), windows.shape[1])

    def measured(self, index: int, shard: PlannedShard) -> PlannedShard:
        """The shard of layer `index` with what its matrices are given, and its weights in memory."""
        assert shard.packing is not None, "only packed shards are calibrated"
        weights = _native(shard.plan)
        wanted = [
            tensor.name
            for tensor in shard.plan.tensors
            if (chosen := shard.packing.format_for(tensor)) != FULL and shard.packing.spec.is_calibrated(chosen)
        ]
        inputs = self._inputs.measure(index, weights, wanted)
        left = [name for name in wanted if name not in inputs]
        if left:
            logger.info(
                "layer %d: %s are no matrices that the text came to; their codes are chosen for the weights alone",
                index,
                ", ".join(left[:3]) + (", ..." if len(left) > 3 else ""),
            )
        prefix = shard.plan.prefix
        targets = tuple(target for conversion in shard.plan.conversions for target in conversion.targets)
        whole = Conversion(targets, tuple(weights), lambda: {prefix + name: value for name, value in weights.items()})
        return replace(shard, plan=ShardPlan(prefix, (whole,)), packing=replace(shard.packing, inputs=inputs))

    def go_on(self, index: int, path: Path) -> None:
        """Have the text pass layer `index` as it is written in `path`."""
        self._inputs.go_on(index, read_unpacked(path))


def _native(plan: ShardPlan) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for conversion in plan.conversions:
        made |= {name.removeprefix(plan.prefix): value for name, value in conversion.run().items()}
    return made


def _stored_dtype(plan: ModelPlan) -> torch.dtype:
    """The type that most tensors of the layers are stored in."""
    words = Counter(tensor.dtype for layer in plan.layers for tensor in layer.tensors)
    return TORCH_DTYPES[words.most_common(1)[0][0]]
