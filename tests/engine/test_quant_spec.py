"""What people may write to choose packed formats, which tensor then gets which, and what they are told otherwise."""

from __future__ import annotations

import pytest

from lamella_engine.errors import OptionError
from lamella_engine.quant_spec import FULL, KINDS, QuantSpec, Rule, TensorName, parse_quant

Q = TensorName("self_attn.q_proj.weight", (64, 64), 2)
Q_BIAS = TensorName("self_attn.q_proj.bias", (64,), 2)
GATE_PROJ = TensorName("mlp.gate_proj.weight", (128, 64), 3)
NORM = TensorName("input_layernorm.weight", (64,), 3)
Q_NORM = TensorName("self_attn.q_norm.weight", (16,), 3)
GPT2_NORM = TensorName("ln_1.weight", (64,), 0)
ROUTER = TensorName("mlp.gate.weight", (8, 64), 5)
OTHER_ROUTER = TensorName("block_sparse_moe.router.layer.weight", (8, 64), 5)
SHARED_GATE = TensorName("mlp.shared_expert_gate.weight", (1, 64), 5)
EXPERTS = TensorName("mlp.experts.gate_up_proj", (8, 64, 128), 5)
EXPERTS_BIAS = TensorName("mlp.experts.gate_up_proj_bias", (8, 128), 5)
CONVOLUTION = TensorName("mamba.conv1d.weight", (256, 1, 4), 1)
STATE = TensorName("mamba.A_log", (256, 16), 1)
SINKS = TensorName("self_attn.sinks", (64,), 1)
HEAD = TensorName("lm_head.weight", (1000, 64))
EMBEDDING = TensorName("model.embed_tokens.weight", (1000, 64))
TIED = TensorName("model.embed_tokens.weight", (1000, 64), None, "lm_head.weight")
POSITIONS = TensorName("transformer.wpe.weight", (512, 64))
LAST_NORM = TensorName("model.norm.weight", (64,))
PROJECTION = TensorName("model.decoder.project_in.weight", (64, 32))

MATRICES = [Q, GATE_PROJ, EXPERTS]
STAYING = [
    Q_BIAS, NORM, Q_NORM, GPT2_NORM, ROUTER, OTHER_ROUTER, SHARED_GATE, EXPERTS_BIAS, CONVOLUTION, STATE, SINKS, HEAD,
    EMBEDDING, POSITIONS, LAST_NORM, PROJECTION,
]  # fmt: skip
MODEL = [*MATRICES, *STAYING]


def path(tensor: TensorName) -> str:
    return tensor.path


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "lossless"])
def test_one_word_packs_the_matrices_of_the_layers_and_nothing_else(format: str) -> None:
    spec = parse_quant(format)

    assert {spec.format_for(tensor) for tensor in MATRICES} == {format}
    assert {spec.format_for(tensor) for tensor in STAYING} == {FULL}
    assert not spec.packs_nothing


@pytest.mark.parametrize("text", ["full", "bf16", "BF16", "layers.0-3=bf16", "lm_head=full"])
def test_full_precision_packs_nothing(text: str) -> None:
    spec = parse_quant(text)

    assert spec.packs_nothing
    assert {spec.format_for(tensor) for tensor in MODEL} == {FULL}


def test_the_example_of_the_messages_means_what_it_says() -> None:
    spec = parse_quant("int8,layers.0-3=bf16,lm_head=bf16")

    assert spec == QuantSpec("int8", (Rule("layers.0-3", FULL), Rule("lm_head", FULL)))
    assert [spec.format_for(TensorName(Q.name, Q.shape, layer)) for layer in (0, 3, 4, 30)] == [
        FULL,
        FULL,
        "int8",
        "int8",
    ]
    assert spec.format_for(HEAD) == FULL


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("layers", MATRICES),
        ("layers.2", [Q]),
        ("layers.2-3", [Q, GATE_PROJ]),
        ("layers.*.mlp", [GATE_PROJ, EXPERTS]),
        ("mlp", [GATE_PROJ, EXPERTS]),
        ("*_proj", [Q, GATE_PROJ, EXPERTS]),
        ("q_proj", [Q]),
        ("layers.2.self_attn.q_proj.weight", [Q]),
        ("self_attn", [Q]),
        ("q_proj.bias", [Q_BIAS]),
        ("bias", [Q_BIAS]),
        ("*bias", [Q_BIAS, EXPERTS_BIAS]),
        ("biases", [Q_BIAS, EXPERTS_BIAS]),
        ("input_layernorm", [NORM]),
        ("layers.3.input_layernorm", [NORM]),
        ("norms", [NORM, Q_NORM, GPT2_NORM, LAST_NORM]),
        ("mlp.gate", [ROUTER]),
        ("routers", [ROUTER, OTHER_ROUTER, SHARED_GATE]),
        ("router", [OTHER_ROUTER]),
        ("conv1d", [CONVOLUTION]),
        ("sinks", [SINKS]),
        ("A_log", [STATE]),
        ("lm_head", [HEAD]),
        ("embeddings", [EMBEDDING, POSITIONS]),
        ("embed_tokens", [EMBEDDING]),
        ("model.embed_tokens", [EMBEDDING]),
        ("model.norm", [LAST_NORM]),
        ("project_in", [PROJECTION]),
        ("model", []),
        ("layers.7", []),
        ("laye", []),
        ("gate_up", []),
    ],
)
def test_a_place_names_these_tensors(place: str, named: list[TensorName]) -> None:
    spec = parse_quant(f"{place}=int8")

    assert [path(tensor) for tensor in MODEL if spec.format_for(tensor) == "int8"] == [
        path(tensor) for tensor in MODEL if tensor in named
    ]


