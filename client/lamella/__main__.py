"""``python -m lamella``: the same as the ``lamella`` command."""

from lamella.cli import main

if __name__ == "__main__":
    main()
