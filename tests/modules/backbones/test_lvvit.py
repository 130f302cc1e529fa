"""LV-ViT against METHODS' exact counts and against the published network."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.checkpoints import inspect
from experiments.subject import open_subject
from modules import weights
from modules.backbones import Backbone, LVViT, Swapped, create
from modules.token_labeling import TokenClassifier
from modules.weights.inspect import describe
from tests.packs import pack

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "lvvit.safetensors")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL: dict[str, Any] = {"image_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
# variant, pixels, parameters with both heads of 1000 classes
COUNTS = [
    ("T", 224, 8_534_720),
    ("S", 224, 26_151_824),
    ("S", 384, 26_297_744),
    ("M", 224, 55_830_544),
    ("M", 384, 56_025_104),
    ("M", 448, 56_131_600),
    ("L", 288, 150_120_272),
    ("L", 448, 150_473_552),
    ("L", 512, 150_657_872),
]
ONE_HEAD = {"T": 8_293_720, "S": 25_766_824, "M": 55_317_544, "L": 149_351_272}


class Heads(nn.Module):
    """A backbone with the heads of the published network, under their names."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, num_classes)
        self.aux_head = nn.Linear(backbone.embed_dim, num_classes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("variant", "side", "expected"), COUNTS)
def test_parameter_counts(variant: str, side: int, expected: int) -> None:
    with torch.device("meta"):
        network = Heads(LVViT(variant, image_size=side), 1000)
    assert count(network) == expected
    if side in (224, 288):
        assert count(network) - count(network.aux_head) == ONE_HEAD[variant]


def published(tmp_path: Path) -> Heads:
    """The golden weights through the shipping converter, every tensor of them."""
    state = {n.removeprefix("weights."): t for n, t in GOLDEN.items() if n.startswith("weights.")}
    save_file(state, tmp_path / "lvvit.safetensors")
    network = Heads(LVViT("S", **SMALL), 10)
    report = weights.load(network, tmp_path / "lvvit.safetensors")
    assert len(report.read) == len(state)
    assert report.renamed == {"positions.table": ("pos_embed",)}
    return network


def test_evaluation_is_that_of_the_published_network(tmp_path: Path) -> None:
    network = published(tmp_path).eval()
    features = network.backbone(GOLDEN["in"])
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(features.cls, GOLDEN["tokens.eval"][:, 0], **close)
    torch.testing.assert_close(features.patches, GOLDEN["tokens.eval"][:, 1:], **close)


def test_training_is_that_of_the_published_network(tmp_path: Path) -> None:
    """Logits, loss and gradients with tokens mixed, to 1e-5."""
    network = published(tmp_path).train()
    close = {"atol": 1e-5, "rtol": 1e-5}
    images, target = GOLDEN["in"], GOLDEN["target"]
    embedded = network.backbone.patch_embed(images)
    torch.testing.assert_close(embedded, GOLDEN["embed.train"].flatten(2).mT, **close)

    top, left, bottom, right = GOLDEN["box"].tolist()
    is_swapped = torch.zeros(4, 4, 4, dtype=torch.bool)
    is_swapped[:, top:bottom, left:right] = True
    mixed = Swapped(images, is_swapped.flatten(1), torch.arange(4).flip(0))
    features = network.backbone(mixed)
    cls, aux = network.head(features.cls), network.aux_head(mixed.over(features.patches))
    torch.testing.assert_close(cls, GOLDEN["cls.train"], **close)
    torch.testing.assert_close(aux, GOLDEN["aux.train"], **close)

    share = 1 - (bottom - top) * (right - left) / 16

    def soft(logits: Tensor, y: Tensor) -> Tensor:
        return -(y * F.log_softmax(logits, dim=-1)).sum(-1).mean()

    label = share * target[:, :, 1] + (1 - share) * target[:, :, 1].flip(0)
    loss = soft(cls, label) + 0.5 * soft(aux, target[:, :, 2:].mT)
    torch.testing.assert_close(loss, GOLDEN["loss.ground_truth_False"], **close)
    loss.backward()
    conv1 = network.backbone.patch_embed.conv1
    torch.testing.assert_close(network.aux_head.weight.grad, GOLDEN["grad_aux_head"], **close)
    torch.testing.assert_close(conv1.weight.grad, GOLDEN["grad_conv1"], **close)


