"""Changes to a model for OpenVINO: where its kernels for int8 are wrong, missing or slow, and where its files grow."""

from __future__ import annotations

from typing import Any

__all__ = ["change_int8_model", "drop_zero_points"]


def change_int8_model(model: Any) -> None:
    """Rewrite an ``openvino.Model`` with roundings in place, so that the runtime computes what it says."""
    _squeeze_apart(model)
    _flatten_indices(model)
    _share_limits(model)


def drop_zero_points(graph: Any) -> None:
    """Leave out zero points of weights that are all 0, of an ONNX graph in place.

    OpenVINO computes in float with weights whose zero points layers of other ranks share (2026.4): a convolution's and
    a linear's, of vision transformers.
    """
    for node in graph.all_nodes():
        if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 and node.inputs[0].const_value is not None:
            zero_point = node.inputs[2].const_value
            if zero_point is not None and not zero_point.numpy().any():
                node.resize_inputs(2)


def _squeeze_apart(model: Any) -> None:
    """Let means keep the dims that they are over, and drop these in an operation of their own, in place.

    A batch norm and a rounding that follow are computed within the mean, with the scales of wrong channels where it
    drops dims (2026.4): of ``(n, 4, 64)`` to ``(n, 64)``, all values are wrong.
    """
    from openvino import opset13

    for mean in model.get_ordered_ops():
        if mean.get_type_name() != "ReduceMean" or mean.get_attributes()["keep_dims"]:
            continue
        value, dims = (mean.input_value(place) for place in (0, 1))
        kept = opset13.reduce_mean(value, dims, keep_dims=True)
        squeezed = opset13.squeeze(kept, dims)
        _replace(mean, squeezed)


def _flatten_indices(model: Any) -> None:
    """Let indices of several dims that gather positions of a picture (`unfold`) be one row, in place.

    The runtime moves the scales of a convolution's channels behind a gather with the rank they have in front of it
    (2026.4), and does not compile what it gets: "Argument shapes are inconsistent".
    """
    from openvino import opset13

    for gather in model.get_ordered_ops():
        if gather.get_type_name() != "Gather" or gather.input_value(2).get_node().get_type_name() != "Constant":
            continue
        value, indices, axis = (gather.input_value(place) for place in range(3))
        first = int(axis.get_node().data.item()) % len(value.get_partial_shape())
        dims = [dim.get_length() if dim.is_static else -1 for dim in gather.output(0).get_partial_shape()]
        if first < 2 or len(indices.get_partial_shape()) < 2 or -1 in dims[1:]:
            continue
        row = opset13.reshape(indices, [-1], special_zero=False)
        reshaped = opset13.reshape(opset13.gather(value, row, axis), dims, special_zero=False)
        _replace(gather, reshaped)


def _share_limits(model: Any) -> None:
    """Let a value that is rounded have its limits once, in place: before and after rounding they are the same."""
    from openvino import opset13

    for fake_quantize in model.get_ordered_ops():
        if fake_quantize.get_type_name() != "FakeQuantize":
            continue
        for before, after in ((1, 3), (2, 4)):
            limit, same = (fake_quantize.input_value(place).get_node() for place in (before, after))
            if limit.get_type_name() == same.get_type_name() == "Constant" and (limit.data == same.data).all():
                shared = opset13.constant(limit.data.item(), limit.data.dtype) if limit.data.size == 1 else limit
                for place in (before, after):
                    fake_quantize.input(place).replace_source_output(shared.output(0))


def _replace(operation: Any, other: Any) -> None:
    """Let all that reads an operation read another one, which takes its name."""
    other.set_friendly_name(operation.get_friendly_name())
    for reader in operation.output(0).get_target_inputs():
        reader.replace_source_output(other.output(0))
