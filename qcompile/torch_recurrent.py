"""Recurrent layers, a step at a time: LSTM, GRU and RNN.

Sequences are [steps, batch, width] and weights [directions, gates x hidden, width], as in ONNX.
Past the length of a sequence the state stays and the output is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.torch_table import Call, Table

TABLE = Table()

Activation = Callable[[Tensor], Tensor]
States = tuple[Tensor, ...]

# alpha and beta of the activations that have any, if the node does not say.
_DEFAULTS = {
    "affine": (1.0, 0.0), "leakyrelu": (0.01, 0.0), "thresholdedrelu": (1.0, 0.0),
    "scaledtanh": (1.0, 1.0), "hardsigmoid": (0.2, 0.5), "elu": (1.0, 0.0),
}  # fmt: skip


def _activation(name: str, alpha: float, beta: float) -> Activation | None:
    known: dict[str, Activation] = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": F.softsign,
        "softplus": F.softplus,
        "affine": lambda x: alpha * x + beta,
        "leakyrelu": lambda x: F.leaky_relu(x, alpha),
        "thresholdedrelu": lambda x: F.threshold(x, alpha, 0.0),
        "scaledtanh": lambda x: alpha * torch.tanh(beta * x),
        "hardsigmoid": lambda x: (alpha * x + beta).clamp(0.0, 1.0),
        "elu": lambda x: F.elu(x, alpha),
    }
    return known.get(name)


def _activations(call: Call, standard: Sequence[str], directions: int) -> list[list[Activation]]:
    """The activations of each direction. alpha and beta are listed for those that take any."""
    names = [name.lower() for name in call.texts("activations") or [*standard] * directions]
    alphas, betas = iter(call.floats("activation_alpha")), iter(call.floats("activation_beta"))
    found: list[Activation] = []
    for name in names:
        alpha, beta = _DEFAULTS.get(name, (0.0, 0.0))
        if name in _DEFAULTS:
            alpha = next(alphas, alpha)
        if name in ("affine", "scaledtanh", "hardsigmoid"):
            beta = next(betas, beta)
        activation = _activation(name, alpha, beta)
        if activation is None:
            call.refuse(f"the activation {name!r}")
        found.append(activation)
    each = len(standard)
    return [found[i * each : (i + 1) * each] for i in range(directions)]


def _run(
    call: Call,
    x: Tensor,
    lengths: Tensor | None,
    states: Sequence[States],
    step: Callable[[int, Tensor, States], States],
) -> tuple[Tensor, list[Tensor]]:
    """All directions over all steps.

    ``states`` are the first states of each direction, the output foremost; ``step`` makes of the
    direction, the input and the states the next states. Returns [steps, directions, batch, hidden]
    and each last state as [directions, batch, hidden].
    """
    if call.int("layout", 0):
        call.refuse("layout 1")
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    order = backwards[call.text("direction", "forward")]
    outputs: list[Tensor] = []
    last: list[States] = []
    for number, reverse in enumerate(order):
        state, written = states[number], [x.new_zeros(())] * x.shape[0]
        for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
            after = step(number, x[t], state)
            if lengths is None:
                state, written[t] = after, after[0]
                continue
            live = (t < lengths.to(x.device)).unsqueeze(1)
            state = tuple(torch.where(live, a, b) for a, b in zip(after, state, strict=True))
            written[t] = torch.where(live, after[0], torch.zeros_like(after[0]))
        outputs.append(torch.stack(written))
        last.append(state)
    return torch.stack(outputs, 1), [torch.stack(kind) for kind in zip(*last, strict=True)]


def _first(state: Tensor | None, x: Tensor, weight: Tensor, hidden: int) -> Tensor:
    """A state to begin with, zero if it is not given, as [directions, batch, hidden]."""
    return x.new_zeros(weight.shape[0], x.shape[1], hidden) if state is None else state


def _limit(call: Call) -> Activation:
    """What ``clip`` does to what enters an activation."""
    bound = call.float("clip", 0.0)
    return (lambda x: x.clamp(-bound, bound)) if bound else (lambda x: x)


@TABLE.entry("RNN")
def rnn(
    call: Call,
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
):
    """h' = f(W x + R h + b)."""
    functions = _activations(call, ["Tanh"], weight.shape[0])
    clip, start = _limit(call), _first(h, x, weight, recurrent.shape[2])

    def step(number: int, entered: Tensor, states: States) -> States:
        total = entered @ weight[number].t() + states[0] @ recurrent[number].t()
        if bias is not None:
            total = total + bias[number].reshape(2, -1).sum(0)
        return (functions[number][0](clip(total)),)

    y, (last,) = _run(call, x, lengths, [(one,) for one in start], step)
    return y, last


@TABLE.entry("GRU")
def gru(
    call: Call,
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
):
    """Gates z, r, h: h' = (1 - z) f(.) + z h."""
    hidden = recurrent.shape[2]
    functions = _activations(call, ["Sigmoid", "Tanh"], weight.shape[0])
    clip, start = _limit(call), _first(h, x, weight, hidden)
    late = bool(call.int("linear_before_reset", 0))

    def step(number: int, entered: Tensor, states: States) -> States:
        (before,) = states
        gate, squash = functions[number]
        inner = entered @ weight[number].t()
        outer = before @ recurrent[number][: 2 * hidden].t()
        shift = x.new_zeros(3 * hidden)
        if bias is not None:
            own, shift = bias[number].chunk(2)
            inner = inner + own
        outer = outer + shift[: 2 * hidden]
        z, r = gate(clip(inner[:, : 2 * hidden] + outer)).chunk(2, 1)
        rows, added = recurrent[number][2 * hidden :].t(), shift[2 * hidden :]
        mixed = r * (before @ rows + added) if late else (r * before) @ rows + added
        candidate = squash(clip(inner[:, 2 * hidden :] + mixed))
        return ((1.0 - z) * candidate + z * before,)

    y, (last,) = _run(call, x, lengths, [(one,) for one in start], step)
    return y, last


@TABLE.entry("LSTM")
def lstm(
    call: Call,
    x: Tensor,
    weight: Tensor,
    recurrent: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
):
    """Gates i, o, f, c: c' = f c + i g(.), h' = o h(c'). Peepholes are i, o, f."""
    hidden = recurrent.shape[2]
    functions = _activations(call, ["Sigmoid", "Tanh", "Tanh"], weight.shape[0])
    clip = _limit(call)
    starts = (_first(h, x, weight, hidden), _first(c, x, weight, hidden))
    coupled = bool(call.int("input_forget", 0))

    def step(number: int, entered: Tensor, states: States) -> States:
        before, cell = states
        gate, squash, finish = functions[number]
        total = entered @ weight[number].t() + before @ recurrent[number].t()
        if bias is not None:
            total = total + bias[number].reshape(2, -1).sum(0)
        i, o, f, g = total.chunk(4, 1)
        look = (0.0, 0.0, 0.0) if peepholes is None else peepholes[number].chunk(3)
        i = gate(clip(i + look[0] * cell))
        f = 1.0 - i if coupled else gate(clip(f + look[2] * cell))
        cell = f * cell + i * squash(clip(g))
        o = gate(clip(o + look[1] * cell))
        return o * finish(cell), cell

    pairs = list(zip(*starts, strict=True))
    y, (last, cell) = _run(call, x, lengths, pairs, step)
    return y, last, cell
