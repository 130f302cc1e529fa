"""MAE: the published network to the last digits, packs against images alone, and training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import Pictures
from datamodules import PackedDataModule
from datamodules.batch import PackedImages
from datamodules.sampling import fold
from modules import LinearProbe, Supervised, drawing, weights
from modules.backbones import NaViT, Positions, ViT
from modules.groups import parameter_groups
from modules.mae import Autoencoder, mean_and_std
from modules.masking import Mask
from modules.weights.inspect import describe
from tests import masked, small, views
from tests.packs import cut, pack
from tests.packs import images as drawn
from tests.runs import differences

GOLDEN = Path(__file__).parent.parent / "golden" / "mae.safetensors"
SINCOS = Positions("sincos2d")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def published(golden: dict[str, Tensor], tmp_path: Path, norm_pix: bool) -> Autoencoder:
    """The network of the golden file, its weights read by what reads them for users."""
    backbone = ViT("mu", 8, 32, embed_dim=48, depth=2, num_heads=3, positions=SINCOS)
    size = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4}
    network = Autoencoder(backbone, norm_pix=norm_pix, **size)
    state = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    torch.save({"model": state}, tmp_path / "mae.pth")
    report = weights.load(network, tmp_path / "mae.pth")
    assert not report.dropped
    assert not report.kept
    assert set(report.resampled) == {"positions.table", "decoder_positions.table"}
    return network


def given_noise(network: Autoencoder, golden: dict[str, Tensor]) -> Mask:
    images = golden["in"]
    noise = F.pad(golden["noise"], (network.backbone.num_prefix_tokens, 0))
    return network.mask_by(images, noise, network.tokens(images))


@pytest.mark.parametrize(("norm_pix", "name"), [(True, "norm_pix"), (False, "raw")])
def test_loss_prediction_and_gradients_are_the_published_ones(
    golden: dict[str, Tensor], tmp_path: Path, norm_pix: bool, name: str
) -> None:
    network, images = published(golden, tmp_path, norm_pix), golden["in"]
    mask = given_noise(network, golden)
    assert torch.equal(mask.is_removed[:, 1:].float(), golden["mask"])
    losses, features = network(images, mask)
    predicted = network.forward_decoder(features.patches, mask)[:, 1:]
    losses.mean().backward()
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(predicted, golden["pred"], **close)
    torch.testing.assert_close(losses.mean(), golden[f"loss.{name}"], **close)
    torch.testing.assert_close(network.mask_token.grad, golden[f"grad_mask_token.{name}"], **close)
    patch = network.backbone.patch_embed.proj.weight.grad
    torch.testing.assert_close(patch, golden[f"grad_patch_embed.{name}"], **close)
    torch.testing.assert_close(network.patchify(images)[:, 1:], golden["patchified"])
    torch.testing.assert_close(network.unpatchify(network.patchify(images), (4, 4)), images)


def test_a_decoder_with_other_positions_is_refused(
    golden: dict[str, Tensor], tmp_path: Path
) -> None:
    other = dict(golden)
    other["weights.decoder_pos_embed"] = golden["weights.decoder_pos_embed"].flip(-1)
    with pytest.raises(ValueError, match="is not the network's sines and cosines"):
        published(other, tmp_path, True)


@pytest.mark.parametrize(
    ("variant", "patch", "encoder", "decoder", "trained"),
    [
        ("B", 16, 85_798_656, 26_109_184, 111_655_680),
        ("L", 16, 303_301_632, 26_240_256, 329_239_296),
        ("H", 14, 630_764_800, 26_309_708, 656_613_964),
    ],
)
def test_numbers_of_parameters_are_the_published_ones(
    variant: str, patch: int, encoder: int, decoder: int, trained: int
) -> None:
    """The published counts have the fixed tables among the parameters."""
    with torch.device("meta"):
        network = Autoencoder(ViT(variant, patch, 224, positions=SINCOS, init="mae"))
    own = sum(parameter.numel() for parameter in network.backbone.parameters())
    every = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert every == trained
    assert own + network.backbone.positions.table.numel() == encoder
    assert every - own + network.decoder_positions.table.numel() == decoder


def test_first_values_are_the_published_ones() -> None:
    torch.manual_seed(0)
    network = Autoencoder(ViT("mu", 8, 64, init="mae", positions=SINCOS))
    for layer in (network.decoder_embed, network.decoder_pred, network.decoder_blocks[0].attn.qkv):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not layer.bias.any()
    assert network.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert not network.decoder_positions((8, 8))[:, 0].any()


def test_normalised_pixels_have_the_unbiased_variance() -> None:
    patch = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    mean, std = mean_and_std(patch)
    expected = torch.tensor([-0.92582, -0.46291, 0.0, 1.38873])
    torch.testing.assert_close(((patch - mean) / std)[0, 0], expected, atol=1e-5, rtol=0)


def looped(network: Autoencoder, image: Tensor, predicted: Tensor, removed: Tensor) -> Tensor:
    """The loss of an image [c, height, width] patch by patch; [n, e] and [n] of its patches."""
    p, terms = network.patch_size, []
    for i, pixels in enumerate(cut(image, p)):
        target = pixels.view(-1, p, p).permute(1, 2, 0).flatten()
        if network.norm_pix:
            target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
        if removed[i]:
            terms.append((predicted[i] - target).square().mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("shape", ["random", "block", "grid"])
def test_the_loss_is_that_of_loops_for_any_size_and_channels(norm_pix: bool, shape: Any) -> None:
    backbone = ViT("mu", 4, (12, 20), in_channels=2, num_registers=1)
    network = masked.autoencoder(backbone=backbone, norm_pix=norm_pix, mask_shape=shape).double()
    for size in ((12, 20), (8, 4)):
        images = torch.stack(drawn([size] * 3, channels=2)).double()
        mask = network.mask(images, torch.arange(3))
        losses, features = network(images, mask)
        predicted = network.forward_decoder(features.patches, mask)[:, 2:]
        assert predicted.shape == (3, size[0] * size[1] // 16, 32)
        for i in range(3):
            expected = looped(network, images[i], predicted[i], mask.is_removed[i, 2:])
            torch.testing.assert_close(losses[i], expected)


BACKBONES: dict[str, Any] = {
    "class token": lambda: ViT("mu", 4, 16),
    "registers": lambda: ViT("mu", 4, 16, num_registers=3),
    "no class token": lambda: ViT("mu", 4, 16, class_token=False, pooling="norm_avg"),
    "every": lambda: ViT("mu", 4, 16, positions=Positions("learned2d", "every")),
    "NaViT": lambda: NaViT("mu", 4),
}
SIZES = [[(8, 12), (16, 16)], [(12, 8)], [(4, 8), (20, 4)]]


def in_pack(name: str, **changes: Any) -> tuple[Autoencoder, list[list[Tensor]], PackedImages]:
    network = masked.autoencoder(backbone=BACKBONES[name](), **changes)
    rows = [drawn(sizes, seed=i) for i, sizes in enumerate(SIZES)]
    return network, rows, pack(rows, 4, 40, 3, network.backbone.num_prefix_tokens)


@pytest.mark.parametrize("name", BACKBONES)
def test_an_image_in_a_pack_has_the_loss_that_it_has_alone(name: str) -> None:
    network, rows, packed = in_pack(name)
    keys = torch.tensor([fold(0, 0, i) for i in range(9)])
    mask = network.mask(packed, keys)
    assert mask.places.shape[1] < 30
    losses, features = network(packed, mask)
    assert features.patches.shape[:2] == mask.places.shape  # the encoder did less work
    alone = []
    for row, images in enumerate(rows):
        for slot, image in enumerate(images):
            key = keys[row * 3 + slot][None]
            loss, own = network(image[None], network.mask(image[None], key))
            torch.testing.assert_close(losses[row * 3 + slot], loss[0], atol=1e-5, rtol=1e-5)
            pooled = features.pooled[row * 3 + slot]
            torch.testing.assert_close(pooled, own.pooled[0], atol=1e-5, rtol=1e-5)
            alone.append(loss[0])
    assert losses.count_nonzero() == len(alone) == 5
    weight = network.decoder_embed.weight
    gradients = [
        torch.autograd.grad(x, weight)[0] for x in (losses.sum(), torch.stack(alone).sum())
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", ["random", "block", "grid"])
def test_an_image_changes_the_loss_of_no_other(shape: Any) -> None:
    network, rows, packed = in_pack("class token", mask_shape=shape)
    keys = torch.arange(9)
    before = network(packed, network.mask(packed, keys))[0]
    rows[0][1] = rows[0][1] + 1.0
    other = pack(rows, 4, 40, 3, 1, padding=-3.0)
    after = network(other, network.mask(other, keys))[0]
    assert (before != after).nonzero()[:, 0].tolist() == [1]


def test_an_image_of_one_patch_in_a_pack_keeps_it() -> None:
    network = masked.autoencoder(backbone=BACKBONES["class token"]())
    packed = pack([drawn([(4, 4), (8, 8)])], 4, 8, 2, 1)
    losses, _ = network(packed, network.mask(packed, torch.arange(2)))
    assert losses[0] == 0.0
    assert losses[1] > 0.0
    with pytest.raises(ValueError, match="images of one patch leave nothing to predict"):
        network.mask(torch.zeros(1, 3, 4, 4), torch.arange(1))


class Given(Callback):
    """The losses of all steps."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())


