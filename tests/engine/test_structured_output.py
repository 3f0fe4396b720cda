"""An answer in a format is what masking alone would give, in fewer sweeps, in any company, however interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella_engine import (
    AnswerFormat,
    Engine,
    EngineOptions,
    FormatKind,
    Sampling,
    SequenceRequest,
    SequenceTokens,
    ShardStore,
)
from lamella_engine.errors import SequenceError
from tests.engine.engine_driver import Outcome, gather

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
SCHEMA = {
    "type": "object",
    "properties": {
        "capital": {"enum": ["Paris", "Rome", "Berlin"]},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99999},
        "is_in_europe": {"type": "boolean"},
    },
    "required": ["capital", "inhabitants", "is_in_europe"],
    "additionalProperties": False,
}
JSON = AnswerFormat(FormatKind.JSON_SCHEMA, json.dumps(SCHEMA))
DATE = AnswerFormat(FormatKind.REGEX, r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]")
CITY = AnswerFormat(FormatKind.CHOICE, json.dumps(["a river in Italy", "a river in France", 'a "mill"\n']))
SUMS = AnswerFormat(FormatKind.LARK, 'start: "sum: " NUMBER ("+" NUMBER)* " = " NUMBER "."\nNUMBER: /[0-9]{1,3}/')
FORMATS = {"json": JSON, "regex": DATE, "choice": CITY, "lark": SUMS}
PROMPT = "Paris is the capital of"
GREEDY = Sampling(max_tokens=200)


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure("tiny", source=tiny_llama_dir)
    return EngineOptions(store=root, device="cpu", max_sequences=6, sweep_tokens=48, offline=True)


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("tiny", options) as engine:
        yield engine


class Masked:
    """The full-load model, token by token under llguidance's masks: nothing is forced, nothing batched."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.tokens = from_tokenizer(self.tokenizer, n_vocab=self.model.config.vocab_size, eos_token=[2])

    def generate(self, prompt: str, grammar: str, most: int) -> list[int]:
        ids = self.tokenizer(prompt)["input_ids"]
        matcher = LLMatcher(self.tokens, grammar)
        answer: list[int] = []
        while len(answer) < most and not matcher.is_stopped():
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids + answer])).logits[0, -1]
            bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
            allowed = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: len(logits)].bool()
            token = int(logits.masked_fill(~allowed, -torch.inf).argmax())
            assert matcher.consume_token(token)
            answer.append(token)
        return answer


@pytest.fixture(scope="module")
def masked(tiny_llama_dir: Path) -> Masked:
    return Masked(tiny_llama_dir)


def grammar_of(answer_format: AnswerFormat) -> str:
    match answer_format.kind:
        case FormatKind.REGEX:
            return LLMatcher.grammar_from_regex(answer_format.source)
        case FormatKind.CHOICE:
            return LLMatcher.grammar_from_lark(
                "start: " + " | ".join(map(json.dumps, json.loads(answer_format.source)))
            )
        case FormatKind.LARK:
            return LLMatcher.grammar_from_lark(answer_format.source)
        case _:
            return LLMatcher.grammar_from_json_schema(answer_format.source or '{"type":"object"}', defaults=COMPACT)


def ask(
    engine: Engine,
    answer_format: AnswerFormat | None,
    sampling: Sampling = GREEDY,
    name: str = "s",
    prompt: str = PROMPT,
    generated: tuple[int, ...] = (),
) -> None:
    engine.submit(SequenceRequest(name, sampling, prompt=prompt, answer_format=answer_format, generated_ids=generated))


