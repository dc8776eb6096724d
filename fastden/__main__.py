"""``python -m fastden``: the command line, without relying on the installed script."""

from fastden.cli.main import app

if __name__ == "__main__":
    app(prog_name="fastden")
