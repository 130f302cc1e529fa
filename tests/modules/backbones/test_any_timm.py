"""Networks of timm's as backbones, against timm itself; every method and evaluation takes them."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback, seed_everything
from timm.optim import param_groups_layer_decay

from callbacks.knn import KNN
from datamodules import MultiCropDataModule
from experiments.costs import backbone_name, cost
from experiments.runs import Run
from experiments.start import take_weights
from experiments.subject import open_subject
from modules import DINO, LinearProbe, MoCo, weights
from modules.backbones import Features, Masked, Timm, create
from modules.drawing import pictures_of
from modules.groups import layer_scale
from modules.ibot import MaskedPatches
from modules.networks import teaching
from modules.optim import Optimization
from modules.supervised import Classifier
from tests import small

# Kinds: tokens with a class token, tokens with registers alone, maps with the channels first (batch
# norm, layer norm, activations within norms) and last, a map narrower than what is pooled.
NAMES = ("test_vit", "test_vit2", "test_resnet", "test_convnext", "test_efficientnet")
NAMES += ("test_mambaout",)
ONE_SIZE = "test_coatnet"  # attention with biases for one size
SGD = Optimization(name="sgd", base_lr=0.01, reference_batch=None, warmup_epochs=0.0)


def timms(name: str, side: int = 64, **changes: Any) -> Any:
    """timm's own network for images of this side, with every parameter and statistic at random."""
    size = {"img_size": side} if "vit" in name or name == ONE_SIZE else {}
    network = timm.create_model(name, **size | changes)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn.abs() + 0.5 if key.endswith("running_var") else 0.1 * drawn)
    return network


def ours(name: str, **changes: Any) -> Timm:
    return Timm(name, **{"image_size": 64} | changes)


@pytest.mark.parametrize("name", [*NAMES, ONE_SIZE])
def test_features_are_timms(name: str) -> None:
    theirs, backbone = timms(name, num_classes=0, in_chans=5), ours(name, in_channels=5)
    backbone.model.load_state_dict(theirs.state_dict(), strict=True)
    for mode in (False, True):  # the statistics of batch norms are those of the batch in training
        backbone.train(mode)
        theirs.train(mode)
        images = torch.randn(3, 5, 64, 64)
        features, maps = backbone(images), theirs.forward_features(images)
        pooled = theirs.forward_head(maps, pre_logits=True)
        torch.testing.assert_close(features.pooled, pooled, atol=1e-5, rtol=1e-5)
    rows, columns = features.grid
    assert isinstance(features, Features)
    assert (rows * backbone.patch_size, columns * backbone.patch_size) == backbone.image_size
    assert features.pooled.shape == (3, backbone.embed_dim)
    assert features.patches.shape == (3, rows * columns, backbone.patch_dim)
    assert (features.cls is None) == (name != "test_vit")
    assert torch.isfinite(features.patches).all()
    if maps.ndim == 3:
        assert torch.equal(features.patches, maps[:, backbone.num_prefix_tokens :])
        assert backbone.num_prefix_tokens == theirs.num_prefix_tokens
    else:  # row by row
        channel_last = maps if maps.shape[-1] == backbone.patch_dim else maps.movedim(1, -1)
        assert torch.equal(features.patches[:, columns], channel_last[:, 1, 0])


