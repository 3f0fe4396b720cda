"""Batches from the command line: every line answered once, in order, whatever is killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner, Result

from lamella.batch_files import BatchFiles, errors_path, identify
from lamella.cli import app
from lamella.embedded import EmbeddedServer
from lamella.errors import RequestError
from tests.client.acting_worker import MODEL, ActingWorker
from tests.client.answering_worker import AnsweringWorker
from tests.waiting import wait_until

Run = Callable[..., Result]


@pytest.fixture
def run(embedded_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a batch of the test's own directory, in this process."""
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    monkeypatch.chdir(tmp_path)

    def run(*args: str, source: str = "in.jsonl") -> Result:
        result = CliRunner().invoke(app, ["batch", "run", source, "out.jsonl", *args])
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def batch(run: Run, embedded_server: EmbeddedServer) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a batch of the test's own directory, in a process of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lamella", "batch", "run", "in.jsonl", "out.jsonl", *args]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=40)


def write_lines(count: int, *, name: str = "in.jsonl") -> list[str]:
    """Write so many lines in OpenAI's form; their prompts are of different lengths."""
    prompts = [f"{number}{'x' * (number * 7 % 13)}" for number in range(count)]
    with open(name, "w") as file:
        for number, prompt in enumerate(prompts):
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
            line = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return prompts


