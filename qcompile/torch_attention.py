"""Attention and rotary positions, as single operators (ONNX opset 23 and 24)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.torch_table import Call, Table

TABLE = Table()


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, tokens, heads x size] as [batch, heads, tokens, size]; four axes stay."""
    if x.dim() == 4:
        return x
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


@TABLE.entry("Attention")
def attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    lengths: Tensor | None = None,
):
    """softmax(cap(scale Q K') + mask) V, with fewer heads of K and V than of Q if so given.

    A query that sees no key at all yields zeros.
    """
    for side in ("left_window_size", "right_window_size"):
        if call.int(side, -1) != -1:
            call.refuse(side)
    flat = q.dim() == 3
    q, k, v = (
        _heads(x, call.int(name, 0))
        for x, name in ((q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads"))
    )
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    root = math.sqrt(call.float("scale", 0.0) or 1.0 / math.sqrt(q.shape[-1]))
    group = q.shape[1] // k.shape[1]
    keys, rows = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    raw = (q * root) @ (keys * root).transpose(2, 3)
    cap = call.float("softcap", 0.0)
    capped = cap * torch.tanh(raw / cap) if cap else raw
    past = 0 if past_k is None else past_k.shape[2]
    masked = _masked(call, capped, mask, past, lengths)
    # Softmax over nothing is not a number, and so would be its gradient.
    empty = (masked == -math.inf).all(-1, keepdim=True)
    precise = masked.masked_fill(empty, 0.0).to(call.dtype("softmax_precision", masked.dtype))
    weights = torch.softmax(precise, -1).to(q.dtype).masked_fill(empty, 0.0)
    y = weights @ rows
    shown = (raw, capped, masked, weights)[call.int("qk_matmul_output_mode", 0)]
    return y.transpose(1, 2).flatten(2) if flat else y, k, v, shown


def _masked(
    call: Call, scores: Tensor, mask: Tensor | None, past: int, lengths: Tensor | None
) -> Tensor:
    """The scores plus a mask of numbers, and minus infinity where a query must not look."""
    queries, keys = scores.shape[-2:]
    if mask is not None:
        short = keys - mask.shape[-1]
        boolean = mask.dtype == torch.bool
        if short:
            mask = F.pad(mask, (0, short), value=0.0 if boolean else -math.inf)
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + mask
    place = torch.arange(keys, device=scores.device)
    ends = None if lengths is None else lengths.to(scores.device).reshape(-1, 1, 1, 1)
    if ends is not None:
        scores = scores.masked_fill(place >= ends, -math.inf)
    if call.int("is_causal", 0):
        before = past if ends is None else ends - queries
        row = torch.arange(queries, device=scores.device).unsqueeze(1)
        scores = scores.masked_fill(place > row + before, -math.inf)
    return scores


@TABLE.entry("RotaryEmbedding")
def rotary_embedding(
    call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Pairs of elements of each head turned by an angle of their position.

    A pair is an element and that half a head further, or two neighbours if ``interleaved``.
    """
    heads = _heads(x, call.int("num_heads", 0))
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = call.int("rotary_embedding_dim", 0) or heads.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    interleaved = call.int("interleaved", 0)
    if interleaved:
        one, other = turned[..., 0::2], turned[..., 1::2]
    else:
        one, other = turned.chunk(2, -1)
    pair = (cos * one - sin * other, sin * one + cos * other)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    y = torch.cat([turned, rest], -1)
    return y if x.dim() == 4 else y.transpose(1, 2).flatten(2)
