"""Positions: METHODS' values, the published resamplings, and every kind at every place."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed

from modules.backbones import Positions, ViT
from modules.backbones.positions import KINDS, PLACES, RelativeBias
from modules.backbones.resampling import resample_grid, resample_table, sincos2d
from modules.backbones.windows import offsets
from tests.typecheck import unchecked

GOLDEN = Path(__file__).parents[2] / "golden" / "dino_vit.safetensors"

ALL: list[Positions] = []
for kind in KINDS:
    for place in PLACES:
        try:
            ALL.append(Positions(kind, place))
        except ValueError:
            continue
ALL += [Positions(k, p, False) for k in ("learned1d", "learned2d") for p in ("stem", "every")]


def name_of(how: Positions) -> str:
    return f"{how.kind} {how.inject} {'' if how.prefix_rows else 'no prefix rows'}"


def small(positions: Positions, **arguments: Any) -> ViT:
    torch.manual_seed(0)
    options = {"image_size": (32, 48), "patch_size": 8, "num_registers": 2, "positions": positions}
    return ViT("mu", **options | arguments)


def test_there_are_all_kinds_here() -> None:
    assert {how.kind for how in ALL} == set(KINDS) - {"none"}
    assert len(ALL) == 3 + 3 + 2 + 2 + 2 + 4


def test_sines_and_cosines_of_mae() -> None:
    table = sincos2d(8, (2, 2))
    s, c = 0.8415, 0.5403
    expected = [
        [0, 0, 1, 1, 0, 0, 1, 1],
        [s, 0.01, c, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, s, 0.01, c, 1],
        [s, 0.01, c, 1, s, 0.01, c, 1],
    ]
    torch.testing.assert_close(table, torch.tensor(expected), atol=1e-4, rtol=0)
    large = sincos2d(768, (14, 14))
    assert large.double().sum().item() == pytest.approx(69594.494, abs=1e-3)
    torch.testing.assert_close(large[1, :2], torch.tensor([0.8415, 0.8153]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        large[14, 384:386], torch.tensor([0.8415, 0.8153]), atol=1e-4, rtol=0
    )
    vit = ViT("B", positions=Positions("sincos2d"), depth=1)
    assert vit.positions(vit.grid).shape == (1, 197, 768)
    assert not vit.positions(vit.grid)[0, 0].any()


def test_sines_and_cosines_of_big_vision() -> None:
    assert sincos2d(8, (2, 2), big_vision=True)[1, 1].item() == pytest.approx(1e-4, rel=1e-4)
    table = sincos2d(384, (14, 14), big_vision=True)
    assert table.double().sum().item() == pytest.approx(34742.763, abs=1e-3)
    torch.testing.assert_close(table[1, :2], torch.tensor([0.8415, 0.7880]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("new", [(24, 24), (7, 9), (14, 10), (1, 3), (40, 2)])
def test_resampling_equals_timms_and_torchs(new: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 2 + 14 * 10, 6)
    grid = table[0, 2:].view(14, 10, 6)
    expected = resample_abs_pos_embed(table, list(new), [14, 10], num_prefix_tokens=2)
    got = resample_table(table, (14, 10), new, num_prefix=2)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    image = grid.permute(2, 0, 1)[None]
    for how, options in (
        ("bicubic", {"mode": "bicubic"}),
        ("bilinear", {"mode": "bilinear", "align_corners": True}),
    ):
        expected = F.interpolate(image, new, **options)[0].permute(1, 2, 0)
        torch.testing.assert_close(resample_grid(grid, new, how), expected, atol=2e-6, rtol=1e-5)


def test_resampling_is_in_float32_and_has_gradients() -> None:
    grid = torch.randn(4, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = resample_grid(grid, (6, 5))
    assert out.dtype == torch.bfloat16
    exact = resample_grid(grid.float(), (6, 5)).bfloat16()
    assert torch.equal(out, exact)
    out.float().sum().backward()
    assert (grid.grad != 0).all()
    assert resample_grid(grid, (4, 4)) is grid


def test_a_table_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="10 rows is not 2 prefix rows and a grid of 3x3"):
        resample_table(torch.zeros(1, 10, 4), (3, 3), (4, 4), num_prefix=2)


@pytest.mark.parametrize("how", ALL, ids=name_of)
def test_every_kind_changes_the_output_and_learns(how: Positions) -> None:
    images = torch.randn(2, 3, 32, 48)
    vit, without = small(how), small(Positions("none"))
    without.load_state_dict(vit.state_dict(), strict=False)
    tables = [p for n, p in vit.named_parameters() if n.startswith(("positions.", "relative."))]
    with torch.no_grad():
        for parameter in tables:  # larger than at first, so that their effect is
            parameter.normal_()
    out = vit(images)
    assert (out.pooled - without(images).pooled).abs().max() > 0.01
    (out.pooled.square().sum() + out.patches.square().sum()).backward()
    assert bool(tables) == (not how.kind.startswith("sincos"))
    for parameter in tables:
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert {n for n, _ in vit.named_parameters() if n.startswith(("positions.", "relative."))} <= (
        vit.no_weight_decay()
    )


@pytest.mark.parametrize("how", ALL, ids=name_of)
def test_every_kind_takes_another_resolution(how: Positions) -> None:
    vit = small(how).eval()
    features = vit(torch.randn(1, 3, 48, 32))
    assert features.grid == (6, 4)
    assert features.patches.shape == (1, 24, 32)
    assert torch.isfinite(features.pooled).all()


@pytest.mark.parametrize("how", ALL, ids=name_of)
def test_with_positions_the_order_of_patches_matters(how: Positions) -> None:
    with torch.no_grad():
        for positions, differs in ((how, True), (Positions("none"), False)):
            vit = small(positions, num_registers=0, image_size=16).eval()
            for name, parameter in vit.named_parameters():
                if name.startswith(("positions.", "relative.")):
                    parameter.normal_()
            images = torch.randn(1, 3, 16, 16)
            moved = images.roll(8, dims=3)
            change = (vit(images).pooled - vit(moved).pooled).abs().max()
            assert bool(change > 1e-4) == differs


def test_shared_and_own_tables() -> None:
    own, shared = (small(Positions("learned1d", place)) for place in ("every", "every_shared"))
    assert [n for n, _ in own.named_parameters() if n.startswith("positions.")] == [
        "positions.0.table",
        "positions.1.table",
    ]
    assert [n for n, _ in shared.named_parameters() if n.startswith("positions.")] == [
        "positions.table"
    ]
    with torch.no_grad():  # the same tables, the same network
        own.load_state_dict(
            {n: t for n, t in shared.state_dict().items() if not n.startswith("positions.")}
            | {f"positions.{i}.table": shared.positions.table for i in range(2)}
        )
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(own(images).pooled, shared(images).pooled)


def test_relative_bias_is_that_of_the_offset() -> None:
    bias = RelativeBias(2, (2, 3), num_prefix=1, resample="antialias")
    with torch.no_grad():
        bias.table.copy_(torch.arange(3 * 5 * 2).view(3, 5, 2))
        bias.prefix.copy_(torch.tensor([[100.0, 1], [200, 2], [300, 3]]))
    got = bias((2, 3))[0]
    assert got.shape == (2, 7, 7)
    for i in range(6):
        for j in range(6):
            down, across = i // 3 - j // 3, i % 3 - j % 3
            assert torch.equal(got[:, 1 + i, 1 + j], bias.table[down + 1, across + 2])
    assert got[0, 1:, 0].unique().tolist() == [100]  # patches look at the prefix
    assert got[0, 0, 1:].unique().tolist() == [200]
    assert got[0, 0, 0] == 300


def test_swins_index() -> None:
    """METHODS J: the offsets of a 2x2 window, counted from the other end."""
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert offsets((2, 2), (2, 2)).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "learned"}, "positions.kind is 'learned'; expected one of learned1d"),
        ({"inject": "all"}, "positions.inject is 'all'; expected one of stem"),
        ({"kind": "relative", "inject": "stem"}, "act within attention; use every"),
        ({"kind": "sincos2d", "inject": "every"}, "alike in all blocks; use every_shared"),
        (
            {"kind": "none", "inject": "stem"},
            "inject is 'stem', but kind none has no use",
        ),
        ({"kind": "sincos2d", "prefix_rows": False}, "prefix_rows is False, but kind sincos2d"),
        ({"kind": "sincos2d", "resample": "dino"}, "resample is 'dino', but kind sincos2d has no"),
        ({"kind": "relative", "prefix_rows": False}, "kind relative has no use for it"),
        ({"resample": "nearest"}, "positions.resample is 'nearest'"),
    ],
)
def test_errors(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unchecked(Positions, arguments)
    with pytest.raises(ValueError, match="width 30 is no multiple of 4 above 4"):
        ViT("mu", embed_dim=30, num_heads=2, image_size=32, positions=Positions("sincos2d"))


SIZES = ("native", "larger", "local", "rect")


def golden_dino() -> tuple[ViT, dict[str, Any]]:
    """The published network and what it gave at four sizes."""
    with safe_open(GOLDEN, "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    how = {"embed_dim": 48, "depth": 3, "num_heads": 3, "positions": Positions(resample="dino")}
    vit = ViT("mu", 8, 64, **how).eval()
    state = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    state["positions.table"] = state.pop("pos_embed")
    vit.load_state_dict(state, strict=True)
    return vit, golden


@pytest.mark.parametrize("size", SIZES)
def test_dino_at_all_four_sizes(size: str) -> None:
    vit, golden = golden_dino()
    images = golden[f"in.{size}"]
    features = vit(images)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(vit.positions(features.grid), golden[f"pos.{size}"], **close)
    torch.testing.assert_close(features.cls, golden[f"cls.{size}"], **close)
    torch.testing.assert_close(features.patches, golden[f"tokens.{size}"][:, 1:], **close)
    if size == "native":
        last = torch.cat([f.cls for f in vit.last_blocks(images, 2)], dim=1)
        torch.testing.assert_close(last, golden["last2.native"], **close)


def test_dino_at_all_four_sizes_in_one_pass() -> None:
    vit, golden = golden_dino()
    groups = vit([golden[f"in.{size}"] for size in SIZES])
    close = {"atol": 1e-5, "rtol": 1e-5}
    for size, features in zip(SIZES, groups, strict=True):
        torch.testing.assert_close(features.pooled, golden[f"cls.{size}"], **close)
        torch.testing.assert_close(features.patches, golden[f"tokens.{size}"][:, 1:], **close)
