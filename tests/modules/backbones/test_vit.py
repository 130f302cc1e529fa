"""ViT against METHODS' exact counts and against timm."""

import pytest
import timm
import torch

from modules.backbones import Features, ViT, create
from modules.backbones.vit import check_choice
from modules.supervised import Classifier
from modules.weights.names import with_our_names

# variant, patch, parameters at 224 px with 1000 classes and at 384 px, and of the backbone alone
COUNTS = [
    ("Ti", 16, 5_717_416, 5_790_376, 5_524_416),
    ("S", 32, 22_878_952, 22_915_432, 22_493_952),
    ("S", 16, 22_050_664, 22_196_584, 21_665_664),
    ("S", 8, 22_055_272, 22_638_952, 21_670_272),
    ("B", 32, 88_224_232, 88_297_192, 87_455_232),
    ("B", 16, 86_567_656, 86_859_496, 85_798_656),
    ("B", 8, 86_576_872, 87_744_232, 85_807_872),
    ("L", 32, 306_535_400, 306_632_680, 305_510_400),
    ("L", 16, 304_326_632, 304_715_752, 303_301_632),
    ("L", 14, 304_203_752, None, 303_178_752),
    ("H", 14, 632_045_800, None, 630_764_800),
    ("H", 16, 632_199_400, 632_685_800, 630_918_400),
]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("variant", "patch", "at_224", "at_384", "alone"), COUNTS)
def test_parameter_counts(
    variant: str, patch: int, at_224: int, at_384: int | None, alone: int
) -> None:
    with torch.device("meta"):
        small = Classifier(ViT(variant, patch), 1000)
        assert count(small) == at_224
        assert count(small.backbone) == alone
        if at_384 is not None:
            assert count(Classifier(ViT(variant, patch, image_size=384), 1000)) == at_384


def test_average_pooling_saves_the_class_token() -> None:
    with torch.device("meta"):
        assert count(Classifier(ViT("B", pooling="avg", class_token=False), 1000)) == 86_566_120


def test_m_is_as_wide_as_deit3_medium() -> None:
    # DeiT-III-M has layer scale (24 x 512) and no position for the class token (512) on top.
    with torch.device("meta"):
        assert count(Classifier(ViT("M"), 1000)) + 24 * 512 - 512 == 38_849_512


TIMM = [
    ("vit_tiny_patch16_224", {}, {"variant": "Ti"}),
    ("vit_small_patch16_224", {}, {"variant": "S"}),
    ("vit_small_patch32_224", {}, {"variant": "S", "patch_size": 32}),
    ("vit_base_patch32_224", {}, {"variant": "B", "patch_size": 32}),
    ("vit_base_patch16_224", {}, {"variant": "B"}),
    ("vit_tiny_patch16_384", {}, {"variant": "Ti", "image_size": 384}),
    ("deit_small_patch16_224", {}, {"variant": "S"}),
    (
        "vit_tiny_patch16_224",
        {"img_size": (64, 96), "in_chans": 5, "num_classes": 7},
        {"variant": "Ti", "image_size": (64, 96), "in_channels": 5},
    ),
    (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "class_token": False},
        {"variant": "Ti", "pooling": "avg", "class_token": False},
    ),
]


def classifier_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours, _ = with_our_names(theirs)
    return {n if n.startswith("head.") else f"backbone.{n}": tensor for n, tensor in ours.items()}


