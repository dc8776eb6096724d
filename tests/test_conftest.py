"""The shared fixtures do what other tests rely on."""

from __future__ import annotations

import torch


def test_uninitialised_memory_is_nan() -> None:
    x = torch.rand(2, 3)
    for empty in (torch.empty(2, 3), torch.empty_like(x), x.new_empty(2, 3), torch.empty_strided((2, 3), (1, 2))):
        assert bool(empty.isnan().all())


def test_integers_are_poisoned_too() -> None:
    assert bool((torch.empty(5, dtype=torch.uint8) == 255).all())


def test_every_test_starts_from_the_same_seed() -> None:
    assert torch.initial_seed() == 0
