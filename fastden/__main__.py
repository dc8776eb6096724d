"""``fastden`` and ``python -m fastden``: the command line."""

import sys

from fastden.cli.early import start_loading, without_garbage_collection


def main() -> None:
    """Run the command that the arguments name."""
    start_loading(sys.argv[1:])
    with without_garbage_collection():
        from fastden.cli.main import app

    app(prog_name="fastden")


if __name__ == "__main__":
    main()
