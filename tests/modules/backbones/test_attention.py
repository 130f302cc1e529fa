"""Every path of attention over packs against a loop over segments in float64."""

import inspect
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from datamodules.batch import PackedImages
from modules.backbones import Packed, attention
from modules.backbones.attention import Segments, attend
from modules.backbones.layers import Attention, BlockStyle
from tests.packs import images, pack

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LARGE = [(8, 12), (4, 4), (8, 8), (8, 8), (20, 16)]


def a_pack(length: int = 40) -> PackedImages:
    """Rows that are full, partly filled, empty; neighbours of one length; empty slots."""
    wide, dot, square, again, tall = images(LARGE)
    full = [square] * (length // 4) if length == 40 else [tall, tall]
    return pack([[wide, dot, square], [square, again, tall], [], full], 4, length, 10)


def oracle(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float | None) -> Tensor:
    """Attention in float64, one query after another, over the keys of its segment."""
    q, k, v = q.double(), k.double(), v.double()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for row in range(q.shape[0]):
        outs = []
        for query in range(q.shape[2]):
            own = [key for key in range(k.shape[2]) if segments[row, key] == segments[row, query]]
            scores = torch.einsum("he,hne->hn", q[row, :, query], k[row][:, own]) * factor
            outs.append(torch.einsum("hn,hne->he", scores.softmax(-1), v[row][:, own]))
        rows.append(torch.stack(outs, dim=1))
    return torch.stack(rows)


def arguments(packed: PackedImages, dtype: torch.dtype, dim: int = 16) -> list[Tensor]:
    """q, k and v as they come out of their shared projection."""
    torch.manual_seed(0)
    rows, n = packed.segments.shape
    shared = torch.randn(rows, n, 3, 2, dim).to(dtype)
    return [x.detach().requires_grad_() for x in shared.permute(2, 0, 3, 1, 4)]


def agree(run: Any, packed: PackedImages, dtype: torch.dtype, scale: float | None) -> None:
    given = arguments(packed, dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    weights = torch.randn(given[0].shape)
    out, expected = run(*given), oracle(*wide, packed.segments, scale)
    assert out.dtype == dtype
    (out * weights.to(dtype)).sum().backward()
    (expected * weights.to(dtype).double()).sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(given, wide, strict=True))]
    for ours, theirs in pairs:
        if dtype == torch.float32:
            torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_the_batch_type_is_what_backbones_ask_for() -> None:
    assert isinstance(a_pack(), Packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("path", ["in turn", "mask"])
def test_paths_on_a_cpu(
    path: str, scale: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT_ROW", 0 if path == "in turn" else 10_000)
    taken = []
    in_turn = attention.attend_in_turn
    monkeypatch.setattr(attention, "attend_in_turn", lambda *a: taken.append(1) or in_turn(*a))
    packed = a_pack()
    segments = Segments(packed)
    agree(lambda q, k, v: attend(q, k, v, segments=segments, scale=scale), packed, dtype, scale)
    assert bool(taken) == (path == "in turn")


def test_runs_join_neighbours_of_one_length() -> None:
    assert Segments(a_pack()).runs == [
        *((6, 1), (1, 1), (4, 1), (29, 1)),
        *((4, 2), (20, 1), (12, 1)),
        *((40, 1), (4, 10)),
    ]


def test_a_bias_is_added_within_segments_only() -> None:
    packed = a_pack()
    q, k, v = (x.detach() for x in arguments(packed, torch.float32))
    segments = Segments(packed)
    none = torch.zeros(1, 2, 40, 40)
    close = {"atol": 1e-5, "rtol": 1e-5}
    expected = attend(q, k, v, segments=segments)
    torch.testing.assert_close(attend(q, k, v, none, segments), expected, **close)
    alike = (packed.segments[:, :, None] == packed.segments[:, None, :])[:, None]
    outside = torch.where(alike, 0.0, 50.0).expand(-1, 2, -1, -1)
    torch.testing.assert_close(attend(q, k, v, outside, segments), expected, **close)
    bias = torch.randn(1, 2, 40, 40)
    scores = q @ k.transpose(-1, -2) * 16**-0.5 + bias
    expected = scores.masked_fill(~alike, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, bias, segments), expected, **close)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("knows_scale", [True, False])
def test_the_call_of_the_kernel_for_any_length(
    knows_scale: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for `varlen_attn` with the arguments that torch 2.10 and later share."""
    packed = a_pack()
    calls: list[tuple[int, int]] = []

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        factor: float | None,
    ) -> Tensor:
        assert query.shape == (4 * 40, 2, 16)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert cu_seq_q[0] == 0
        assert cu_seq_q[-1] == query.shape[0]
        assert len(cu_seq_q) == 4 * 11 + 1
        assert int(cu_seq_q.diff().max()) <= max_q
        calls.append((max_q, max_k))
        outs = []
        for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
            scores = torch.einsum("qhe,khe->hqk", query[start:end], key[start:end])
            weights = (scores * (16**-0.5 if factor is None else factor)).softmax(-1)
            outs.append(torch.einsum("hqk,khe->qhe", weights, value[start:end]))
        return torch.cat(outs)

    def old(*given: Any) -> Tensor:
        return kernel(*given, None)

    def new(*given: Any, scale: float | None = None) -> Tensor:
        return kernel(*given, scale)

    monkeypatch.setattr(attention, "varlen_attn", new if knows_scale else old)
    agree(
        lambda q, k, v: attention.attend_varlen(q, k, v, packed.offsets, scale),
        packed,
        torch.float32,
        scale,
    )
    assert calls == [(40, 40)]


def test_torchs_kernel_has_the_arguments_that_are_used() -> None:
    if attention.varlen_attn is None:
        pytest.skip("torch before 2.10")
    names = list(inspect.signature(attention.varlen_attn).parameters)
    assert names[:3] == ["query", "key", "value"]
    assert names[3].startswith("cu_seq")
    assert names[5:7] == ["max_q", "max_k"]


def test_which_queries_suit_which_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", print)
    half = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    assert attention.suits_varlen(half)
    assert not attention.suits_varlen(half.float())
    assert not attention.suits_varlen(half[..., :20])
    assert not attention.suits_varlen(half.repeat(1, 1, 1, 5))
    assert attention.suits_flex(half.float())
    assert not attention.suits_flex(half.double())
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert not attention.suits_varlen(half)


def test_blocks_are_those_that_share_a_segment() -> None:
    packed = a_blocked_pack()
    segments = Segments(packed)
    mask = segments.blocks()
    assert mask is not None
    side = attention.BLOCK
    expected = segments.mask().unfold(2, side, side).unfold(3, side, side)
    assert torch.equal(mask.to_dense().bool(), expected.flatten(-2).any(-1))
    full = torch.zeros_like(mask.to_dense())
    for at in torch.cartesian_prod(*(torch.arange(s) for s in full.shape[:3])).tolist():
        count = mask.full_kv_num_blocks[tuple(at)]
        full[tuple(at)][mask.full_kv_indices[tuple(at)][:count].long()] = 1
    assert torch.equal(full.bool(), expected.flatten(-2).all(-1))
    assert 0 < full.sum() < mask.to_dense().sum() < full.numel()
    assert Segments(a_pack()).blocks() is None  # rows of 40 tokens


def a_blocked_pack() -> PackedImages:
    wide, dot, large, tall = images([(64, 48), (4, 4), (64, 64), (80, 40)])
    return pack([[wide, dot, large], [large, tall], [], [dot]], 4, 512, 3)


def test_flex_attention_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of single tokens; torch reads blocks only where it compiles."""
    packed = a_blocked_pack()
    q, k, v = (x.detach() for x in arguments(packed, torch.float32))
    segments = Segments(packed)
    out = flex_attention(q, k, v, block_mask=segments.blocks())
    torch.testing.assert_close(out, attend(q, k, v, segments=segments), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++")
def test_flex_attention_compiled() -> None:
    packed = a_blocked_pack()
    q, k, v = (x.detach() for x in arguments(packed, torch.float32))
    segments = Segments(packed)
    out = attention.compiled_flex()(q, k, v, block_mask=segments.blocks())
    torch.testing.assert_close(out, attend(q, k, v, segments=segments), atol=1e-5, rtol=1e-5)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_paths_on_a_gpu(scale: float | None, blocked: bool, dtype: torch.dtype) -> None:
    """The kernel for any length in half precision; FlexAttention, or the mask, in float32."""
    packed = a_blocked_pack() if blocked else a_pack()
    moved = PackedImages(*(x.cuda() if isinstance(x, Tensor) else x for x in packed))
    segments = Segments(moved)
    on_cpu = Segments(packed)
    given = [x.detach() for x in arguments(packed, dtype)]
    here = [x.cuda().requires_grad_() for x in given]
    there = [x.float().requires_grad_() for x in given]
    out = attend(*here, segments=segments, scale=scale)
    expected = attend(*there, segments=on_cpu, scale=scale)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    close = {"atol": 2e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(out.float().cpu(), expected, **close)
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(ours.grad.float().cpu(), theirs.grad, **close)


@pytest.mark.parametrize("qk_norm", [None, "layer", "rms", "rms_unscaled"])
@pytest.mark.parametrize("is_pack", [True, False])
def test_norms_of_q_and_k_under_autocast(qk_norm: Any, is_pack: bool) -> None:
    torch.manual_seed(0)
    packed = a_pack()
    layer = Attention(32, 2, BlockStyle(qk_norm=qk_norm))
    x = torch.randn(4, 40, 32)
    segments = Segments(packed) if is_pack else None
    exact = layer(x, None, segments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x, None, segments)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)
    half.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_norms_of_q_and_k_are_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    for kind, factor in (("rms", 16**-0.5), ("rms_unscaled", 1.0)):
        layer = Attention(32, 2, BlockStyle(qk_norm=kind))
        with torch.no_grad():
            layer.q_norm.gamma.normal_()
        q, k, v = layer.qkv(x).view(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k = (
            y / y.square().mean(-1, keepdim=True).sqrt() * norm.gamma
            for y, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
        out = (q @ k.transpose(-1, -2) * factor).softmax(-1) @ v
        expected = layer.proj(out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