@pytest.mark.parametrize(("name", "timm_args", "our_args"), TIMM)
def test_logits_and_gradients_equal_timm(name: str, timm_args: dict, our_args: dict) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, **timm_args)
    for parameter in theirs.parameters():  # biases and tokens are zero at first: make them count
        torch.nn.init.normal_(parameter, std=0.03)
    ours = Classifier(ViT(**our_args), theirs.num_classes)
    ours.load_state_dict(classifier_names(theirs.state_dict()), strict=True)
    backbone = ours.backbone
    images = torch.randn(2, backbone.in_channels, *backbone.image_size)

    expected, got = theirs.train()(images), ours.train()(images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    got.square().mean().backward()
    reference = classifier_names({n: p.grad for n, p in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[key], atol=1e-5, rtol=1e-4)

    features = backbone(images)
    if features.cls is not None:
        tokens = theirs.forward_features(images)
        torch.testing.assert_close(features.patches, tokens[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "avg"])
@pytest.mark.parametrize(("size", "channels", "patch"), [(16, 1, 4), ((8, 24), 5, 8)])
def test_contract(pooling: str, size: int | tuple[int, int], channels: int, patch: int) -> None:
    vit = ViT("mu", patch, size, channels, pooling, pooling == "cls", drop_path=0.1, dropout=0.1)
    images = torch.randn(3, channels, *vit.image_size)
    features = vit(images)
    assert isinstance(features, Features)
    rows, columns = features.grid
    assert (rows * patch, columns * patch) == vit.image_size
    assert features.pooled.shape == (3, vit.embed_dim)
    assert features.patches.shape == (3, rows * columns, vit.embed_dim)
    assert (features.cls is None) == (pooling == "avg")
    features.pooled.square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # A bias of the keys shifts all scores of a row alike: softmax does not see it.
        assert parameter.grad.abs().sum() > 0, name
    vit.eval()
    torch.testing.assert_close(vit(images).pooled, vit(images).pooled, rtol=0, atol=0)


def test_patches_are_in_row_major_order() -> None:
    vit = ViT("mu", patch_size=4, image_size=(8, 12)).eval()
    image = torch.zeros(1, 3, 8, 12)
    image[:, :, 4:8, 0:4] = 1.0  # row 1, column 0
    changed = (vit.patch_embed(image) - vit.patch_embed(torch.zeros_like(image))).abs().sum(-1)
    assert changed[0].nonzero().flatten().tolist() == [3]


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    from modules.backbones.layers import DropPath, drop_path_rates

    torch.manual_seed(0)
    branch = DropPath(0.25)
    out = branch(torch.ones(20_000, 2, 3))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert (out[:, :1, :1] == out).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(branch.eval()(torch.ones(4, 2, 3)), torch.ones(4, 2, 3))
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_every_regulariser_changes_training_and_nothing_else() -> None:
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    plain = ViT("mu", image_size=32)
    for option in ({"dropout": 0.3}, {"drop_path": 0.5}):
        other = ViT("mu", image_size=32, **option)
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(other.train()(images).pooled, plain(images).pooled)
        torch.testing.assert_close(other.eval()(images).pooled, plain(images).pooled)


def test_dropout_stands_where_the_paper_puts_it() -> None:
    vit = ViT("mu", image_size=32, dropout=0.1)
    rates = {name: m.p for name, m in vit.named_modules() if isinstance(m, torch.nn.Dropout)}
    places = {"pos_drop"} | {f"blocks.{i}.{n}" for i in range(2) for n in ("attn.drop", "mlp.drop")}
    assert rates == dict.fromkeys(places, 0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image_size": 30}, "30x30 is not divisible by patch_size 16.*32x32"),
        ({"variant": "XXL"}, "unknown ViT variant 'XXL'; known: mu, Ti"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; expected a rate in \[0, 1\)"),
        ({"embed_dim": 30, "num_heads": 4}, "width 30 is not divisible by 4 heads"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_errors_name_the_value_and_the_fix(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ViT(**arguments)


def test_unknown_pooling_is_no_silent_average() -> None:
    with pytest.raises(ValueError, match="pooling 'max' is not known; expected one of cls, avg"):
        check_choice("pooling", "max", ("cls", "avg"))


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 1 channels reached a ViT built for 3"):
        ViT("mu", image_size=32)(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"32x40 is not divisible by patch_size 16"):
        ViT("mu", image_size=32)(torch.zeros(1, 3, 32, 40))


def test_create_names_the_argument_that_was_meant() -> None:
    assert isinstance(create("vit", variant="mu", image_size=32), ViT)
    with pytest.raises(ValueError, match="no argument 'patchsize'; did you mean 'patch_size'"):
        create("vit", patchsize=4)
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg'; known: hybrid, .*, vit$"):
        create("vgg")
