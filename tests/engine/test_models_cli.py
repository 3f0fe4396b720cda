"""The commands on models, as a user types them: output, exit codes, and one line for each error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lamella_engine.byte_size import byte_size
from lamella_engine.cli import app
from lamella_engine.console_progress import ConsoleProgress
from lamella_engine.shard_store import ShardStore
from tests.engine.fake_hub import serve_hub


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, where the commands look without being told."""
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def tiny(root: Path, tiny_llama_dir: Path) -> str:
    """The name of a model in the store."""
    ShardStore(root).ensure("owner/tiny", source=tiny_llama_dir)
    return "owner/tiny"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_failed(result: Result, *words: str) -> None:
    """One line on standard error, no stack trace, exit code 1."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_an_empty_store_says_how_to_fill_it(root: Path) -> None:
    listed = run("list")

    assert listed.exit_code == 0
    assert "import NAME PATH" in listed.stdout
    assert not root.exists()


def test_list_shows_each_model_in_a_row(tiny: str) -> None:
    listed = run("list")

    lines = listed.stdout.splitlines()
    assert listed.exit_code == 0
    assert len(lines) == 2
    assert lines[1].split()[:4] == [tiny, "llama", "4", "float32"]


def test_list_tells_of_a_damaged_model_and_shows_the_others(tiny: str, root: Path, tiny_llama_dir: Path) -> None:
    ShardStore(root).ensure("broken", source=tiny_llama_dir)
    (root / "broken" / "manifest.json").write_text("{")

    listed = run("list")

    assert listed.exit_code == 0
    assert listed.stdout.splitlines()[1].split()[0] == tiny
    assert "warning: " in listed.stderr
    assert "lamella models remove broken" in listed.stderr


def test_list_as_json(tiny: str, root: Path) -> None:
    rows = json.loads(run("list", "--json").stdout)

    assert [(row["name"], row["family"], row["num_layers"], row["dtype"]) for row in rows] == [
        (tiny, "llama", 4, "float32")
    ]
    assert rows[0]["size_bytes"] >= ShardStore(root).open(tiny).size_bytes
    assert json.loads(run("list", "--json", "--store", root / "other").stdout) == []


@pytest.mark.parametrize("is_stored", [True, False])
def test_inspect_prints_what_fits_where(tiny: str, tiny_llama_dir: Path, is_stored: bool) -> None:
    shown = run("inspect", tiny if is_stored else tiny_llama_dir)

    assert shown.exit_code == 0
    for words in ("llama", "float32", "512 tokens", "1.0 KiB a token", "4.0 GiB", "room for the whole model"):
        assert words in shown.stdout


def test_inspect_as_json(tiny: str) -> None:
    facts = json.loads(run("inspect", tiny, "--json").stdout)

    assert facts["found_in"] == "store"
    assert facts["size_bytes"] == facts["layers_bytes"] + facts["root_bytes"]
    assert [card["runs"] for card in facts["cards"]] == [True] * 5


def test_verify_tells_a_whole_model_from_an_altered_one(tiny: str, root: Path) -> None:
    whole = run("verify", tiny)
    shard = ShardStore(root).open(tiny).layers[2].path
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))

    altered = run("verify", tiny)

    assert whole.exit_code == 0
    assert "is whole" in whole.stdout
    check_failed(altered, shard.name, "lamella models remove")


def test_what_is_done_is_told_as_json(root: Path, tiny_llama_dir: Path) -> None:
    built = json.loads(run("import", "tiny", tiny_llama_dir, "--json").stdout)
    again = json.loads(run("import", "tiny", tiny_llama_dir, "--json").stdout)
    verified = json.loads(run("verify", "tiny", "--json").stdout)
    would_go = json.loads(run("prune", "--to", "0", "--dry-run", "--json").stdout)
    gone = json.loads(run("prune", "--to", "0", "--json").stdout)
    run("import", "tiny", tiny_llama_dir)
    removed = json.loads(run("remove", "tiny", "--json").stdout)

    shown = {"name": "tiny", "num_layers": 4, "num_in_place": 0, "dtype": "float32", "deleted_original": None}
    assert built == {**shown, "is_new": True, "size_bytes": built["size_bytes"]}
    assert again == {**built, "is_new": False}
    assert (verified["name"], verified["is_whole"], verified["num_shards"]) == ("tiny", True, 5)
    assert [each["name"] for each in would_go["removed"]] == ["tiny"]
    assert (would_go["is_dry_run"], gone) == (True, {**would_go, "is_dry_run": False})
    assert removed == {"removed": ["tiny"]}


def test_remove_frees_the_name(tiny: str, root: Path) -> None:
    removed = run("remove", tiny)

    assert removed.exit_code == 0
    assert ShardStore(root).list() == ()
    assert not list(root.rglob("*.safetensors"))
    check_failed(run("remove", tiny), tiny)


def test_import_builds_once(root: Path, tiny_llama_dir: Path) -> None:
    first = run("import", "tiny", tiny_llama_dir)
    second = run("import", "tiny", tiny_llama_dir)

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.stdout.startswith("tiny is ready: 4 layers, float32")
    assert second.stdout.startswith("tiny is in the store already: 4 layers, float32")
    assert "100 %" in first.stderr
    assert len(ShardStore(root).list()) == 1


def test_import_stores_the_dtype_asked_for(root: Path, tiny_llama_dir: Path) -> None:
    done = run("import", "tiny", tiny_llama_dir, "--dtype", "bfloat16")

    assert done.exit_code == 0
    assert ShardStore(root).open("tiny").dtype == "bfloat16"
    check_failed(run("import", "tiny", tiny_llama_dir, "--dtype", "float16"), "bfloat16", "float16")


def test_an_unknown_dtype_is_a_wrong_call(root: Path, tiny_llama_dir: Path) -> None:
    result = run("import", "tiny", tiny_llama_dir, "--dtype", "int3")

    assert result.exit_code == 2
    assert "bfloat16" in result.stderr
    assert not root.exists()


def test_pull_fetches_once(root: Path, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(tmp_path, monkeypatch) as hub:
        commit = hub.add_directory("owner/tiny", tiny_llama_dir)

        first = run("pull", "owner/tiny")
        hub.fetched.clear()
        second = run("pull", "owner/tiny")

    assert first.exit_code == 0, first.stderr
    assert "owner/tiny is ready" in first.stdout
    assert "download" in first.stderr
    assert "already" in second.stdout
    assert hub.fetched == []
    assert ShardStore(root).manifest("owner/tiny").revision == commit


def test_pull_of_a_local_path_points_to_import(root: Path, tmp_path: Path) -> None:
    (tmp_path / "owner" / "tiny").mkdir(parents=True)

    check_failed(run("pull", "owner/tiny"), "import")


@pytest.mark.parametrize("name", ["../escape", "/etc", "a b", "", "x/y/z", "owner/..", "name@XYZ"])
@pytest.mark.parametrize("command", ["pull", "verify", "remove"])
def test_a_name_that_could_leave_the_store_is_refused(root: Path, command: str, name: str) -> None:
    check_failed(run(command, name), "model name")

    assert not root.exists()


def test_a_model_that_is_nowhere_is_one_line(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(tmp_path, monkeypatch):
        check_failed(run("pull", "owner/nothing"), "owner/nothing")
        check_failed(run("inspect", "owner/nothing"), "owner/nothing")
    check_failed(run("verify", "owner/nothing"), "owner/nothing")
    check_failed(run("import", "tiny", tmp_path / "nothing"), "nothing")


def test_a_file_that_is_no_checkpoint_is_one_line(root: Path, tmp_path: Path) -> None:
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"GGUF" + b"\xff" * 60)

    check_failed(run("import", "tiny", fake), "model.gguf")
    check_failed(run("inspect", fake), "model.gguf")


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path, tiny_llama_dir: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")

    check_failed(run("import", "tiny", tiny_llama_dir, "--store", blocked / "store"), str(blocked))


@pytest.mark.slow  # that the module is a program, tests/engine/test_peer_server.py shows with `share`
def test_the_module_runs_as_a_program(root: Path, tiny: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lamella_engine", "list", "--json"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == [tiny]


def test_progress_without_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress() as progress:
        for done in range(0, 1025):
            progress("download", done, 1024)
        progress("shards", 0, 0)

    assert capsys.readouterr().err.splitlines() == [
        "download: 0 B of 1.0 KiB (0 %)",
        "download: 1.0 KiB of 1.0 KiB (100 %)",
        "shards: 0 B of 0 B",
    ]


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (98 * 2**20, "98.0 MiB"), (4 * 2**30, "4.0 GiB"),
     (3 * 2**40, "3.0 TiB"), (5000 * 2**40, "5000.0 TiB")],
)  # fmt: skip
def test_sizes_are_written_in_the_largest_whole_unit(nbytes: int, words: str) -> None:
    assert byte_size(nbytes) == words
