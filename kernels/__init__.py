"""GPU kernels, installed as ``fastden.kernels``."""

if __name__ != "fastden.kernels":
    raise ImportError(
        f"kernels/ was imported as {__name__!r}, which would load every kernel twice: install fastden"
        " (pip install -e .) and import fastden.kernels"
    )
