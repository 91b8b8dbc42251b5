"""Build the C++ operators: `python -m libortho.kernels.native`."""

from libortho.kernels import native


def main() -> None:
    """Build and say what came of it. A machine that cannot build them is not an error."""
    try:
        path = native.build()
    except native.BuildError as error:
        print(f"kernels: PyTorch's own serve here, slower; not built: {error}")
    else:
        print(f"kernels: {path}")


if __name__ == "__main__":
    main()
