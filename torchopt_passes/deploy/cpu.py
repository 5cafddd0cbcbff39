"""What the CPU of this machine can compute."""

from __future__ import annotations

import platform

import torch

__all__ = ["SATURATING_TARGETS", "saturates"]

SATURATING_TARGETS = frozenset({"inductor", "onnx", "openvino"})
"""Targets whose x86 kernels multiply uint8 by int8: without VNNI they add pairs of products in 16 bits."""


def saturates(target: str) -> bool:
    """Whether the int8 kernels of a target saturate on this CPU when weights use all 8 bits.

    2 * 255 * 127 is above 2^15; with weights of 7 bits, 2 * 255 * 64 is not. That is x86 without VNNI or AMX.

    Example:
        >>> saturates("tensorrt")
        False
    """
    if target not in SATURATING_TARGETS or platform.machine() not in ("x86_64", "AMD64"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
