"""Python collects no garbage while any CUDA graph is captured."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest

from fastden.ops.capturing import without_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_the_last_capture_enables_collection_again(enabled: bool) -> None:
    """Those of two threads overlap: the first to begin is the first to end."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with ExitStack() as first, ExitStack() as second:
            first.enter_context(without_collection())
            second.enter_context(without_collection())
            first.close()
            assert not gc.isenabled()
            second.close()
            assert gc.isenabled() == enabled
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
