"""Which models a worker serves, and from which revision: decided before anything is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamella.errors import ConfigError
from lamella_worker.cli import app
from lamella_worker.config import load_config
from lamella_worker.security_table import SecurityTable

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def table(**settings: object) -> SecurityTable:
    return SecurityTable.model_validate(settings)


def test_every_model_is_allowed_by_default() -> None:
    assert table().admitted("owner/name@abcdef0~int8") == "owner/name@abcdef0~int8"


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B@abcdef0", "exact", "exact~nf4"])
def test_a_model_that_a_pattern_allows_is_served(model: str) -> None:
    assert table(allowed_models=["Qwen/Qwen3-*", "exact"]).admitted(model) == model


@pytest.mark.parametrize(
    "model", ["qwen/Qwen3-0.6B", "Qwen/Other", "exactly", "evil/Qwen/Qwen3-1", "x@abcdef0", "Qwen"]
)
def test_a_model_that_no_pattern_allows_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed_models allows Qwen/Qwen3-\*, exact; nothing was fetched"):
        table(allowed_models=["Qwen/Qwen3-*", "exact"]).admitted(model)


def test_a_pinned_model_is_opened_at_its_commit() -> None:
    pinned = table(pins={"owner/name": COMMIT})

    assert pinned.admitted("owner/name") == f"owner/name@{COMMIT}"
    assert pinned.admitted("owner/name~int8") == f"owner/name@{COMMIT}~int8"
    assert pinned.admitted(f"owner/name@{COMMIT[:7]}") == f"owner/name@{COMMIT}"
    assert pinned.admitted("owner/other") == "owner/other"


def test_another_revision_than_the_pin_is_refused() -> None:
    with pytest.raises(ConfigError, match="or change the pin"):
        table(pins={"owner/name": COMMIT}).admitted("owner/name@fffffff")


def test_a_revision_can_be_required_of_the_hubs_models() -> None:
    strict = table(require_revision=True, pins={"owner/pinned": COMMIT})

    assert strict.admitted(f"owner/name@{COMMIT}") == f"owner/name@{COMMIT}"
    assert strict.admitted("owner/pinned") == f"owner/pinned@{COMMIT}"
    assert strict.admitted("local-import") == "local-import"
    for model in ("owner/name", "owner/name@0123456"):
        with pytest.raises(ConfigError, match="require_revision"):
            strict.admitted(model)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("allowed_models = []", "allows nothing"),
        ('allowed_models = ["a b"]', "no name or pattern"),
        ('allowed_models = "*"', "valid tuple"),
        ('pins = { "owner/name" = "main" }', "not a full commit"),
        (f'pins = {{ "owner/name@abcdef0" = "{COMMIT}" }}', "without revision"),
        (f'pins = {{ "../name" = "{COMMIT}" }}', "not a model name"),
        ("keep_s = 0", "greater than or equal to 1"),
        ("keep_s = 1.5", "valid integer"),
        ('encryption_keys_file = ""', "path is empty"),
        ("keeps = 1", "did you mean security.keep_s"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_the_start(tmp_path: Path, setting: str, complaint: str) -> None:
    path = tmp_path / "w.toml"
    path.write_text(f'[worker]\nmodel = "m"\n[security]\n{setting}\n')

    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(path, {}, environ={})

    assert str(path) in str(caught.value)


def test_the_environment_sets_what_it_may(tmp_path: Path) -> None:
    environ = {"LAMELLA_KEEP_S": "60", "LAMELLA_ENCRYPTION_KEYS_FILE": str(tmp_path / "keys")}

    security = load_config(None, {"worker.model": "m"}, environ).security

    assert (security.keep_s, security.encryption_keys_file) == (60, tmp_path / "keys")
    with pytest.raises(ConfigError, match="environment variable LAMELLA_KEEP_S"):
        load_config(None, {"worker.model": "m"}, {"LAMELLA_KEEP_S": "soon"})


def test_a_worker_of_a_refused_model_ends_before_it_asks_anybody(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text('[security]\nallowed_models = ["good/*"]\n')
    arguments = ["--config", str(path), "--model", "evil/model", "--redis-url", f"unix://{tmp_path}/none"]

    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--store", str(tmp_path / "store")])

    assert result.exit_code == 2
    assert "'evil/model' is refused" in result.output
    assert not (tmp_path / "store").exists()


def test_a_worker_whose_keys_cannot_be_read_ends_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(f'[security]\nencryption_keys_file = "{tmp_path}/none"\n')
    arguments = ["--config", str(path), "--model", "m", "--redis-url", f"unix://{tmp_path}/none", "--device", "cpu"]

    result = CliRunner().invoke(app, [*arguments, "--store", str(tmp_path / "store")])

    assert result.exit_code == 2
    assert "lamella key ID" in result.output
