"""Whether torch can compute where it is asked to."""

from __future__ import annotations

from bulkedge._errors import InputError


def check_device(device: str) -> None:
    """Raise unless torch can compute on ``device``.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: If it is not there.
    """
    if device.startswith("cuda"):
        import torch

        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise InputError(
                f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} "
                "CUDA devices; use device 'cpu'"
            )
