"""``python -m lamella_engine``: the commands on models, without the client library."""

from lamella_engine.cli import app

app(prog_name="python -m lamella_engine")