@pytest.mark.parametrize("name", [*NAMES, ONE_SIZE])
def test_every_parameter_learns(name: str) -> None:
    backbone = ours(name, image_size=96)
    backbone(torch.randn(4, 3, 96, 96)).pooled.square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_and_groups(name: str) -> None:
    backbone = ours(name).eval()
    groups = [torch.randn(2, 3, 64, 64), torch.randn(3, 3, 96, 32)]
    together = backbone(groups)
    for features, images in zip(together, groups, strict=True):
        alone = backbone(images)
        torch.testing.assert_close(features.pooled, alone.pooled)
        stride, grid = backbone.patch_size, features.grid
        assert grid == (images.shape[2] // stride, images.shape[3] // stride)
        assert features.patches.shape[1] == grid[0] * grid[1]
    uneven = backbone(torch.randn(1, 3, 80, 112))  # strides of 32 do not divide it
    assert uneven.patches.shape[1] == uneven.grid[0] * uneven.grid[1]


def test_a_network_of_one_size_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"test_coatnet, built for 64x64, does not take images of 9"
    ):
        ours(ONE_SIZE).eval()(torch.randn(1, 3, 96, 96))
    assert ours(ONE_SIZE, image_size=96)(torch.randn(2, 3, 96, 96)).grid == (3, 3)
    assert Timm("test_resnet").image_size == (160, 160)  # timm's own


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_last_blocks(name: str) -> None:
    backbone, images = ours(name).eval(), torch.randn(2, 3, 64, 64)
    *before, last = backbone.last_blocks(images, 3)
    for one, other in zip(last, backbone(images), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert [features.pooled.shape for features in before] == [last.pooled.shape] * 2
    assert not torch.allclose(before[1].pooled, last.pooled)
    with pytest.raises(ValueError, match=r"last 99 blocks of timm's test_vit2? cannot be read"):
        backbone.last_blocks(images, 99)
    with pytest.raises(ValueError, match=r"differ in width or grid; set num_blocks to 1"):
        ours("test_resnet").last_blocks(images, 2)


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_decay_are_timms(name: str) -> None:
    theirs, network = timms(name, num_classes=10), Classifier(ours(name), 10)
    groups = param_groups_layer_decay(
        theirs, 0.05, theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else (), ()
    )
    expected = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    exempt, ids = network.backbone.no_weight_decay(), dict(theirs.named_parameters())
    for key, parameter in network.backbone.named_parameters():
        scale, decay = expected[id(ids[key.removeprefix("model.")])]
        assert layer_scale(network, f"backbone.{key}", 0.75) == pytest.approx(scale), key
        assert (parameter.ndim < 2 or key in exempt) == (decay == 0), key
    assert layer_scale(network, "head.weight", 0.75) == 1.0
    assert min(map(network.backbone.layer_of, dict(network.backbone.named_parameters()))) == 0


@pytest.mark.parametrize("name", NAMES)
def test_timms_files_load_strictly_and_go_back(name: str, tmp_path: Path) -> None:
    theirs, network = timms(name, num_classes=7).eval(), Classifier(ours(name), 7).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    weights.load(network, tmp_path / "timm.pth")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images), theirs(images), atol=1e-5, rtol=1e-5)
    arguments = weights.timm_arguments(network)
    again = timm.create_model(**arguments, **({"img_size": 64} if "vit" in name else {})).eval()
    again.load_state_dict(weights.to_timm(network), strict=True)
    assert torch.equal(again(images), theirs(images))

    alone = ours(name).eval()
    report = weights.load_backbone(alone, tmp_path / "timm.pth")
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert report.kept == ()
    assert torch.equal(alone(images).pooled, network.backbone(images).pooled)

    run = {"pytorch-lightning_version": "2", "state_dict": network.state_dict(prefix="classifier.")}
    torch.save(run, tmp_path / "ours.ckpt")
    other = ours(name).eval()
    weights.load_backbone(other, tmp_path / "ours.ckpt")
    assert torch.equal(other(images).pooled, alone(images).pooled)


