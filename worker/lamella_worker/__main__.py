"""``python -m lamella_worker``: the same as ``lamella worker``."""

from lamella_worker.cli import app

if __name__ == "__main__":
    app(prog_name="lamella worker")
