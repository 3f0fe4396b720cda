"""The ``lamella`` command.

Files in the order a call meets them: `app` (the commands and their errors), `options` (what they share), `complete`
(what the shell completes), `jobs` (submit, stream, status, cancel, jobs, workers), `limits`, `batch`, `chat` with
`dialogue`, `line_input`, `conversation`, `follow` (a stream on the terminal), `status_line`, `temporary_service`; `top`
with `top_data` and `top_view`, `up` with `worker_process` and `flower`, `doctor` with `finding`, `check_server`,
`check_host`, `check_gpu`; `access` (acl, key), and `plugins` (commands that other packages bring); `output` formats
what is printed.

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 a batch with errors, 130 a batch that was stopped. What was asked for
goes to stdout, everything else to stderr.
"""

from lamella.cli.app import app


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="lamella")
