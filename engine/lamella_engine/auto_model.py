"""`AutoModel`: one model in one Python process, without Redis or workers, in the calls that airllm users know.

A script written for airllm runs with its import line changed. What is not effective yet is refused, never ignored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lamella_engine.device import resolve_device
from lamella_engine.engine import Engine
from lamella_engine.errors import EngineError, OptionError, SequenceError
from lamella_engine.options import EngineOptions
from lamella_engine.peer_address import Peers
from lamella_engine.sequence_types import FinishReason, Sampling, SequenceFinished, SequenceRequest, SequenceTokens
from lamella_engine.shard_store import ShardStore, default_store_root
from lamella_engine.stored_form import StoredForm
from lamella_engine.sweep_profile import SweepProfile, plain_console, profile_table

GENERATE_SEED = 0
COMPRESSIONS = {"4bit": "nf4", "8bit": "int8"}  # the words that users of AirLLM know


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns with ``return_dict_in_generate=True``: `sequences`, int64 [batch, length]."""

    sequences: torch.Tensor


class AutoModel:
    """A streamed model with a transformers-like `generate`; close it with `close` or a ``with`` block.

    Attributes:
        tokenizer: the model's transformers tokenizer, or None if it ships none.
        engine: the engine underneath.
        profiling_mode: print after each `generate` what its sweeps moved and what their time went to.
    """

    def __init__(self, engine: Engine, *, profiling_mode: bool = False) -> None:
        self.engine = engine
        self.profiling_mode = profiling_mode
        self.tokenizer = engine.codec.tokenizer if engine.codec is not None else None
        self._calls = 0
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - the argument list is airllm's
        cls,
        path_or_id: str | Path,
        compression: str | None = None,
        layer_shards_saving_path: str | Path | None = None,
        hf_token: str | None = None,
        prefetching: bool = True,
        delete_original: bool = False,
        profiling_mode: bool = False,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        vram: int | str = "auto",
        ram: int | str = "auto",
    ) -> AutoModel:
        """Open a checkpoint directory, a ``.gguf`` file, a model of the store or a hub id.

        Args:
            path_or_id: what to open.
            compression: ``"4bit"`` (nf4), ``"8bit"`` (int8), or packed formats as `quant_spec` reads them; None leaves
                weights as they are stored.
            layer_shards_saving_path: directory of the shard cache; None means the usual one.
            hf_token: hub access token; None means the usual places.
            prefetching: must be True, reading ahead is how the engine works.
            delete_original: once the shards are checked, delete the weight files they were built from: those of the
                directory or file `path_or_id`, or of the hub's download cache. Never if that would lose anything.
            profiling_mode: print a table to standard output after each `generate`: bytes from each tier and seconds of
                reading, copying, computing and waiting, a sweep, and tokens a second.
            device: ``cpu``, ``cuda:0``, ...; None means the first GPU, else the CPU.
            dtype: compute type, such as ``"bfloat16"`` or ``torch.bfloat16``; None means the stored type.
            vram, ram: budgets, as in `EngineOptions`: bytes, ``"4GiB"``, ``"80%"`` or ``"auto"``.

        Raises:
            OptionError: an argument that is not supported, or does not go with another.
            ModelError: the model cannot be had or cannot run.
        """
        if not prefetching:
            raise OptionError("prefetching=False is not supported: reading ahead is how the engine works; leave it out")
        if compression is not None and delete_original:
            raise OptionError(
                "delete_original does not go with compression: packed weights do not hold all of the original"
            )
        root = Path(layer_shards_saving_path).expanduser() if layer_shards_saving_path else default_store_root()
        options = EngineOptions(
            store=root,
            device=device or "auto",
            dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
            hub_token=hf_token,
            vram=vram,
            ram=ram,
        )
        store = ShardStore(root, peers=Peers.from_environment())
        quant = None if compression is None else COMPRESSIONS.get(compression, compression)
        sharded = store.ensure(path_or_id, form=StoredForm(quant=quant), hub_token=hf_token)
        if delete_original:
            store.delete_original(sharded.name, Path(path_or_id))
        engine = Engine.open_sharded(sharded, resolve_device(options.device), options)
        return cls(engine, profiling_mode=profiling_mode)

    def __enter__(self) -> AutoModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; idempotent."""
        self.engine.close()

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 20,
        use_cache: bool = True,
        return_dict_in_generate: bool = False,
        num_return_sequences: int = 1,
        **sampling: Any,
    ) -> torch.Tensor | GenerateOutput:
        """Generate for a batch of prompts; all of them ride the same sweeps.

        Args:
            input_ids: int64 [batch, length]; padding is told by `attention_mask`, or by the tokenizer's pad token
                where that is not also an end token (as transformers does).
            attention_mask: [batch, length], 0 where padded.
            max_new_tokens: tokens to generate at most.
            use_cache: must be True, the engine always keeps keys and values.
            return_dict_in_generate: return a `GenerateOutput` instead of the tensor.
            num_return_sequences: samples of each prompt, which is read once; above 1 only with ``do_sample=True``.
            **sampling: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
                ``seed``, ``stop_strings``; without ``do_sample=True`` decoding is greedy.

        Returns:
            int64 [batch * num_return_sequences, length + new]: each row its input and its new tokens, padded at the
            end; the samples of a prompt follow each other.

        Raises:
            OptionError: an unknown or unusable argument.
            SequenceError: a prompt that cannot run.
        """
        if not use_cache:
            raise OptionError("use_cache=False is not supported; the engine always keeps keys and values")
        if input_ids.dim() != 2 or not input_ids.shape[0]:
            raise OptionError(f"input_ids has shape {list(input_ids.shape)}; give [batch, length]")
        params = _sampling(max_new_tokens, sampling)
        self._check_samples(num_return_sequences, params)
        prompts = self._prompts(input_ids, attention_mask)
        with self._lock:
            run = self._run_profiled if self.profiling_mode else self._run
            generated = run(prompts, params, num_return_sequences)
        longest = max(len(tokens) for tokens in generated)
        pad = self._pad_token()
        rows = [
            row.tolist() + tokens + [pad] * (longest - len(tokens))
            for row, tokens in zip(input_ids.repeat_interleave(num_return_sequences, 0), generated, strict=True)
        ]
        sequences = torch.tensor(rows, dtype=torch.int64, device=input_ids.device)
        return GenerateOutput(sequences) if return_dict_in_generate else sequences

    def _check_samples(self, num_samples: int, params: Sampling) -> None:
        most = self.engine.facts.max_sequences
        if not 1 <= num_samples <= most:
            raise OptionError(
                f"num_return_sequences is {num_samples}; it must be between 1 and {most}, what the engine runs side by "
                "side. For more, call generate again with another seed."
            )
        if num_samples > 1 and params.temperature == 0:
            raise OptionError(
                f"num_return_sequences is {num_samples}, but greedy decoding has one answer; "
                "pass do_sample=True (and a temperature above 0), or leave it at 1"
            )

    def _prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
        mask = attention_mask
        if mask is None:
            pad = getattr(self.tokenizer, "pad_token_id", None)
            if pad is None or pad in self.engine.end_token_ids:
                mask = torch.ones_like(input_ids)
            else:
                mask = input_ids.ne(int(pad))
        if mask.shape != input_ids.shape:
            raise OptionError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
        return [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]

    def _pad_token(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is not None:
            return int(pad)
        return min(self.engine.end_token_ids, default=0)

    def _run_profiled(self, prompts: list[list[int]], params: Sampling, num_samples: int) -> list[list[int]]:
        before, began_s = self.engine.counters(), time.perf_counter()
        generated = self._run(prompts, params, num_samples)
        seconds = time.perf_counter() - began_s
        profile = SweepProfile.between(before, self.engine.counters())
        tokens = sum(map(len, generated))
        title = f"generate: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s; a sweep"
        plain_console().print(profile_table([(len(generated), profile)], title))
        return generated

    def _run(self, prompts: list[list[int]], params: Sampling, num_samples: int) -> list[list[int]]:
        self._calls += 1
        ids = [f"generate-{self._calls}-{row}" for row in range(len(prompts))]
        generated: dict[tuple[str, int], list[int]] = {
            (name, index): [] for name in ids for index in range(num_samples)
        }
        pending = set(generated)
        try:
            for sequence_id, prompt in zip(ids, prompts, strict=True):
                self.engine.submit(
                    SequenceRequest(sequence_id, params, prompt_ids=tuple(prompt), num_samples=num_samples)
                )
            self._collect(generated, pending)
        except BaseException:
            for sequence_id in {name for name, _ in pending}:
                self.engine.cancel(sequence_id)
            raise
        return list(generated.values())

    def _collect(self, generated: dict[tuple[str, int], list[int]], pending: set[tuple[str, int]]) -> None:
        for batch in self.engine.events():
            for event in batch.events:
                if (
                    not isinstance(event, SequenceTokens | SequenceFinished)
                    or (event.sequence_id, event.sample) not in generated
                ):
                    continue  # no token yet, or a leftover of an earlier call that was interrupted
                key = (event.sequence_id, event.sample)
                if isinstance(event, SequenceTokens):
                    generated[key].extend(event.token_ids)
                    continue
                pending.discard(key)
                if event.reason is FinishReason.ERROR:
                    raise SequenceError(event.error_code or "engine", event.error or "the sequence failed")
            if not pending:
                return
        raise EngineError("the engine was closed while generating")


def _sampling(max_new_tokens: int, given: Mapping[str, Any]) -> Sampling:
    known = (
        "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop_strings"
    )  # fmt: skip
    if unknown := sorted(set(given) - set(known)):
        raise OptionError(f"generate does not know {', '.join(unknown)}; it knows {', '.join(known)}")
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    is_random = bool(given.get("do_sample", False))
    stop: str | Iterable[str] = given.get("stop_strings") or ()
    return Sampling(
        max_tokens=max_new_tokens,
        temperature=float(given.get("temperature", 1.0)) if is_random else 0.0,
        top_k=given.get("top_k") or None if is_random else None,
        top_p=float(given.get("top_p", 1.0)) if is_random else 1.0,
        min_p=float(given.get("min_p") or 0.0) if is_random else 0.0,
        repetition_penalty=float(given.get("repetition_penalty", 1.0)),
        seed=int(given.get("seed", GENERATE_SEED)) if is_random else None,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