def trained(tmp_path: Path, *callbacks: Any, **changes: Any) -> Any:
    arguments = {"max_epochs": 1, "limit_train_batches": 3}
    given = changes.pop("data", None) or masked.data()
    arguments["limit_val_batches"] = changes.pop("limit_val_batches", 2)
    module = masked.method(**changes)
    trainer = masked.trainer(tmp_path, *callbacks, **arguments)
    trainer.fit(module, given)
    module.metrics = trainer.callback_metrics
    return module


@pytest.mark.parametrize("pooling", ["cls", "norm_avg", "avg", "map"])
def test_every_parameter_learns_but_those_that_pool(tmp_path: Path, pooling: Any) -> None:
    module = trained(tmp_path, backbone=masked.backbone(pooling=pooling), limit_val_batches=0)
    idle = [n for n, p in module.autoencoder.named_parameters() if not p.requires_grad]
    assert bool(idle) == (pooling in ("avg", "map"))
    assert all(name.startswith(("backbone.fc_norm.", "backbone.attn_pool.")) for name in idle)
    for name, parameter in module.autoencoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_what_is_logged(tmp_path: Path) -> None:
    """The loss of held-out images is the mean over all of them, however many a batch has."""
    metrics = trained(tmp_path).metrics
    assert {"train/loss", "val/loss", "schedule/lr"} <= set(metrics)
    assert 0.5 < metrics["val/loss"] < 3.0
    module = masked.method()
    trainer = masked.trainer(tmp_path, limit_val_batches=1.0)
    losses = [
        trainer.validate(module, masked.data(batch_size=size), verbose=False)[0]["val/loss"]
        for size in (100, 101)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_packs_are_trained_on(tmp_path: Path) -> None:
    scenes = {"num_train": 16, "num_val": 8, "min_side": 16, "max_side": 32, "max_aspect": 2.0}
    data = PackedDataModule(
        **{"source": "shapes", "source_args": scenes, "num_rows": 2, "row_length": 128},
        **{"num_workers": 0, "eval_side": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    )
    watch = Given()
    module = trained(tmp_path, watch, backbone=BACKBONES["NaViT"](), data=data)
    assert len(watch.losses) >= 2
    assert all(torch.isfinite(loss) for loss in watch.losses)
    assert 0 < module.metrics["val/loss"] < 3
    assert data.needs is not None
    assert data.needs.max_grid == 64


def test_the_decoder_has_an_end_where_the_backbone_has_none(tmp_path: Path) -> None:
    backbone = ViT("mu", 4, 16, in_channels=1, positions=Positions("none"))
    data = masked.data()
    trained(tmp_path, backbone=backbone, data=data)
    assert data.needs is not None
    assert data.needs.max_grid == 128


def test_class_and_mask_token_decay_as_published_and_the_decoder_comes_last() -> None:
    network = masked.autoencoder()
    groups = parameter_groups(network, 0.05, layer_decay=0.5)
    for group in groups:
        for name in group["param_names"]:
            ndim = dict(network.named_parameters())[name].ndim
            assert group["weight_decay"] == (0.05 if ndim > 1 else 0.0), name
            expected = 1.0 if "decoder" in name or name == "mask_token" else None
            assert expected is None or group["lr_scale"] == expected
    scales = {name: g["lr_scale"] for g in groups for name in g["param_names"]}
    assert scales["backbone.cls_token"] == 0.125
    assert scales["backbone.blocks.0.attn.qkv.weight"] == 0.25


def test_every_option_changes_the_training(tmp_path: Path) -> None:
    results: list[Tensor] = []
    for option in (
        {},
        {"mask_ratio": 0.5},
        {"mask_shape": "block"},
        {"mask_shape": "grid"},
        {"norm_pix": False},
        {"decoder_dim": 24},
        {"decoder_depth": 2},
        {"decoder_heads": 4},
    ):
        module = trained(tmp_path, **option)
        results.append(module.autoencoder.backbone.patch_embed.proj.weight.detach().clone())
    for i, one in enumerate(results):
        assert torch.isfinite(one).all()
        assert not any(torch.equal(one, other) for other in results[:i]), i


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    def run(batch: int, accumulate: int) -> dict[str, Tensor]:
        module = masked.method(optimizer=masked.optimization(name="sgd", base_lr=0.05))
        arguments = {"max_steps": 3, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
        masked.trainer(tmp_path, **arguments | {"limit_train_batches": 3 * accumulate}).fit(
            module, masked.data(batch_size=batch)
        )
        return module.state_dict()

    whole, parts = run(16, 1), run(4, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_no_mask_of_the_run_is_used_twice(tmp_path: Path) -> None:
    """An image is masked in another way in every epoch, but held-out ones always in one way."""
    found: dict[bool, list[Tensor]] = {True: [], False: []}

    class Note(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            original = module.autoencoder.mask

            def mask(images: Any, keys: Tensor) -> Mask:
                made: Mask = original(images, keys)
                found[module.training] += list(made.is_seen)
                return made

            module.autoencoder.mask = mask

    module = masked.method()
    arguments = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1}
    masked.trainer(tmp_path, Note(), **arguments).fit(module, masked.data())
    assert len({tuple(row.tolist()) for row in found[True]}) == len(found[True]) == 48
    assert torch.equal(torch.stack(found[False][:8]), torch.stack(found[False][8:]))


def test_its_checkpoint_goes_into_fine_tuning_and_probing(tmp_path: Path) -> None:
    module = trained(tmp_path)
    checkpoint = str(next(tmp_path.rglob("last.ckpt")))
    learned = dict(module.autoencoder.backbone.state_dict())
    again = masked.autoencoder()
    report = weights.load(again, checkpoint)
    assert not report.dropped
    assert differences(dict(module.autoencoder.state_dict()), dict(again.state_dict())) == []
    tuned = Supervised(masked.backbone(pooling="avg"), 10, weights=checkpoint)
    report = weights.load_backbone(tuned.classifier.backbone, checkpoint)
    assert {"norm.weight", "norm.bias", "mask_token"} < set(report.dropped)
    assert set(report.kept) == {"fc_norm.weight", "fc_norm.bias"}
    probe = LinearProbe(masked.backbone(), 10)
    report = weights.load_backbone(probe.probe.backbone, checkpoint)
    assert differences(learned, dict(probe.probe.backbone.state_dict())) == []
    state = weights.read(checkpoint)["autoencoder"]
    assert describe(state).writer == "MAE"


def logged(tmp_path: Path, name: str) -> list[Any]:
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    return list(events.Images(f"pictures/{name}"))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_picture_has_visible_patches_as_they_are_and_the_others_as_predicted(
    monkeypatch: pytest.MonkeyPatch, norm_pix: bool
) -> None:
    network = masked.autoencoder(norm_pix=norm_pix)
    images, found = torch.rand(3, 1, 16, 16), []

    def note(lines: Any, title: str, names: Any) -> Tensor:
        found.extend(tile for line in lines for tile in line)
        assert list(names) == ["image", "visible", "predicted"] * 2
        assert "75 %" in title
        return drawing.mosaic(lines, title, names)

    monkeypatch.setattr("modules.reconstruction.mosaic", note)
    picture = network.picture(images, (0.5,), (0.25,))
    assert picture.shape[0] == 3
    assert picture.min() >= 0.0
    assert picture.max() <= 1.0
    mask = network.mask(images, torch.arange(3))
    predicted = network.forward_decoder(network.forward_encoder(images, mask).patches, mask)
    for i in range(3):
        shown, visible, painted = (tile[:, ::8, ::8] for tile in found[3 * i : 3 * i + 3])
        torch.testing.assert_close(shown, (images[i] * 0.25 + 0.5).expand(3, -1, -1))
        for j in range(16):
            y, x = j // 4 * 4, j % 4 * 4
            window = (slice(None), slice(y, y + 4), slice(x, x + 4))
            if not mask.is_removed[i, 1 + j]:
                assert torch.equal(visible[window], shown[window])
                assert torch.equal(painted[window], shown[window])
                continue
            assert (visible[window] == 0.5).all()
            patch = predicted[i, 1 + j].view(4, 4)
            if norm_pix:
                own = images[i][window]
                patch = patch * (own.var() + 1e-6).sqrt() + own.mean()
            expected = (patch * 0.25 + 0.5).clamp(0, 1).expand(3, -1, -1)
            torch.testing.assert_close(painted[window], expected)


def test_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    trained(tmp_path, Pictures(num_images=2))
    assert logged(tmp_path, "reconstruction")
    assert logged(tmp_path, "attention")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio is 0\.0; expected within \(0, 1\)"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1\.0; expected within \(0, 1\)"),
        ({"decoder_depth": 0}, "decoder_depth is 0; expected at least 1"),
        ({"decoder_heads": 0}, "decoder_heads is 0; expected at least 1"),
        ({"decoder_heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "width 18 is no multiple of 4"),
        (
            {"backbone": ViT("mu", 4, 16, positions=Positions("relative"))},
            r"this ViT needs the whole grid \(relative positions, windows and ",
        ),
        ({"backbone": small.Pixels()}, "this Pixels needs the whole grid"),
        (
            {"backbone": ViT("mu", 1, 4, in_channels=1, positions=SINCOS)},
            "norm_pix needs patches of several values",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        masked.method(**arguments)


def test_several_views_and_clipping_by_the_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MAE takes one view of an image"):
        trained(tmp_path, data=views.data())
    with pytest.raises(ValueError, match=r"set optimizer\.clip_norm of the model"):
        masked.method().configure_gradient_clipping(torch.optim.SGD([torch.ones(1)]), 1.0)