def answer(engine: Engine, answer_format: AnswerFormat | None, sampling: Sampling = GREEDY) -> Outcome:
    ask(engine, answer_format, sampling)
    return gather(engine, {"s"})["s"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_tokens_are_those_of_masking_alone_and_forced_ones_take_no_sweep(
    engine: Engine, masked: Masked, kind: str
) -> None:
    expected = masked.generate(PROMPT, grammar_of(FORMATS[kind]), 200)
    before = engine.counters()

    outcome = answer(engine, FORMATS[kind])

    after = engine.counters()
    assert outcome.token_ids == expected
    assert outcome.text == masked.tokenizer.decode(expected)
    assert outcome.finished is not None
    assert outcome.finished.reason == "stop"
    assert outcome.finished.completion_tokens == len(expected) == after.tokens - before.tokens
    if kind in ("json", "choice", "lark"):
        assert after.sweeps - before.sweeps < len(expected), "forced tokens ride along"


def test_a_schema_costs_a_sweep_for_each_decision_only(engine: Engine) -> None:
    outcome = answer(engine, JSON)

    assert outcome.finished is not None
    parsed = json.loads(outcome.text)
    assert parsed["capital"] in ("Paris", "Rome", "Berlin")
    assert isinstance(parsed["inhabitants"], int)
    assert isinstance(parsed["is_in_europe"], bool)
    assert list(parsed) == list(SCHEMA["properties"])
    assert outcome.finished.sweeps < outcome.finished.completion_tokens / 2


@pytest.mark.parametrize(
    "sampling",
    [
        dataclasses.replace(GREEDY, temperature=1.5, seed=5),
        dataclasses.replace(GREEDY, temperature=1.5, top_k=3, seed=5),
        dataclasses.replace(GREEDY, temperature=1.2, top_p=0.8, seed=6),
        dataclasses.replace(GREEDY, temperature=1.2, min_p=0.2, seed=7),
        dataclasses.replace(GREEDY, temperature=1.2, top_k=9, top_p=0.8, seed=8),
        dataclasses.replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
    ],
)
def test_every_way_of_drawing_keeps_to_the_format_and_forcing_changes_no_token(
    engine: Engine, sampling: Sampling
) -> None:
    outcome = answer(engine, JSON, sampling)

    one_by_one = answer(engine, JSON, dataclasses.replace(sampling, logprobs=0))  # with logprobs nothing is forced

    json.loads(outcome.text)
    assert outcome.token_ids == one_by_one.token_ids
    assert one_by_one.finished is not None
    assert one_by_one.finished.sweeps == len(one_by_one.token_ids)


def test_any_json_object_is_one_object(engine: Engine) -> None:
    sampling = Sampling(max_tokens=400, temperature=2.0, seed=11, logit_bias=((END_OF_STRING, 4.0),))

    outcome = answer(engine, AnswerFormat(FormatKind.JSON_OBJECT), sampling)

    assert outcome.text.startswith("{")
    if outcome.finished is not None and outcome.finished.reason == "stop":
        assert isinstance(json.loads(outcome.text), dict)


END_OF_STRING = 6 + 1 + ord('"') - ord("!")  # the byte-level alphabet follows seven special tokens


def test_formats_and_plain_texts_share_sweeps_and_none_changes_another(engine: Engine) -> None:
    plain = dataclasses.replace(GREEDY, max_tokens=40, ignore_eos=True)
    random = dataclasses.replace(plain, temperature=1.0, seed=3)
    alone = {kind: answer(engine, each) for kind, each in FORMATS.items()}
    alone |= {"plain": answer(engine, None, plain), "random": answer(engine, None, random)}

    for kind, each in FORMATS.items():
        ask(engine, each, name=kind)
    ask(engine, None, plain, name="plain")
    ask(engine, None, random, name="random")
    together = gather(engine, set(alone))

    assert {name: each.token_ids for name, each in together.items()} == {
        name: each.token_ids for name, each in alone.items()
    }
    assert {name: each.text for name, each in together.items()} == {name: each.text for name, each in alone.items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_answer_goes_on_from_every_token_as_if_nothing_had_happened(engine: Engine, kind: str) -> None:
    whole = answer(engine, FORMATS[kind])

    for count in range(1, len(whole.token_ids), 3):
        ask(engine, FORMATS[kind], name=str(count), generated=tuple(whole.token_ids[:count]))
        rest = gather(engine, {str(count)})[str(count)]

        assert whole.token_ids[:count] + rest.token_ids == whole.token_ids
        assert whole.text.endswith(rest.text)
        assert rest.first_position == count


def test_an_answer_that_was_complete_ends_without_a_token(engine: Engine) -> None:
    whole = answer(engine, CITY)

    ask(engine, CITY, generated=tuple(whole.token_ids))
    rest = gather(engine, {"s"})["s"]

    assert rest.token_ids == []
    assert rest.finished is not None
    assert rest.finished.reason == "stop"


def test_tokens_of_another_answer_are_refused(engine: Engine) -> None:
    with pytest.raises(SequenceError, match="cannot go on in its response format") as caught:
        ask(engine, DATE, generated=(20, 21, 22))

    assert caught.value.code == "response_format_stuck"


@pytest.mark.parametrize("most", [1, 2, 3, 5, 9, 14])
def test_max_tokens_cuts_an_answer_where_it_is(engine: Engine, most: int) -> None:
    whole = answer(engine, JSON)

    cut = answer(engine, JSON, dataclasses.replace(GREEDY, max_tokens=most))

    assert cut.token_ids == whole.token_ids[:most]
    assert whole.text.startswith(cut.text)
    assert cut.finished is not None
    assert cut.finished.reason == "length"


def test_an_answer_with_no_choice_at_all_is_told_before_it_ends(engine: Engine, masked: Masked) -> None:
    only = AnswerFormat(FormatKind.CHOICE, json.dumps(["the only answer there is"]))
    before = engine.counters().sweeps

    outcome = answer(engine, only)

    assert outcome.text == "the only answer there is"
    assert outcome.finished is not None
    assert (outcome.finished.reason, outcome.finished.completion_tokens) == ("stop", len(outcome.token_ids))
    assert engine.counters().sweeps == before


def test_a_stop_string_ends_an_answer_within_forced_tokens(engine: Engine) -> None:
    outcome = answer(engine, JSON, dataclasses.replace(GREEDY, stop=("habit",)))

    assert outcome.text.endswith('"in')
    assert outcome.finished is not None
    assert outcome.finished.reason == "stop"


def test_a_cancelled_answer_has_told_of_every_token(engine: Engine) -> None:
    endless = AnswerFormat(FormatKind.REGEX, "yes, [a-z ]*")
    ask(engine, endless, dataclasses.replace(GREEDY, max_tokens=400, logit_bias=((2, -100.0),)))
    for batch in engine.events(poll_s=0.1):
        if any(isinstance(event, SequenceTokens) for event in batch.events):
            first = next(event for event in batch.events if isinstance(event, SequenceTokens))
            break

    engine.cancel("s")
    rest = gather(engine, {"s"})["s"]

    assert first.position == 0
    assert first.text.startswith("yes,")
    assert rest.finished is not None
    assert rest.finished.completion_tokens == len(first.token_ids) + len(rest.token_ids)


def test_samples_of_one_prompt_each_find_their_own_way(engine: Engine) -> None:
    sampling = dataclasses.replace(GREEDY, temperature=1.5, seed=4)
    single = answer(engine, JSON, sampling)

    engine.submit(SequenceRequest("many", sampling, prompt=PROMPT, answer_format=JSON, num_samples=4))
    texts: dict[int, str] = {}
    ends = 0
    for batch in engine.events(poll_s=0.1):
        for event in batch.events:
            if isinstance(event, SequenceTokens):
                texts[event.sample] = texts.get(event.sample, "") + event.text
            ends += type(event).__name__ == "SequenceFinished"
        if ends == 4:
            break

    assert texts[0] == single.text
    assert len(set(texts.values())) > 1
    assert all(json.loads(text)["capital"] for text in texts.values())


def test_preempted_answers_keep_their_formats(options: EngineOptions, engine: Engine) -> None:
    long = AnswerFormat(FormatKind.REGEX, "([a-z]{1,6}, and then ){9}the end")
    names = {str(index): (JSON, long)[index % 2] for index in range(6)}
    alone = {name: answer(engine, each).token_ids for name, each in names.items()}
    with Engine.open("tiny", dataclasses.replace(options, kv_tokens=192)) as short:
        for name, each in names.items():
            ask(short, each, name=name)
        together = gather(short, set(names))

        assert short.counters().preemptions > 0
    assert {name: each.token_ids for name, each in together.items()} == alone


@pytest.mark.parametrize(
    ("answer_format", "says"),
    [
        (AnswerFormat(FormatKind.JSON_SCHEMA, '{"type": "wat"}'), "wat"),
        (AnswerFormat(FormatKind.JSON_SCHEMA, '{"properties": {"a": {"not": {}}}}'), "not"),
        (AnswerFormat(FormatKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:9/x.json"}'), "does not fetch"),
        (AnswerFormat(FormatKind.JSON_SCHEMA, "[1]"), "object"),
        (AnswerFormat(FormatKind.JSON_SCHEMA, "false"), "cannot be enforced"),
        (AnswerFormat(FormatKind.JSON_SCHEMA, "{"), "Expecting"),
        (AnswerFormat(FormatKind.REGEX, "(a"), "unclosed"),
        (AnswerFormat(FormatKind.REGEX, "(?=a)b"), "look"),
        (AnswerFormat(FormatKind.LARK, "start: x y"), "unknown name"),
        (AnswerFormat(FormatKind.LARK, ""), "Empty grammar"),
        (AnswerFormat(FormatKind.JSON_SCHEMA, '{"items":' * 5000 + "{}" + "}" * 5000), "recursion"),
    ],
)
def test_a_format_that_cannot_be_enforced_is_refused_with_the_reason(
    engine: Engine, answer_format: AnswerFormat, says: str
) -> None:
    with pytest.raises(SequenceError, match=says) as caught:
        ask(engine, answer_format)

    assert caught.value.code == "bad_response_format"
    assert "s" not in engine._live


def test_a_format_that_grows_too_large_ends_its_own_answer_only(engine: Engine) -> None:
    plain = dataclasses.replace(GREEDY, max_tokens=60, ignore_eos=True)
    alone = answer(engine, None, plain)

    ask(engine, AnswerFormat(FormatKind.REGEX, "(.{1,1000}){1,1000}"), name="large")
    ask(engine, None, plain, name="plain")
    outcomes = gather(engine, {"large", "plain"})

    large = outcomes["large"].finished
    assert large is not None
    assert (large.reason, large.error_code) == ("error", "response_format_stuck")
    assert "too many" in (large.error or "")
    assert outcomes["plain"].token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("answer_format", "text"),
    [
        (
            AnswerFormat(FormatKind.JSON_SCHEMA, '{"const": "an <|end|> and a \\u003c|user|>"}'),
            '"an <|end|> and a <|user|>"',
        ),
        (AnswerFormat(FormatKind.CHOICE, '["an <|end|> and more"]'), "an <|end|> and more"),
        (AnswerFormat(FormatKind.REGEX, r"an <\|end\|>/more"), "an <|end|>/more"),
        (AnswerFormat(FormatKind.LARK, 'start: "an <|end|> and more"'), "an <|end|> and more"),
    ],
)
def test_text_that_looks_like_a_special_token_is_written_as_text(
    engine: Engine, answer_format: AnswerFormat, text: str
) -> None:
    outcome = answer(engine, answer_format)

    assert outcome.text == text
    assert outcome.finished is not None
    assert outcome.finished.reason == "stop"
    assert END_TOKEN not in outcome.token_ids


END_TOKEN = 2


def test_a_model_without_a_tokenizer_has_no_formats(options: EngineOptions, tiny_checkpoint: object) -> None:
    assert callable(tiny_checkpoint)
    ShardStore(options.store).ensure("bare", source=tiny_checkpoint("llama"))
    with Engine.open("bare", options) as bare, pytest.raises(SequenceError) as caught:
        bare.submit(SequenceRequest("s", GREEDY, prompt_ids=(5, 6), answer_format=JSON))

    assert caught.value.code == "response_format_unsupported"
