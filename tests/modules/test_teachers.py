"""Dense teachers: every cell's scores are what the network itself makes of that cell."""

import pytest
import timm
import torch

from modules.backbones import LVViT, Timm, ViT
from modules.supervised import Classifier
from modules.teachers import DenseTimm, dense, keep_best
from modules.token_labeling import TokenClassifier

CLOSE = {"atol": 1e-5, "rtol": 1e-5}

# Networks that average cells just before a linear classifier, and what comes between in others
LINEAR = ["test_resnet.r160_in1k", "test_efficientnet.r160_in1k"]
OTHERS = ["test_convnext.r160_in1k", "test_vit.r160_in1k", "test_mambaout"]


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"img_size": (64, 96)} if "vit" in name else {}
    return timm.create_model(name, num_classes=7, **size).eval()


@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_over_cells_is_the_networks_own_answer(name: str) -> None:
    teacher, images = network(name), torch.randn(2, 3, 64, 96)
    scores = DenseTimm(teacher)(images)
    assert scores.shape[:2] == (2, 7)
    assert scores.shape[2] < scores.shape[3]
    torch.testing.assert_close(scores.mean((2, 3)), teacher(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_each_cell_goes_through_all_that_comes_before_the_classifier(name: str) -> None:
    """A network that sees the same cell everywhere says of the image what it says of the cell."""
    teacher, images = network(name), torch.randn(2, 3, 64, 96)
    features = teacher.forward_features(images)
    scores = DenseTimm(teacher)(images)
    if features.ndim == 3:
        cell = features[:, teacher.num_prefix_tokens + 4]
        alike = cell[:, None].expand_as(features)
        place = (4 // scores.shape[3], 4 % scores.shape[3])
    else:
        place, channels_last = (0, 1), features.shape[3] == teacher.num_features
        alike = features[:, :1, 1:2] if channels_last else features[:, :, :1, 1:2]
        alike = alike.expand_as(features)
    torch.testing.assert_close(
        scores[:, :, place[0], place[1]], teacher.forward_head(alike), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("pooling", ["avg", "norm_avg", "cls"])
def test_backbones_of_ours(pooling: str) -> None:
    torch.manual_seed(0)
    vit = ViT("mu", 8, (16, 24), pooling=pooling)  # type: ignore[arg-type]
    classifier = Classifier(vit, 5).eval()
    torch.nn.init.normal_(classifier.head.bias)
    teacher = dense(vit, {"head": classifier.head})
    images = torch.randn(2, 3, 16, 24)
    scores = teacher(images)
    assert scores.shape == (2, 5, 2, 3)
    if pooling == "norm_avg":
        torch.testing.assert_close(scores.mean((2, 3)), classifier(images), atol=1e-5, rtol=1e-5)
    patch = vit(images).patches[:, 4]
    patch = vit.fc_norm(patch) if pooling == "avg" else patch
    torch.testing.assert_close(scores[:, :, 1, 1], classifier.head(patch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_convnext.r160_in1k"])
def test_timm_networks_under_a_head_of_ours(name: str) -> None:
    """What timm does between pooling and classifier (ConvNeXt's norm) is done to every cell."""
    torch.manual_seed(0)
    classifier = Classifier(Timm(name, (64, 96)), 5).eval()
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    teacher = dense(classifier.backbone, {"head": classifier.head})
    images = torch.randn(2, 3, 64, 96)
    scores = teacher(images)
    assert scores.shape == (2, 5, 2, 3)
    if "resnet" in name:
        torch.testing.assert_close(scores.mean((2, 3)), classifier(images), atol=1e-5, rtol=1e-5)
    model = classifier.backbone.model
    cell = model.forward_features(images)[:, :, 1:, 1:2]
    expected = classifier.head(model.forward_head(cell, pre_logits=True))
    torch.testing.assert_close(scores[:, :, 1, 1], expected, atol=1e-5, rtol=1e-5)


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """With values that make every part of it count."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.parametrize("backbone", ["vit", "test_convnext.r160_in1k", "mobilenetv3_small_050"])
def test_a_head_of_patches_reads_them_as_it_was_trained(backbone: str) -> None:
    torch.manual_seed(0)
    made = ViT("mu", 16, 64, pooling="avg") if backbone == "vit" else Timm(backbone, 64)
    classifier = drawn(TokenClassifier(made, 5, has_aux_head=True))
    images = torch.randn(2, 3, 64, 64)
    expected = classifier.aux_head(made(images).patches)
    found = dense(made, {"head": classifier.head, "aux_head": classifier.aux_head})(images)
    torch.testing.assert_close(found.flatten(2).mT, expected, **CLOSE)


@pytest.mark.parametrize("options", [{"pre_logits": True}, {"distillation_token": True}])
def test_each_patch_is_read_out_as_the_pooled_one(options: dict) -> None:
    torch.manual_seed(0)
    vit = ViT("mu", 8, (16, 24), pooling="avg", **options)
    classifier = drawn(Classifier(vit, 5))
    heads = {"head": classifier.head}
    if classifier.head_dist is not None:
        heads["head_dist"] = classifier.head_dist
    images = torch.randn(2, 3, 16, 24)
    found = dense(vit, heads)(images)[:, :, 1, 1]
    # As if this patch were all patches, and the distillation token.
    patch = vit(images).patches[:, 4:5]
    features = vit.pool(patch.expand(-1, vit.num_prefix_tokens + 6, -1), (2, 3))
    expected = classifier.head(features.pooled)
    if classifier.head_dist is not None:
        expected = (expected + classifier.head_dist(features.dist)) / 2
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ["mixer_s32_224", "levit_128s", "xcit_nano_12_p16_224"])
def test_tokens_of_a_grid_that_nothing_but_their_number_tells(name: str) -> None:
    torch.manual_seed(0)
    teacher, images = timm.create_model(name, num_classes=7).eval(), torch.randn(1, 3, 224, 224)
    scores = DenseTimm(teacher)(images)
    assert scores.shape[2] == scores.shape[3] == {"m": 7, "l": 4, "x": 14}[name[0]]
    if name[0] != "x":  # which reads its class token
        torch.testing.assert_close(scores.mean((2, 3)), teacher(images), **CLOSE)
    ours = Timm(name)
    assert dense(ours, {"head": torch.nn.Linear(ours.embed_dim, 3)})(images).shape[1] == 3


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "pit_ti_224"])
def test_a_network_without_a_grid_is_refused(name: str) -> None:
    teacher = DenseTimm(timm.create_model(name, num_classes=7))
    with pytest.raises(ValueError, match=r"no map of cells; take another teacher"):
        teacher(torch.zeros(1, 3, *teacher.network.pretrained_cfg["input_size"][1:]))


def test_attention_pooling_is_refused() -> None:
    vit = ViT("mu", 8, 16, pooling="map")
    with pytest.raises(ValueError, match="this teacher pools by attention"):
        dense(vit, {"head": torch.nn.Linear(32, 5)})
    teacher = dense(LVViT("mu", 8, 16), {"head": torch.nn.Linear(32, 5)})
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_best_are_kept_and_the_others_summed() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 3, 4) * 4
    found = keep_best(scores, 2, remainder=True)
    assert found.scores.shape == found.ids.shape == (2, 3, 4, 2)
    assert (found.scores.dtype, found.ids.dtype) == (torch.float32, torch.int32)
    cells = scores.movedim(1, -1)
    picked = cells.gather(-1, found.ids.long())
    torch.testing.assert_close(picked, found.scores)
    assert torch.equal(picked[..., 0], cells.amax(-1))
    total = torch.cat((found.scores.float(), found.remainder[..., None].float()), -1).logsumexp(-1)
    torch.testing.assert_close(total, cells.logsumexp(-1), atol=1e-2, rtol=1e-2)
    assert keep_best(scores, 2, remainder=False).remainder is None
    assert keep_best(scores, 6, remainder=True).remainder.isfinite().all()