def test_weights_of_another_resolution_are_resampled_as_published(tmp_path: Path) -> None:
    small, large = LVViT("mu", image_size=64), LVViT("mu", image_size=(96, 64))
    torch.save(small.state_dict(), tmp_path / "small.pth")
    report = weights.load(large, tmp_path / "small.pth")
    assert report.resampled == {"positions.table": "resampled from 4x4 to 6x4 (bicubic)"}
    table = small.positions.table[0, 1:].view(4, 4, -1).permute(2, 0, 1)[None]
    expected = F.interpolate(table, (6, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(large.positions.table[0, 1:], expected[0].flatten(1).mT)


@pytest.mark.parametrize(("size", "channels", "patch"), [(16, 1, 4), ((8, 24), 5, 8)])
def test_contract(size: int | tuple[int, int], channels: int, patch: int) -> None:
    network = LVViT("mu", patch, size, channels, drop_path=0.1, dropout=0.1)
    features = network(torch.randn(3, channels, *network.image_size))
    rows, columns = features.grid
    assert (rows * patch, columns * patch) == network.image_size
    assert features.patches.shape == (3, rows * columns, network.embed_dim)
    features.pooled.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # Only where there are other tokens to look at do patches matter to the class token.
        assert parameter.grad.abs().sum() > 0, name
    layers = [network.layer_of(name) for name, _ in network.named_parameters()]
    assert set(layers) == {0, 1, 2, 3}
    assert network.layer_of("patch_embed.bn1.weight") == 0
    assert network.no_weight_decay() == {"cls_token", "positions.table"}


def test_the_residual_scale_divides_both_branches() -> None:
    torch.manual_seed(0)
    one, two = (LVViT("mu", 8, 16, residual_scale=scale) for scale in (1.0, 2.0))
    for block in one.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.normal_(layer.bias)
    two.load_state_dict(one.state_dict())
    for block in two.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data.mul_(2)
            layer.bias.data.mul_(2)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(one.eval()(images).pooled, two.eval()(images).pooled)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"variant": "XL"}, "unknown LV-ViT variant 'XL'; known: mu, T, S, M, L"),
        ({"patch_size": 7, "image_size": 14}, "patch_size is 7; expected an even number"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"stem_dim": 0}, "stem_dim is 0"),
        ({"image_size": 30}, "30x30 is not divisible by patch_size 16"),
    ],
)
def test_errors_name_the_value_and_the_fix(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LVViT(**{"variant": "mu", **arguments})


def test_packs_are_refused() -> None:
    network = create("lvvit", variant="mu", image_size=32)
    assert not network.takes_packs
    with pytest.raises(ValueError, match="a pack reached a LVViT"):
        network(pack([[torch.zeros(3, 32, 32)]], 16, 8, 1, num_prefix=1))


def test_timm_has_no_such_network() -> None:
    with pytest.raises(ValueError, match="timm's ViT has no convolutions before its patches"):
        weights.to_timm(LVViT("mu", image_size=32))


def test_what_inspect_says_of_its_files_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {n.removeprefix("weights."): t for n, t in GOLDEN.items() if n.startswith("weights.")}
    torch.save(state, tmp_path / "lvvit.pth")
    described = describe(state)
    assert (described.writer, described.num_classes, described.others) == ("LV-ViT", 10, ())
    assert inspect([str(tmp_path / "lvvit.pth")]) == 0
    said = capsys.readouterr().out
    model = yaml.safe_load(said.split("fill in:\n")[1])["model"]
    assert model["class_path"] == "modules.TokenLabeling"
    assert "weights_drop" not in model["init_args"]
    backbone = model["init_args"]["backbone"]
    assert backbone["class_path"] == "modules.backbones.LVViT"
    untold = {"num_heads": 3, "residual_scale": 2.0}  # shapes do not tell
    assert {name: backbone["init_args"].pop(name) for name in untold} == dict.fromkeys(untold, "?")
    network = TokenClassifier(LVViT(**backbone["init_args"], **untold), 10, has_aux_head=True)
    weights.load(network, tmp_path / "lvvit.pth")
    torch.testing.assert_close(network.eval()(GOLDEN["in"]), GOLDEN["out.eval"], **CLOSE)


def test_sizes_and_files_of_others_are_told(tmp_path: Path) -> None:
    for variant, image in (("S", 224), ("L", 288)):
        with torch.device("meta"):
            shapes = {n: t.shape for n, t in LVViT(variant, image_size=image).state_dict().items()}
        state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
        told = describe(state).backbone
        assert told is not None
        assert told["variant"] == variant
        assert told.get("image_size", 224) == image
    torch.save(LVViT("mu", 8, 32).state_dict(), tmp_path / "mu.pth")
    assert isinstance(open_subject(str(tmp_path / "mu.pth"), None, None).backbone, LVViT)
    broken = {name: tensor for name, tensor in state.items() if "norm2" not in name}
    assert describe(broken).backbone is None