def test_a_file_for_another_size_is_resampled_by_timm(tmp_path: Path) -> None:
    torch.save(timms("test_vit", 160).state_dict(), tmp_path / "timm.pth")
    network, images = (
        Classifier(ours("test_vit", image_size=96), 1000).eval(),
        torch.randn(2, 3, 96, 96),
    )
    weights.load(network, tmp_path / "timm.pth")
    theirs = timms("test_vit", 160).eval()
    theirs.set_input_size(img_size=96)
    torch.testing.assert_close(network(images), theirs(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"does not fit the network, and nothing was loaded"):
        weights.load(Classifier(ours("test_resnet"), 1000), tmp_path / "timm.pth")


def test_timms_trained_weights_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def create_model(name: str, pretrained: bool = False, **changes: Any) -> Any:
        if not pretrained:
            return real(name, **changes)
        torch.manual_seed(5)
        return real(name, **changes)

    monkeypatch.setattr(timm, "create_model", create_model)
    name = "test_resnet.r160_in1k"
    subject = open_subject(f"timm:{name}", None, None)
    expected = create_model(name, pretrained=True).state_dict()
    assert isinstance(subject.backbone, Timm)
    assert torch.equal(subject.backbone.model.conv1[0].weight, expected["conv1.0.weight"])
    assert subject.mean == tuple(timm.get_pretrained_cfg(name).mean)

    recipe = "experiments/finetune/small.yaml"
    recipe = str(Path(__file__).parents[3] / recipe)
    command = take_weights(["fit", "--config", recipe, "--weights", f"timm:{name}"])
    said = json.loads(next(c for c in command if "init_args.backbone=" in c).partition("=")[2])
    assert said == {"class_path": "modules.backbones.Timm", "init_args": {"name": name}}


def test_batch_norms_see_each_group_and_remember_the_first() -> None:
    backbone = ours("test_resnet").train()
    whole, crops = torch.randn(8, 3, 64, 64), 3 + torch.randn(8, 3, 32, 32)
    alone, other = copy.deepcopy(backbone), copy.deepcopy(backbone)
    first, second = backbone([whole, crops])
    assert torch.equal(first.pooled, alone(whole).pooled)
    assert torch.equal(second.pooled, other(crops).pooled)  # by their own statistics
    remembered = dict(backbone.named_buffers())
    for key, value in alone.named_buffers():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(remembered[key], value), key
    assert not torch.equal(remembered["model.bn1.running_mean"], other.model.bn1.running_mean)
    assert backbone.model.bn1.momentum == alone.model.bn1.momentum == 0.1


def test_biases_that_timm_keeps_in_eval_mode_follow_their_weights() -> None:
    backbone, images = Timm("levit_128s", image_size=64).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(images).pooled
        for key, parameter in backbone.named_parameters():
            if key.endswith("attention_biases"):  # as an average moves on
                parameter.normal_()
        after, fresh = backbone(images).pooled, Timm("levit_128s", image_size=64).eval()
        fresh.load_state_dict(backbone.state_dict())
        assert not torch.equal(before, after)
        assert torch.equal(fresh(images).pooled, after)


def test_sync_batchnorm_never_takes_activations_away() -> None:
    plain = torch.nn.SyncBatchNorm.convert_sync_batchnorm(ours("test_resnet"))
    assert isinstance(plain.train().model.bn1, torch.nn.SyncBatchNorm)
    fused = torch.nn.SyncBatchNorm.convert_sync_batchnorm(ours("test_efficientnet"))
    with pytest.raises(ValueError, match=r"sync_batchnorm has replaced norms of timm's test_effic"):
        fused(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "resnet999"}, "timm knows no model 'resnet999'"),
        ({"name": "resnet5"}, "timm knows no model 'resnet5'; there is .*resnet50"),
        ({"name": "hf-hub:timm/resnet50"}, "timm knows no model 'hf-hub:timm/resnet50'"),
        ({"name": "test_vit", "drop_path": 1.0}, r"drop_path is 1\.0; expected a rate in \[0, 1\)"),
        ({"name": "dla46_c", "drop_path": 0.1}, r"timm's dla46_c does not take drop_path"),
        ({"name": "test_vit", "options": {"dept": 2}}, r"timm's test_vit does not take dept"),
        ({"name": "test_vit", "options": {"img_size": 32}}, r"not for timm here: use image_size"),
        ({"name": "test_vit", "image_size": 8}, r"timm's test_vit|timm cannot build test_vit"),
        ({"name": "coat_tiny"}, "coat_tiny gives no single map of features"),
    ],
)
def test_errors_name_the_value_and_the_fix(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Timm(**arguments)


def test_options_reach_timm() -> None:
    shallow = create("timm:test_vit", image_size=64, drop_path=0.3, options={"depth": 2})
    assert isinstance(shallow, Timm)
    assert (shallow.num_layers, len(shallow.model.blocks)) == (2, 2)
    images = torch.randn(8, 3, 64, 64)
    assert not torch.equal(shallow(images).pooled, shallow(images).pooled)
    assert torch.equal(shallow.eval()(images).pooled, shallow(images).pooled)


def test_what_it_does_not_take_is_refused() -> None:
    backbone = ours("test_resnet")
    with pytest.raises(
        ValueError, match="images of 1 channels reached timm's test_resnet built fo"
    ):
        backbone(torch.randn(1, 1, 64, 64))
    masked = Masked(
        torch.randn(1, 3, 64, 64), torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 96)
    )
    with pytest.raises(ValueError, match=r"masked patches reached it; use modules.backbones.ViT"):
        backbone(masked)
    with pytest.raises(ValueError, match="Timm takes no masks; set masked_patches to null or use"):
        DINO(backbone, masked_patches=MaskedPatches())
    with pytest.raises(ValueError, match="Timm test_resnet has none; set freeze_patches to false"):
        MoCo(backbone)
    assert (backbone.takes_packs, backbone.takes_masks) == (False, False)


def two_views(**changes: Any) -> MultiCropDataModule:
    given = {"source": "digits", "channels": 1, "mean": (0.5,), "std": (0.5,), "num_workers": 0}
    given |= {"image_size": 64, "local_size": 32, "num_local": 1, "batch_size": 4}
    return MultiCropDataModule(**given | changes)


def changed(before: dict[str, Any], network: torch.nn.Module) -> set[str]:
    return {n for n, p in network.named_parameters() if not torch.equal(before[n], p)}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_mambaout"])