def read(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def texts() -> list[str]:
    return [record["response"]["body"]["choices"][0]["message"]["content"] for record in read("out.jsonl")]  # type: ignore[index]  # it is JSON


def written() -> int:
    path = Path("out.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_answers_come_in_the_order_of_the_lines(run: Run, worker: ActingWorker) -> None:
    prompts = write_lines(60)

    with AnsweringWorker(worker) as answering:
        answering.latest_first = True
        result = run("--json", "--in-flight", "7")

    assert result.exit_code == 0, result.output
    assert texts() == [f"<{prompt}>" for prompt in prompts]
    assert [record["custom_id"] for record in read("out.jsonl")] == [f"c{number}" for number in range(60)]
    assert json.loads(result.stdout)["answered"] == 60
    assert "60 lines: 60 answered" in result.stderr
    assert answering.most_at_once <= 7
    assert Path("out.errors.jsonl").read_text() == ""


def test_bad_lines_go_to_the_error_file_and_stop_nothing(run: Run, worker: ActingWorker) -> None:
    Path("in.jsonl").write_text(
        '{"prompt": "a"}\nnonsense\n\n{"prompt": "b", "bad": 1}\n{"prompt": "bad"}\n{"prompt": "c"}'
    )

    with AnsweringWorker(worker, refuses={"bad"}):
        result = run()

    assert result.exit_code == 3
    assert [(record["line"], record["text"]) for record in read("out.jsonl")] == [(1, "<a>"), (6, "<c>")]
    errors = [record["error"] for record in read("out.errors.jsonl")]
    assert [(error["line"], error["code"]) for error in errors] == [  # type: ignore[index]  # it is JSON
        (2, "invalid_json"),
        (4, "unknown_parameter"),
        (5, "prompt_too_long"),
    ]
    assert "3 failed (see out.errors.jsonl)" in result.stderr


def test_a_batch_that_is_done_asks_nothing_again(run: Run, worker: ActingWorker) -> None:
    write_lines(5)
    with AnsweringWorker(worker) as answering:
        first = run()
        before = Path("out.jsonl").read_bytes()
        again = run()

    assert (first.exit_code, again.exit_code) == (0, 0)
    assert Path("out.jsonl").read_bytes() == before
    assert len(answering.asked) == 5
    assert "5 of them by earlier runs" in again.stderr


@pytest.mark.parametrize("cut", [0, 1, 7, 40, 150], ids=lambda cut: f"{cut} bytes gone")
def test_a_half_written_line_is_cut_and_its_answer_found_again(run: Run, worker: ActingWorker, cut: int) -> None:
    prompts = write_lines(9)
    with AnsweringWorker(worker) as answering:
        run()
        whole = Path("out.jsonl").read_bytes()
        Path("out.jsonl").write_bytes(whole[: len(whole) - cut])
        result = run()

    assert result.exit_code == 0, result.output
    assert texts() == [f"<{prompt}>" for prompt in prompts]
    assert len(answering.asked) == 9


def test_when_one_file_fell_behind_the_other_what_follows_is_written_again(run: Run, worker: ActingWorker) -> None:
    Path("in.jsonl").write_text("".join(f'{{"prompt": "{word}"}}\n' for word in ("a", "", "b", "", "c")))
    with AnsweringWorker(worker) as answering:
        run()
        answers, errors = Path("out.jsonl").read_bytes(), Path("out.errors.jsonl").read_bytes()
        Path("out.errors.jsonl").write_bytes(errors.splitlines(keepends=True)[0])
        run()

    assert len(read("out.jsonl")) == len(answers.splitlines())
    assert Path("out.errors.jsonl").read_bytes() == errors
    assert [record["line"] for record in read("out.jsonl")] == [1, 3, 5]
    assert len(answering.asked) == 3


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_ends_early_goes_on_where_it_was(
    batch: Callable[..., subprocess.Popen[str]], run: Run, worker: ActingWorker, end: signal.Signals
) -> None:
    prompts = write_lines(200)
    with AnsweringWorker(worker) as answering:
        process = batch("--in-flight", "6")
        wait_until(lambda: written() >= 20)
        process.send_signal(end)
        _, told = process.communicate(timeout=40)
        done = written()
        result = run("--in-flight", "6")

    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    if end != signal.SIGKILL:
        assert f"stopped: {done} of 200 lines are done; the same command goes on" in told
    assert 20 <= done < 200
    assert result.exit_code == 0, result.output
    assert texts() == [f"<{prompt}>" for prompt in prompts]
    assert len(set(answering.asked)) == 200
    assert len(answering.asked) <= 200 + (0 if end == signal.SIGKILL else 6)


def test_a_server_that_is_killed_loses_no_line(
    own_server: EmbeddedServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", own_server.url)
    prompts = write_lines(120)
    command = [sys.executable, "-m", "lamella", "batch", "run", "in.jsonl", "out.jsonl", "--in-flight", "4"]
    with (
        redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True) as raw,
        AnsweringWorker(ActingWorker(raw, lease_ms=1000), patient=True) as answering,
    ):
        answering.announce()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: written() >= 10)
            assert own_server.pid is not None
            os.kill(own_server.pid, signal.SIGKILL)
            wait_until(lambda: not own_server.is_running)
            own_server.stop()
            own_server.start()
            _, told = process.communicate(timeout=60)

    assert process.returncode == 0, told
    assert texts() == [f"<{prompt}>" for prompt in prompts]


def test_an_output_of_another_input_is_left_alone(run: Run, worker: ActingWorker) -> None:
    write_lines(3)
    with AnsweringWorker(worker):
        run()
        before = Path("out.jsonl").read_bytes()
        write_lines(4)
        refused = run()
        other_options = run("--max-tokens", "3")
        replaced = run("--overwrite")

    assert refused.exit_code == other_options.exit_code == 2
    assert "another input, or with other options" in refused.stderr
    assert len(before.splitlines()) == 3
    assert replaced.exit_code == 0
    assert written() == 4


def test_a_file_that_is_no_batch_is_left_alone(run: Run, worker: ActingWorker) -> None:
    write_lines(3)
    for content in ("my notes\n", "my notes", '{"id": "other"}\n'):
        Path("out.jsonl").write_text(content)

        refused = run()

        assert refused.exit_code == 2
        assert "no record of a batch" in refused.stderr
        assert Path("out.jsonl").read_text() == content


def test_two_runs_cannot_write_one_output(run: Run, worker: ActingWorker) -> None:
    write_lines(1)
    with BatchFiles(Path("out.jsonl")):
        refused = run()

    assert refused.exit_code == 2
    assert "being written by another run" in refused.stderr


def test_another_tag_asks_anew(run: Run, worker: ActingWorker) -> None:
    write_lines(2)
    with AnsweringWorker(worker) as answering:
        run()
        run("--overwrite")
        kept = len(answering.asked)
        run("--overwrite", "--tag", "second")

    assert (kept, len(answering.asked)) == (2, 4)


def test_a_model_that_nobody_serves_is_an_error_of_its_lines(run: Run, worker: ActingWorker) -> None:
    Path("in.jsonl").write_text('{"prompt": "a", "model": "nobody"}\n{"prompt": "b"}\n')

    with AnsweringWorker(worker):
        result = run("--model", MODEL)

    assert result.exit_code == 0
    assert [record["model"] for record in read("out.jsonl")] == [MODEL, MODEL]


@pytest.mark.parametrize(
    ("args", "exit_code", "says"),
    [
        (("--model", "../x"), 2, "not a model name"),
        (("--in-flight", "0"), 2, "in-flight"),
        (("--timeout", "0"), 2, "--timeout is 0"),
        (("--redis-url", "redis://127.0.0.1:1/0"), 1, "no answer"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    run: Run, worker: ActingWorker, args: tuple[str, ...], exit_code: int, says: str
) -> None:
    write_lines(1)

    result = run(*args)

    assert result.exit_code == exit_code
    assert says in result.stderr
    assert not Path("out.jsonl").exists()


def test_an_input_that_cannot_be_one_is_refused(run: Run, worker: ActingWorker) -> None:
    write_lines(1)

    assert "is no file" in run(source="nowhere.jsonl").stderr
    assert "is no file" in run(source="-").stderr
    os.link("in.jsonl", "out.jsonl")
    assert "is the input" in run().stderr


def test_without_a_worker_nothing_is_written(run: Run) -> None:
    write_lines(1)

    result = run()

    assert result.exit_code == 1
    assert "no worker is running" in result.stderr
    assert not Path("out.jsonl").exists()


def test_records_out_of_order_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    output = tmp_path / "out"
    with source.open("rb") as file:
        asked = identify(file, "")
        records = [f'{{"id": "batch_req_{asked.batch_id}_{number}", "custom_id": null}}\n' for number in (2, 1)]
        output.write_text("".join(records))
        with BatchFiles(output) as files, pytest.raises(RequestError, match="out of order"):
            files.resume(file, asked.batch_id)

    assert asked.num_lines == 2
    assert errors_path(output) == tmp_path / "out.errors.jsonl"
    assert output.read_text() == "".join(records)
