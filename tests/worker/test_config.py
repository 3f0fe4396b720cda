"""Settings: where they come from, and what is said about those that cannot work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lamella.errors import ConfigError
from lamella_worker.config import WorkerConfig, load_config

MODEL: dict[str, object] = {"worker.model": "owner/name"}


def write(directory: Path, text: str) -> Path:
    path = directory / "worker.toml"
    path.write_text(text)
    return path


def complaint(path: Path | None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags or {}, environ or {})
    return str(caught.value)


def test_defaults_are_complete_but_for_the_model() -> None:
    config = load_config(None, MODEL, {})

    assert config.redis.url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert config.worker.device == "auto"
    assert config.slots == config.engine.max_sequences == 8
    assert config.engine.store == Path("~/.cache/lamella/shards").expanduser()


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    path = write(
        tmp_path, '[redis]\nurl = "redis://file:1/0"\nprefix = "f:"\n[worker]\nmodel = "m"\n[engine]\nstore = "/file"\n'
    )
    environ = {"LAMELLA_REDIS_URL": "redis://env:2/0", "LAMELLA_STORE": "/env"}

    config = load_config(path, {"redis.url": "redis://flag:3/0"}, environ)

    assert config.redis.url.get_secret_value() == "redis://flag:3/0"
    assert config.engine.store == Path("/env")
    assert config.redis.prefix == "f:"
    assert config.worker.lease_s == 10.0


def test_an_empty_environment_variable_counts_as_unset() -> None:
    config = load_config(None, MODEL, {"LAMELLA_REDIS_URL": "", "LAMELLA_STORE": ""})

    assert config.redis.url.get_secret_value() == "redis://127.0.0.1:6379/0"


def test_the_settings_cannot_be_changed_afterwards() -> None:
    config = load_config(None, MODEL, {})

    with pytest.raises(ValueError, match="frozen"):
        config.worker.model = "other"  # type: ignore[misc]  # that it is frozen is what is tested


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[worker]\nmodle = 'x'\n", "did you mean worker.model?"),
        ("[redi]\nurl = 'x'\n", "did you mean [redis]?"),
        ("[worker]\nmodel = 'm'\nstore = '/x'\n", "belongs to the table [engine]"),
        ("store = '/x'\n[worker]\nmodel = 'm'\n", "belongs to the table [engine]"),
        ("[worker]\nmodel = 'm'\nzzz = 1\n", "known here: worker.model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)

    message = complaint(path)

    assert str(path) in message
    assert said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.max_sequences", "0"),
        ("engine.max_sequences", '"8"'),
        ("engine.max_sequences", "true"),
        ("engine.vram", "true"),
        ("engine.kv_tokens", "3"),
        ("engine.dtype", '"int8"'),
        ("engine.offline", '"yes"'),
        ("engine.store", '""'),
        ("engine.store", "7"),
        ("worker.device", '"gpu"'),
        ("worker.device", '"cuda"'),
        ("worker.model", '"../secret"'),
        ("worker.model", '"/etc/passwd"'),
        ("worker.name", '"a b"'),
        ("worker.lease_s", "0"),
        ("worker.lease_s", "nan"),
        ("worker.max_attempts", "0"),
        ("redis.prefix", '"*"'),
        ("redis.prefix", '""'),
        ("redis.url", '"amqp://host"'),
        ("redis.url", '"unix://relative/path"'),
        ("redis.url", '"redis://host:port/0"'),
        ("redis.url", '"redis://host/zero"'),
    ],
)
def test_an_unusable_value_is_named_with_file_key_and_meaning(tmp_path: Path, key: str, value: str) -> None:
    table, leaf = key.split(".")
    model = "" if key == "worker.model" else "model = 'm'\n"
    body = f"[worker]\n{model}" + (f"{leaf} = {value}\n" if table == "worker" else f"[{table}]\n{leaf} = {value}\n")
    path = write(tmp_path, body)

    message = complaint(path)

    assert f"{path}: {key}" in message
    assert "It is: " in message


def test_a_flag_that_cannot_work_is_named_as_the_option_it_was() -> None:
    message = complaint(None, {**MODEL, "engine.max_sequences": 0})

    assert message.startswith("option --slots: engine.max_sequences = 0 cannot be used")


def test_a_password_is_never_repeated() -> None:
    message = complaint(None, {**MODEL, "redis.url": "redis://:hunter2@host:99999/0"})

    assert "hunter2" not in message


def test_values_that_cannot_work_together_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "[worker]\nmodel = 'm'\n[engine]\nsweep_tokens = 16\n")

    message = complaint(path, {"engine.max_sequences": 32})

    assert "sweep_tokens (16) is below max_sequences (32)" in message
    assert str(path) in message
    assert "--slots" in message


def test_a_missing_model_says_how_to_give_one() -> None:
    assert "--model NAME" in complaint(None)


@pytest.mark.parametrize(
    ("text", "said"),
    [("[worker\n", "not valid TOML"), ("worker = 3\n", "must be a table"), ("\0", "not valid TOML")],
)
def test_a_file_that_is_no_settings_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)

    message = complaint(path)

    assert str(path) in message
    assert said in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "there is no such file" in complaint(tmp_path / "none.toml")
    assert "cannot be read" in complaint(tmp_path)


def test_a_table_that_is_a_value_is_refused_where_a_flag_needs_it(tmp_path: Path) -> None:
    assert "must be a table" in complaint(write(tmp_path, "worker = 3\n"), MODEL)


def test_the_file_beats_the_callers_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "[worker]\nmodel = 'from-file'\n")

    config: WorkerConfig = load_config(path, {}, {}, defaults={"worker.model": "any"})

    assert config.worker.model == "from-file"


def test_a_worker_is_given_one_model_or_several(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text('[worker]\nmodels = ["a", "owner/b"]\nshares = { "a" = 2 }\n')

    several = load_config(path, {}, {})

    assert several.worker.served == ("a", "owner/b")
    assert several.worker.shares == {"a": 2}
    assert load_config(None, {"worker.model": "c"}, {}).worker.served == ("c",)


def test_models_on_the_command_line_take_the_place_of_those_in_the_file(tmp_path: Path) -> None:
    one, several = tmp_path / "one.toml", tmp_path / "several.toml"
    one.write_text('[worker]\nmodel = "m"\n')
    several.write_text('[worker]\nmodels = ["a", "b"]\n')

    assert load_config(one, {"worker.models": ("x", "y")}, {}).worker.served == ("x", "y")
    assert load_config(several, {"worker.model": "x"}, {}).worker.served == ("x",)
    assert load_config(several, {}, {}, defaults={"worker.model": "any"}).worker.served == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('model = "a"\nmodels = ["b"]', "model and models are both set"),
        ('models = ["a", "a"]', "a is named more than once"),
        ('models = ["a", "../b"]', "is not a model name"),
        ("models = []", "worker.model is not set"),
        ('models = "a"', "worker.models"),
        ('models = ["a", "b"]\nshares = { "c" = 2.0 }', "shares names c, which this worker does not serve"),
        ('models = ["a", "b"]\nshares = { "a" = 0.0 }', "the share of 'a' is 0; use 0.01 to 100"),
        ('models = ["a", "b"]\nshares = { "a" = true }', "worker.shares"),
    ],
)
def test_models_that_cannot_be_served_together_are_named(tmp_path: Path, settings: str, expected: str) -> None:
    path = tmp_path / "worker.toml"
    path.write_text(f"[worker]\n{settings}\n")

    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(path, {}, {})
