"""The Python of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def blocks(root: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


def test_training_for_your_own_network(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks(root) if "JointDenoiser" in block)
    assert sum(bool(line.strip()) for line in code.splitlines()) == 15
    names: dict[str, Any] = {
        "classifier": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "loader": [(torch.rand(2, 3, 24, 20), torch.tensor([0, 3]))],
    }
    exec(code, names)
    assert (tmp_path / "my-denoiser" / "model.safetensors").is_file()
    assert all(parameter.grad is None for parameter in names["classifier"].parameters())


def test_in_your_own_code(root: Path) -> None:
    (code,) = (block for block in blocks(root) if "from fastden import Denoiser, fuse" in block)
    names: dict[str, Any] = {"x": torch.rand(1, 3, 24, 20)}
    exec(code, names)
    assert names["y"].shape == (1, 3, 24, 20)
