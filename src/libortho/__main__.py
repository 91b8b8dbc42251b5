"""`python -m libortho` is `libortho`, for where its script is on no path."""

from libortho.cli import app

if __name__ == "__main__":
    app(prog_name="libortho")
