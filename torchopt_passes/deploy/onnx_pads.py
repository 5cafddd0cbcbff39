"""Zeros around an image become padding of the convolution that reads them: runtimes would write a larger image."""

from __future__ import annotations

from typing import Any

__all__ = ["fuse_pads"]

_PAIR = {"QuantizeLinear", "DequantizeLinear"}


def fuse_pads(graph: Any) -> int:
    """Move the zeros of ``Pad`` into the ``pads`` of convolutions, in place; returns how many.

    ONNX, unlike torch, has convolutions with more padding on one side, as a stride of 2 has in networks that come from
    TensorFlow. Rounding may lie in between, since 0 is 0 on every grid; runtimes would compute the pad, and what gives
    the image, in float there. A pad that others read too, or pads channels, is left alone.

    Args:
        graph: of an ONNX model, as ``onnx_ir``.
    """
    return sum(_fuse(node) for node in list(graph) if node.op_type == "Conv")


def _fuse(conv: Any) -> bool:
    from onnx_ir import AttrInt64s

    between: list[Any] = []
    node = conv.inputs[0].producer()
    while node is not None and node.op_type in _PAIR and _alone(node):
        between.append(node)
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Pad" or not _alone(node):
        return False
    pads = _zeros(node)
    if pads is None or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    image = node.inputs[0]
    kept = [] if _rounded_alike(image, between) else between
    for pair in kept:  # no longer what the graph has under this name
        value = pair.outputs[0]
        value.name, value.shape = f"{value.name}_unpadded", image.shape
    (kept[-1] if kept else conv).replace_input_with(0, image)
    own = conv.attributes.get_ints("pads", [0] * len(pads))
    conv.attributes.add(AttrInt64s("pads", [a + b for a, b in zip(own, pads, strict=True)]))
    node.graph.remove([*(() if kept else between), node], safe=True)
    return True


def _rounded_alike(image: Any, between: list[Any]) -> bool:
    """Return whether an image lies on the grid already that it would be rounded to."""
    maker = image.producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return False
    return all(_grid(one) is not None and _grid(one) == _grid(maker) for one in between)


def _grid(pair: Any) -> list[Any] | None:
    values = [value and value.const_value for value in pair.inputs[1:]]
    return None if None in values else [(value.dtype, value.numpy().tolist()) for value in values]


def _alone(node: Any) -> bool:
    """Return whether one operation reads what a node gives."""
    value = node.outputs[0]
    return len(value.uses()) == 1 and not value.is_graph_output()


def _zeros(pad: Any) -> list[int] | None:
    """Return how many zeros a pad puts in front of and behind each spatial dim, None when it does anything else."""
    values = [None if value is None else value.const_value for value in pad.inputs[1:]]
    if pad.attributes.get_string("mode", "constant") != "constant" or len(pad.inputs) > 3 or values[0] is None:
        return None
    if len(values) > 1 and pad.inputs[2] is not None and (values[1] is None or values[1].numpy().any()):
        return None
    sizes = values[0].numpy().tolist()
    half = len(sizes) // 2
    if min(sizes) < 0 or any(sizes[place] for place in (0, 1, half, half + 1)):
        return None
    return [*sizes[2:half], *sizes[half + 2 :]]
