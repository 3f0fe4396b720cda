"""The ``lamella`` command.

Files in the order a call meets them: `app` (the commands and their errors), `options` (what they share), `jobs`
(submit, stream, status, cancel, jobs, workers), `limits`, `chat` with `follow` (a stream on the terminal) and
`temporary_service`, `up` with `worker_process` and `flower`, `doctor` with `finding`, `check_server`, `check_host`,
`check_gpu`, and `plugins` (commands that other packages bring); `output` formats what is printed.

Exit codes: 0 done, 1 failed, 2 used wrongly. What was asked for goes to stdout, everything else to stderr.
"""

from lamella.cli.app import app


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="lamella")
