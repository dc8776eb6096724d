"""Devices that a network may be on, by name."""

from __future__ import annotations

import torch


def named_device(device: str | torch.device, name: str = "device") -> torch.device:
    """The device of a name, usable or not; ``name`` is the argument's, for errors.

    Raises:
        ValueError: PyTorch knows no such device.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(_refusal(device, name)) from error


def parse_device(device: str | torch.device | None, *, any_kind: bool = False, name: str = "device") -> torch.device:
    """A usable device; None means CUDA where PyTorch finds a CUDA device, else the CPU.

    Args:
        device: its name, or a torch device.
        any_kind: take all kinds that PyTorch knows, also those on which nothing is computed.
        name: of the argument, for errors.

    Raises:
        ValueError: the device is not cpu, cuda or (where PyTorch has it) mps, or PyTorch does not find this device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parsed = named_device(device, name)
    # PyTorch knows more devices: some hold no data (meta), some need packages of their own (xla).
    if parsed.type not in _kinds() and not any_kind:
        raise ValueError(_refusal(device, name))
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}: {str(device)!r}, but PyTorch finds no CUDA device (see fastden info); accepted: cpu")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name}: {str(device)!r}; accepted: cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return parsed


def _kinds() -> tuple[str, ...]:
    return ("cpu", "cuda", "mps") if torch.backends.mps.is_available() else ("cpu", "cuda")


def _refusal(device: object, name: str) -> str:
    return f"{name}: {str(device)!r}; accepted: {', '.join(_kinds())}, or one of several such as cuda:1"
