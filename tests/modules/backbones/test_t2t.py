"""T2T-ViT against METHODS' counts and a plain restatement of its arithmetic (timm has none)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modules import weights
from modules.backbones import T2TViT, create
from modules.backbones.t2t import SPLITS, VARIANTS, unfold_on_xla
from modules.supervised import Classifier
from tests.modules.backbones.test_vit import count

# Parameters in millions and multiply-adds in milliards as published (METHODS A.13), parameters to
# the integer.
COUNTS: dict[str, tuple[float | None, float, int]] = {
    "7": (4.3, 1.1, 4_306_126),
    "10": (5.9, 1.5, 5_885_134),
    "12": (6.9, 1.8, 6_937_806),
    "14": (21.5, 4.8, 21_541_454),
    "19": (39.2, 8.5, 39_173_326),
    "24": (64.1, 13.8, 64_101_838),
    "t_14": (None, 6.1, 21_541_070),
}


def drawn(network: nn.Module) -> nn.Module:
    """No parameter is left at zero; not so large that the exponentials of the stem vanish."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return network


def counted(depth: int, d: int, ratio: int, is_exact: bool) -> int:
    """Parameters with 1000 classes, summed from the widths."""
    stem = 64 * d * 9 + d
    for inside in (3 * 49, 64 * 9):
        qkv = 3 * 64 * (inside + (not is_exact))
        stem += 2 * inside + qkv + 64 * 65 + 2 * 64 + 2 * 64 * 65
    block = 3 * d * d + d * d + d + 2 * 2 * d + d * ratio * d + ratio * d + ratio * d * d + d
    return stem + depth * block + d + 197 * d + 2 * d + 1000 * (d + 1)