def test_two_steps_of_every_method(name: str, tmp_path: Path) -> None:
    def backbone() -> Timm:
        seed_everything(0, verbose=False)
        return ours(name, in_channels=1)

    start = {n: p.clone() for n, p in backbone().named_parameters()}
    heads = {"num_prototypes": 16, "hidden_dim": 8, "bottleneck_dim": 4, "freeze_last_layer": 0}
    has_patches = "vit" in name
    dino = DINO(backbone(), SGD, **heads, stop_on_collapse=False)
    moco = MoCo(backbone(), SGD, 8, 4, freeze_patches=has_patches)
    supervised = small.method(backbone=backbone(), optimizer=SGD)
    for method, data, network in (
        (dino, two_views(), "student"),
        (moco, two_views(num_local=0), "student"),
        (supervised, small.data(image_size=64, batch_size=4), "classifier"),
    ):
        checkpoint = small.Checkpoint(every_n_steps=2, monitor=None)
        knn = [KNN(k=[2], max_bank=8)] if method is dino else []
        trainer = small.trainer(
            *(tmp_path, *knn), max_steps=2, limit_val_batches=1, checkpoint=checkpoint
        )
        trainer.fit(method, data)
        assert trainer.global_step == 2
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
        moved = changed(start, method.networks()[network].backbone)
        still = set(start) - moved
        assert {n for n in still if "patch_embed" in n} == (
            {n for n in start if "patch_embed" in n} if method is moco and has_patches else set()
        )
        assert len(moved) > len(start) // 2


class Watch(Callback):
    """The global views that the teacher saw, and its modes."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.trains: set[str] = set()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
        self.seen.append(batch.crops[0].flatten(0, 1).clone())
        self.trains |= {type(m).__name__ for m in module.teacher.modules() if m.training}


@pytest.mark.parametrize("family", [DINO, MoCo])
def test_a_teachers_batch_norms_go_by_its_own_global_views(family: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    backbone, watch = ours("test_resnet", in_channels=1, drop_path=0.5), Watch()
    still = replace(SGD, base_lr=0.0)  # the weights stay; what moves is remembered
    own = {"num_prototypes": 16, "bottleneck_dim": 4, "stop_on_collapse": False}
    own = own if family is DINO else {"projection_dim": 4, "freeze_patches": False}
    method = family(copy.deepcopy(backbone), still, hidden_dim=8, **own)
    trainer = small.trainer(
        *(tmp_path, watch),
        max_steps=3,
        limit_train_batches=2,
        limit_val_batches=1,
        checkpoint=small.Checkpoint(every_n_steps=2, monitor=None),
    )
    trainer.fit(method, two_views(num_local=int(family is DINO)))  # a validation lies between
    assert {"BatchNorm2d"} <= watch.trains <= {"BatchNorm2d", "BatchNorm1d"}
    teaching(backbone)
    with torch.no_grad():
        for images in watch.seen:
            backbone(images)
    remembered = dict(method.teacher.backbone.named_buffers())
    for name, expected in backbone.named_buffers():
        torch.testing.assert_close(remembered[name], expected, msg=name)
    method.eval()
    assert not any(part.training for part in method.modules())
    # A student loses branches: its statistics are those of another network.
    *_, last = (n for n in remembered if n.endswith("running_mean"))
    assert not torch.equal(dict(method.student.backbone.named_buffers())[last], remembered[last])


@pytest.mark.parametrize(
    ("name", "arguments"), [("test_vit", {"num_blocks": 2}), ("test_mambaout", {})]
)
def test_a_probe_reads_it(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    probe = LinearProbe(
        ours(name, in_channels=1), 10, optimizer=SGD, mean_patches=True, **arguments
    )
    trainer = small.trainer(tmp_path, max_steps=2, limit_val_batches=1)
    trainer.fit(probe, small.data(image_size=64, batch_size=4))
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1
    wide = probe.probe.backbone
    assert probe.probe.heads[0].in_features == (
        wide.embed_dim * arguments.get("num_blocks", 1) + wide.patch_dim
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_pictures_are_those_of_features(name: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    pictures = pictures_of(ours(name).eval(), images, (0.5,) * 3, (0.5,) * 3)
    assert set(pictures) == {"patch_pca"}


def test_costs_and_its_name_in_comparisons() -> None:
    backbone = {"class_path": "modules.backbones.Timm", "init_args": {"name": "resnet50"}}
    found = cost(json.dumps(backbone), None)
    assert (found.parameters, found.side, found.note) == (23_508_032, (224, 224), "")
    assert found.macs == pytest.approx(4.09e9, rel=0.01)  # 4.1 G, He et al. 2015 give 3.8
    run = Run(Path("r"), {"model": {"init_args": {"backbone": backbone}}}, None)
    assert backbone_name(run, found.side) == "timm:resnet50 224"
