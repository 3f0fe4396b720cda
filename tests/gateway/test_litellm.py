"""LiteLLM with only its address changed; it pins older packages, so it lives in an environment of its own.

`make compat` makes that environment and runs this; the variable LITELLM_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.client.acting_worker import MODEL
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway

PYTHON = os.environ.get("LITELLM_PYTHON")


@pytest.mark.skipif(PYTHON is None, reason="LITELLM_PYTHON names no interpreter with litellm; run make compat")
@pytest.mark.timeout(180)
def test_litellm_chats_streams_completes_and_is_told_what_is_wrong(
    gateway: RunningGateway, answering: AnsweringWorker
) -> None:
    program = Path(__file__).with_name("litellm_client.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    outcome = subprocess.run(
        [str(PYTHON), str(program), f"{gateway.url}/v1", MODEL],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**environment, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )

    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert json.loads(outcome.stdout.splitlines()[-1]) == {
        "whole": "Hello there",
        "tokens": 6,
        "finish_reason": "stop",
        "streamed": "Hello there",
        "streamed_tokens": 6,
        "asynchronous": "Hello there",
        "text": "Hello there",
        "refused": "NotFoundError",
    }