def test_the_last_rule_that_names_a_tensor_counts() -> None:
    spec = parse_quant("nf4,mlp=int8,layers.5=lossless,experts=fp4")

    assert [spec.format_for(tensor) for tensor in MATRICES] == ["nf4", "int8", "fp4"]
    assert parse_quant("experts=fp4,layers.5=lossless").format_for(EXPERTS) == "lossless"


def test_one_meaning_has_one_text() -> None:
    texts = ["int8,layers.0-3=bf16", " INT8 , layers.0-3 = full ", "layers.0-3=Full,int8"]

    assert {str(parse_quant(text)) for text in texts} == {"int8,layers.0-3=full"}
    assert parse_quant(str(parse_quant(texts[1]))) == parse_quant(texts[0])


@pytest.mark.parametrize(
    ("text", "part", "reason"),
    [
        ("", "''", "a format is missing"),
        ("int9", "'int9'", "'int9' is no format"),
        ("int8,layers.0=int4", "'layers.0=int4'", "'int4' is no format"),
        ("int8,nf4", "'nf4'", "'int8' is the format of everything already; write PLACE=nf4"),
        ("int8,", "''", "a format is missing"),
        ("layers.0=", "'layers.0='", "a format is missing"),
        ("=nf4", "'=nf4'", "a place is missing"),
        ("layers.5-3=nf4", "'layers.5-3=nf4'", "the range 5-3 ends before it begins"),
        ("layers..3=nf4", "'layers..3=nf4'", "'' is no part of a tensor's name"),
        ("la yers=nf4", "'la yers=nf4'", "'la yers' is no part"),
        ("a=b=nf4", "'a=b=nf4'", "'a=b' is no part"),
        ("layers.[0-3]=nf4", "'layers.[0-3]=nf4'", "is no part"),
        ("q_proj=nf4,int8,q_proj=fp4", "'q_proj=fp4'", "'q_proj' is given twice"),
    ],
)
def test_what_cannot_be_understood_is_named_with_the_formats_and_an_example(text: str, part: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_quant(text)

    message = str(caught.value)
    assert message.startswith(f"quant: {part} in {text!r} cannot be understood: ")
    assert reason in message
    assert "nf4, fp4, int8, lossless" in message
    assert "for example 'int8,layers.0-3=bf16,lm_head=bf16'" in message


def test_rules_that_fit_the_model_pass() -> None:
    parse_quant("int8,layers.0-5=nf4,norms=bf16,lm_head=fp4,mlp.gate=int8").check_against(MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_the_model_lacks_may_stay_in_full_precision(kind: str) -> None:
    parse_quant(f"int8,{kind}=bf16").check_against([Q])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf4,layers.0-9=int8", r"'layers.0-9=int8' names layer 9, and the model's layers are 0 to 5"),
        ("nf4,layers.6.mlp=int8", r"'layers.6.mlp=int8' names layer 6"),
        ("nf4,qproj=int8", r"'qproj=int8' names no tensor of the model.*layers\.2\.self_attn\.q_proj\.weight"),
        (
            "nf4,model=int8",
            r"'model=int8' names no tensor that is packed without being named itself.*model\.embed_tokens",
        ),
    ],
)
def test_rules_that_would_do_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_quant(text).check_against(MODEL)


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "head", "language_model.lm_head"])
def test_a_head_is_one_whatever_a_family_calls_it(name: str) -> None:
    head = TensorName(f"{name}.weight", (1000, 64))

    assert parse_quant("lm_head=nf4").format_for(head) == "nf4"
    assert parse_quant("int8").format_for(head) == FULL


@pytest.mark.parametrize("place", ["lm_head", "embeddings", "embed_tokens", "model.embed_tokens", "lm_head.weight"])
def test_a_head_that_is_the_embedding_is_packed_by_either_name(place: str) -> None:
    spec = parse_quant(f"int8,{place}=nf4")

    spec.check_against([Q, TIED])
    assert spec.format_for(TIED) == "nf4"


@pytest.mark.parametrize("quant", ["nf4,lm_head=int8,embed_tokens=int8", "int8,lm_head=bf16", "int8,embeddings=full"])
def test_rules_for_both_names_of_one_weight_may_agree(quant: str) -> None:
    spec = parse_quant(quant)

    spec.check_against([Q, TIED])
    assert spec.format_for(TIED) == ("int8" if quant.startswith("nf4") else FULL)


@pytest.mark.parametrize("quant", ["int8,lm_head=int8,embed_tokens=nf4", "int8,embeddings=nf4,lm_head=bf16"])
def test_rules_that_contradict_each_other_for_one_weight_are_refused(quant: str) -> None:
    with pytest.raises(OptionError, match=r"are for one weight: the model's head is its embedding.*one of them"):
        parse_quant(quant).format_for(TIED)


def test_a_kind_that_the_model_lacks_cannot_be_packed() -> None:
    with pytest.raises(OptionError, match="the model has no routers"):
        parse_quant("routers=int8").check_against([Q])
    with pytest.raises(OptionError, match="the model has no lm_head"):
        parse_quant("lm_head=int8").check_against([Q, EMBEDDING])