@pytest.mark.parametrize("variant", COUNTS)
def test_counts(variant: str) -> None:
    millions, milliards, exact = COUNTS[variant]
    with torch.device("meta"):
        network = Classifier(T2TViT(variant), 1000)
    size = VARIANTS[variant]
    assert count(network) == exact
    assert exact == counted(size.depth, size.embed_dim, size.mlp_ratio, size.is_exact)
    if millions is not None:
        assert round(exact / 1e6, 1) == millions
    with FlopCounterMode(display=False) as counter:
        network.to("meta")(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(milliards, abs=0.15)


def test_timm_has_none() -> None:
    """Once it has, this file should compare with it."""
    assert not timm.list_models("*t2t*")


def restated(state: dict[str, Tensor], images: Tensor, is_exact: bool) -> Tensor:
    """Logits in evaluation, one pixel window and one token at a time, under published names."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def split(x: Tensor, side: int, stride: int, margin: int) -> Tensor:
        x = F.pad(x, [margin] * 4)
        rows, columns = ((n - side) // stride + 1 for n in x.shape[2:])
        windows = [
            x[:, :, stride * r : stride * r + side, stride * c : stride * c + side].flatten(1)
            for r in range(rows)
            for c in range(columns)
        ]
        return torch.stack(windows, dim=1)

    def mix(name: str, x: Tensor) -> Tensor:
        y = norm(f"{name}.norm1", x)
        if is_exact:
            q, k, v = linear(f"{name}.attn.qkv", y).split(64, dim=-1)
            mixed = (q @ k.mT * y.shape[-1] ** -0.5).softmax(-1) @ v
            mixed = linear(f"{name}.attn.proj", mixed)
            inner, outer = "fc1", "fc2"
        else:
            k, q, v = linear(f"{name}.kqv", y).split(64, dim=-1)
            w = state[f"{name}.w"]

            def phi(z: Tensor) -> Tensor:
                return torch.exp(z @ w.T - (z * z).sum(-1, keepdim=True) / 2) / 32**0.5

            scores = phi(q) @ phi(k).mT  # of all pairs, which the Performer never makes
            mixed = scores @ v / (scores.sum(-1, keepdim=True) + 1e-8)
            mixed = linear(f"{name}.proj", mixed)
            inner, outer = "0", "2"
        y = v + mixed
        return y + linear(
            f"{name}.mlp.{outer}", F.gelu(linear(f"{name}.mlp.{inner}", norm(f"{name}.norm2", y)))
        )

    x, (rows, columns) = split(images, 7, 4, 2), (n // 4 for n in images.shape[2:])
    for stage in (1, 2):
        x = mix(f"tokens_to_token.attention{stage}", x)
        x = split(x.mT.unflatten(2, (rows, columns)), 3, 2, 1)
        rows, columns = rows // 2, columns // 2
    x = linear("tokens_to_token.project", x)
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), dim=1) + state["pos_embed"]
    for i in range(2):
        name = f"blocks.{i}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in qkv.split(32, dim=-1))
        mixed = (q @ k.mT / 4).softmax(-1) @ v
        x = x + linear(f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
        y = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        x = x + linear(f"{name}.mlp.fc2", F.gelu(y))
    return linear("head", norm("norm", x)[:, 0])


def published(network: Classifier, is_exact: bool) -> dict[str, Tensor]:
    """The weights under the names of the published code, and in its order."""
    state = {}
    for name, tensor in network.state_dict().items():
        name = name.removeprefix("backbone.").replace("positions.table", "pos_embed")
        if name.startswith("patch_embed."):
            name = name.replace("patch_embed.", "tokens_to_token.")
            if is_exact:
                name = name.replace(".qkv.", ".attn.qkv.").replace(".proj.", ".attn.proj.")
            else:
                if ".qkv." in name:
                    q, k, v = tensor.split(64)
                    tensor = torch.cat((k, q, v))
                for ours, theirs in ((".qkv.", ".kqv."), (".fc1.", ".0."), (".fc2.", ".2.")):
                    name = name.replace(ours, theirs)
        state[name] = tensor
    return state


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("side", [32, (32, 48)])
def test_published_files_load_and_give_the_restated_logits(
    is_exact: bool, side: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "mu", VARIANTS["mu"]._replace(is_exact=is_exact))
    torch.manual_seed(0)
    written, ours = (Classifier(T2TViT("mu", side), 5).double() for _ in range(2))
    drawn(written)
    state = published(written, is_exact)
    torch.save({"state_dict_ema": state}, tmp_path / "t2t.pth")
    weights.load(ours, tmp_path / "t2t.pth")
    images = torch.randn(2, 3, *ours.backbone.image_size, dtype=torch.float64)
    expected = restated(state, images, is_exact)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours.eval()(images), expected, atol=1e-9, rtol=1e-9)

    leaves = {name: tensor.detach().clone() for name, tensor in state.items()}
    for name, tensor in leaves.items():
        tensor.requires_grad_(name != "pos_embed" and not name.endswith(".w"))
    restated(leaves, images, is_exact).square().sum().backward()
    ours(images).square().sum().backward()
    for parameter in ours.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, gradient in published(ours, is_exact).items():
        if leaves[name].grad is not None:
            torch.testing.assert_close(gradient, leaves[name].grad, msg=name)


def test_positions_are_fixed_sines_and_cosines() -> None:
    network = T2TViT("mu", 32)
    table = network.positions.table
    assert not table.requires_grad
    for p in range(5):
        for i in range(32):
            wave = np.cos if i % 2 else np.sin
            assert table[0, p, i].item() == pytest.approx(
                wave(p / 10_000 ** (i // 2 * 2 / 32)), abs=1e-6
            )


def test_the_performer_is_close_to_softmax() -> None:
    """Of short queries and keys, where 32 random features are enough."""
    torch.manual_seed(0)
    mixing = T2TViT("mu", 32).patch_embed.attention1
    q, k, v = (torch.randn(1, 50, 64) * scale for scale in (0.03, 0.03, 1.0))
    exact = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(mixing.linear_attention(q, k, v), exact, atol=0.05, rtol=0)


def test_contract_at_other_sizes_and_groups() -> None:
    torch.manual_seed(0)
    network = drawn(create("t2t", variant="mu", image_size=32, in_channels=5))
    for height, width in ((32, 32), (16, 48), (64, 16)):
        features = network(torch.randn(2, 5, height, width))
        assert features.grid == (height // 16, width // 16)
        assert features.patches.shape == (2, height * width // 256, 32)
    features.pooled.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match="40x32 is not divisible by patch_size 16"):
        network(torch.zeros(1, 5, 40, 32))


def test_dropout_of_the_stem_is_the_published() -> None:
    stem = T2TViT("mu", 32).patch_embed
    assert stem.attention1.drop.p == stem.attention2.drop.p == 0.1
    assert T2TViT("t_14", 32, depth=1).patch_embed.attention1.drop.p == 0.0


def test_timm_cannot_express_it() -> None:
    with pytest.raises(ValueError, match="timm's ViT has no tokens of tokens"):
        weights.to_timm(T2TViT("mu", 32))
    with pytest.raises(ValueError, match="unknown T2T-ViT '13'; known: mu, 7"):
        T2TViT("13")


def test_groups_in_evaluation() -> None:
    """In training the stem's dropout is drawn anew for each."""
    torch.manual_seed(0)
    network = drawn(T2TViT("mu", 32)).eval()
    sizes = ((2, 32, 32), (3, 16, 48))
    crops = [torch.randn(b, 3, h, w) for b, h, w in sizes]
    for together, alone in zip(network(crops), [network(crop) for crop in crops], strict=True):
        torch.testing.assert_close(together.patches, alone.patches, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.pooled, alone.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_a_convolution_unfolds(split: tuple[int, int, int]) -> None:
    (side, stride, margin), x = split, torch.randn(2, 3, 32, 24)
    unfolded = F.unfold(x, side, 1, margin, stride)
    torch.testing.assert_close(unfold_on_xla(x, side, 1, margin, stride), unfolded, rtol=0, atol=0)
