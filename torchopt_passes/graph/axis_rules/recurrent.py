"""Recurrent layers: hidden units cut every gate of every layer and direction alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchopt_passes.graph.axes import AxisLabels, Call, Rule

__all__ = ["RECURRENT"]


def _recurrent(call: Call) -> Any:
    """The state of all layers is one tensor, so every layer and direction loses the same hidden units."""
    x: AxisLabels = call.of(call.node.args[0])  # pyright: ignore[reportArgumentType]
    hx = call.arg("hx")
    states = [call.of(node) for node in (hx if isinstance(hx, list | tuple) else [hx])]
    params = [call.of(node) for node in call.arg("params")]
    per_cell = 4 if call.arg("has_biases") else 2
    directions = 2 if call.arg("bidirectional") else 1
    layers = int(call.number("num_layers"))
    if len(params) != per_cell * directions * layers:
        raise ValueError("a projection of the hidden state")
    hidden = params[1][1]
    for state in states:
        call.unify(hidden, state[-1])
        call.lock(state[:-1], "a state for each layer")
    features = x[-1]
    steps = [np.zeros(len(ids), np.int64) for ids in x[:-1]]
    for layer in range(layers):
        for direction in range(directions):
            start = (layer * directions + direction) * per_cell
            w_in, w_hidden, *biases = params[start : start + per_cell]
            call.unify(w_in[1], features)
            call.unify(w_hidden[1], hidden)
            for rows in (w_in[0], w_hidden[0], *(bias[0] for bias in biases)):
                for gate in rows.reshape(-1, len(hidden)):
                    call.unify(gate, hidden)
            call.count([*steps, *w_in])
            call.count([*steps, *w_hidden])
        features = np.concatenate([hidden] * directions)
    call.lock(x[:-1], "steps of a sequence")
    outputs = call.axes.sizes[call.node][1:]
    fixed = [tuple(np.zeros(int(n), np.int64) for n in out.shape[:-1]) for out in outputs]
    return [(*steps, features), *((*axes, hidden) for axes in fixed)]


RECURRENT: dict[str, Rule] = dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent)
