"""Token labelling against the published network and loss, and in small runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from callbacks import Pictures
from datamodules import ImageDataModule, TokenLabelDataModule
from datamodules.augment import Mixing
from datamodules.batch import ImageBatch, SparseScores, TokenLabelBatch
from datamodules.geometry import Box
from datamodules.label_geometry import LabelMap, image_scores, pool, token_scores
from datamodules.sources import open_source
from modules import TokenLabeling, weights
from modules.backbones import LVViT, Swapped, Timm, ViT
from modules.optim import Optimization
from modules.token_labeling import TokenClassifier, draw_boxes
from modules.token_loss import (
    beside,
    class_targets,
    label_targets,
    softmax_targets,
    token_cross_entropy,
)
from modules.token_pictures import best_scored, colour_of, over
from tests import small
from tests.label_maps import write_maps
from tests.runs import differences

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "lvvit.safetensors")
LABELS = load_file(Path(__file__).parents[1] / "golden" / "token_labels.safetensors")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


# --- the loss ---------------------------------------------------------------------------------


def dense_loss(logits: Tensor, y: Tensor) -> Tensor:
    return -(y * F.log_softmax(logits, dim=-1)).sum(-1).mean(1)


def sparse_scores(b: int, n: int, m: int, k: int, scale: float = 5.0) -> SparseScores:
    ids = torch.rand(b, n, k).topk(m, dim=-1).indices.int()
    return SparseScores(ids, scale * torch.randn(b, n, m))


def written_out(scores: SparseScores, k: int) -> Tensor:
    every = torch.zeros(*scores.ids.shape[:2], k)
    return every.scatter_add(-1, scores.ids.long(), scores.values)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_sparse_loss_is_the_dense_one(smoothing: float, scale: float) -> None:
    """Values and gradients, over logits of ordinary and of absurd size, in several pieces."""
    torch.manual_seed(0)
    k = 50_000
    scores = sparse_scores(2, 13, 7, k, scale)
    logits = (scale * torch.randn(2, 13, k)).requires_grad_()
    y = written_out(scores, k).double().softmax(-1) * (1 - smoothing) + smoothing / k
    losses = token_cross_entropy(logits, softmax_targets(scores, k, smoothing))
    expected = dense_loss(logits.double(), y)  # in float32 the sum over so many classes is not
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    scaled = torch.tensor([1.0, -2.0])
    ours, theirs = (torch.autograd.grad(x @ scaled.to(x), logits)[0] for x in (losses, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def peak_bytes(logits: Tensor, loss: Callable[[], Tensor]) -> int:
    """Most memory that a loss and its gradient take at once, beyond the gradient itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss().backward()
    taken = highest = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            highest = max(highest, taken)
    return highest - logits.nbytes


def test_it_takes_a_twentieth_of_the_dense_forms_memory() -> None:
    """At the size of a real batch: 128 images, 196 tokens, 1000 classes, 45 entries a token."""
    torch.manual_seed(0)
    k, ids = 1000, torch.randint(0, 1000, (128, 196, 45), dtype=torch.int32)
    scores = SparseScores(ids, torch.rand(ids.shape))
    logits = torch.randn(128, 196, k, requires_grad=True)

    def sparse() -> Tensor:
        return token_cross_entropy(logits, softmax_targets(scores, k, 0.1)).mean()

    def dense() -> Tensor:
        return dense_loss(logits, written_out(scores, k).softmax(-1)).mean()

    ours = peak_bytes(logits, sparse)
    logits.grad = None
    assert ours * 20 < peak_bytes(logits, dense)


def test_an_entry_of_value_0_is_as_if_it_were_not_there() -> None:
    torch.manual_seed(0)
    scores = sparse_scores(2, 3, 4, 11)
    padded = SparseScores(*(F.pad(part, (0, 2)) for part in scores))
    logits = torch.randn(2, 3, 11)
    losses = [token_cross_entropy(logits, softmax_targets(s, 11, 0.1)) for s in (scores, padded)]
    torch.testing.assert_close(*losses, **CLOSE)


def test_the_share_of_the_tail_that_methods_quotes() -> None:
    scores = SparseScores(torch.arange(5).int()[None, None], torch.tensor([[[10.0, 5, 3, 2, 1]]]))
    targets = softmax_targets(scores, 1000, 0.0)
    assert (targets.base + targets.weights[..., 0]).item() == pytest.approx(0.9494, abs=1e-4)
    assert (995 * targets.base).item() == pytest.approx(0.0429, abs=1e-4)


def test_low_precision_logits_lose_no_more_than_they_must() -> None:
    torch.manual_seed(0)
    scores, logits = sparse_scores(2, 3, 4, 11), torch.randn(2, 3, 11).bfloat16()
    targets = softmax_targets(scores, 11, 0.1)
    logits.requires_grad_()
    losses = token_cross_entropy(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_cross_entropy(logits.float(), targets))
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_labels_stand_for_all_tokens_where_there_are_no_maps() -> None:
    torch.manual_seed(0)
    batch = Mixing(mixup=0.8)(images(6))
    logits = torch.randn(6, 4, 10)
    assert batch.mixed is not None
    one, two = (F.one_hot(x, 10).float() for x in (batch.labels, batch.mixed.labels))
    share = batch.mixed.share[:, None]
    y = (0.9 * (share * one + (1 - share) * two) + 0.01)[:, None].expand(-1, 4, -1)
    losses = token_cross_entropy(logits, label_targets(batch, 4, 10, 0.1))
    torch.testing.assert_close(losses, dense_loss(logits, y), **CLOSE)


def images(b: int, side: int = 16) -> ImageBatch:
    return ImageBatch(
        torch.randn(b, 3, side, side),
        torch.randint(0, 10, (b,)),
        torch.arange(b),
        torch.arange(b) * 2**40 + 99,
        torch.ones(b, dtype=torch.bool),
        torch.zeros(b, dtype=torch.bool),
    )


# --- the published network and loss -----------------------------------------------------------


def published(tmp_path: Path) -> TokenClassifier:
    state = {n.removeprefix("weights."): t for n, t in GOLDEN.items() if n.startswith("weights.")}
    save_file(state, tmp_path / "lvvit.safetensors")
    backbone = LVViT("S", image_size=64, depth=2, embed_dim=48, num_heads=3)
    network = TokenClassifier(backbone, 10, has_aux_head=True)
    weights.load(network, tmp_path / "lvvit.safetensors")
    return network


def golden_batch() -> TokenLabelBatch:
    """The golden targets as scores: softmax of a logarithm is what it was."""
    target = GOLDEN["target"]
    ids = torch.arange(10).int().expand(4, 16, 10).contiguous()
    tokens = SparseScores(ids, target[:, :, 2:].mT.log())
    plain = images(4)._replace(images=GOLDEN["in"], labels=target[:, :, 0].argmax(-1))
    return TokenLabelBatch(*plain[:6], tokens=tokens, pooled=target[:, :, 1].log())


def test_evaluation_is_that_of_the_published_network(tmp_path: Path) -> None:
    network = published(tmp_path).eval()
    torch.testing.assert_close(network(GOLDEN["in"]), GOLDEN["out.eval"], **CLOSE)


@pytest.mark.parametrize("ground_truth", [False, True])
def test_a_training_step_is_that_of_the_published_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ground_truth: bool
) -> None:
    options = {"label_smoothing": 0.0, "ground_truth": ground_truth}
    backbone = LVViT("S", image_size=64, depth=2, embed_dim=48, num_heads=3)
    module = TokenLabeling(backbone, 10, **options)
    module.classifier = published(tmp_path)
    top, left, bottom, right = GOLDEN["box"].tolist()
    box = torch.zeros(4, 4, 4, dtype=torch.bool)
    box[:, top:bottom, left:right] = True

    def fixed(keys: Tensor, grid: tuple[int, int], each: str) -> Any:
        boxes = draw_boxes(keys, grid, "batch")
        own = 1 - box[:, :, :].float().mean((1, 2))
        return boxes._replace(is_swapped=box.flatten(1), share=own)

    monkeypatch.setattr("modules.token_labeling.draw_boxes", fixed)
    if ground_truth:  # which is no single class in the golden file
        both = (GOLDEN["target"][:, :, column] for column in (1, 0))
        mixed = beside(*both)
        monkeypatch.setattr("modules.token_labeling.class_targets", lambda *_: mixed)
    monkeypatch.setattr("modules.token_labeling.log_mean", lambda *_: None)
    loss = module.training_step(golden_batch(), 0)["loss"]
    expected = GOLDEN[f"loss.ground_truth_{ground_truth}"]
    torch.testing.assert_close(loss, expected, **CLOSE)
    if not ground_truth:
        loss.backward()
        aux, conv1 = module.classifier.aux_head, module.classifier.backbone.patch_embed.conv1
        torch.testing.assert_close(aux.weight.grad, GOLDEN["grad_aux_head"], **CLOSE)
        torch.testing.assert_close(conv1.weight.grad, GOLDEN["grad_conv1"], **CLOSE)


def test_mixed_and_smoothed_labels_are_the_published_ones_but_for_their_sum() -> None:
    """Published are on * y + off, with on = 0.9 + off and off = 0.1 / k: they sum to 1 + off."""
    theirs = LABELS["mixup.lam0.3.smooth0.1.size4"]
    labels, off = F.one_hot(LABELS["labels"], 20).float(), 0.1 / 20
    torch.testing.assert_close(mixed(labels * 0.9 + off), theirs[:, :, 0], **CLOSE)
    tokens, pooled = [], []
    for scores, ids, crop in zip(
        LABELS["scores"], LABELS["classes"], LABELS["crop_tlhw"], strict=True
    ):
        maps = LabelMap(
            scores.permute(1, 2, 0).numpy(),
            ids.permute(1, 2, 0).int().numpy(),
            np.zeros((15, 15), np.float32),
        )
        box = Box(*(1000 * x for x in crop.tolist()))  # type: ignore[arg-type]
        where, whole = (pool(maps, box, 1000, 1000, grid, True) for grid in ((4, 4), (1, 1)))
        tokens.append(token_scores(maps, where, (6, 6), 20))
        pooled.append(image_scores(maps, whole, 20))
    given = SparseScores(*(torch.stack(part) for part in zip(*tokens, strict=True)))
    batch = TokenLabelBatch(*images(3)[:6], tokens=given, pooled=torch.stack(pooled))
    ours = mixed(class_targets(batch, 20, 0.1, ground_truth=False))
    torch.testing.assert_close(ours + off * (ours - off) / 0.9, theirs[:, :, 1], **CLOSE)
    y = softmax_targets(given, 20, 0.1)
    every = y.base[..., None] + torch.zeros(3, 16, 20).scatter_add(-1, y.ids.long(), y.weights)
    ours = mixed(every).mT
    torch.testing.assert_close(ours + off * (ours - off) / 0.9, theirs[:, :, 2:], **CLOSE)


def mixed(y: Tensor) -> Tensor:
    return 0.3 * y + 0.7 * y.flip(0)


# --- mixed tokens -----------------------------------------------------------------------------


def test_boxes_are_the_published_draws() -> None:
    keys = torch.arange(1200) * 2**33 + 17
    shares = []
    for key in keys.split(4):
        boxes = draw_boxes(key, (14, 10), "batch")
        assert boxes.partner.tolist() == [3, 2, 1, 0]
        assert (boxes.is_swapped == boxes.is_swapped[:1]).all()
        box = boxes.is_swapped[0].view(14, 10)
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        assert box.sum() == len(rows) * len(columns)  # one rectangle
        assert boxes.share[0].item() == pytest.approx(1 - box.float().mean().item())
        shares.append(boxes.share[0].item())
    share = torch.tensor(shares)
    # Clipping and cutting to even sides leave the box smaller than drawn.
    assert 0.55 < share.mean() < 0.8
    assert (share == 1).any()  # nothing is mixed now and then
    assert share.min() < 0.4


def test_pairs_do_not_depend_on_how_a_batch_is_cut() -> None:
    keys = torch.arange(8) * 2**33 + 17
    whole, halves = (
        draw_boxes(keys, (4, 4), "pair"),
        [draw_boxes(k, (4, 4), "pair") for k in keys.split(4)],
    )
    assert torch.equal(whole.is_swapped, torch.cat([half.is_swapped for half in halves]))
    assert torch.equal(whole.share, torch.cat([half.share for half in halves]))
    assert whole.partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert len(whole.share.unique()) > 1


def test_putting_tokens_back_undoes_the_mixing() -> None:
    torch.manual_seed(0)
    for each in ("batch", "pair"):
        boxes = draw_boxes(torch.tensor([5, 2**40, 7, 9]), (4, 4), each)  # type: ignore[arg-type]
        swapped = Swapped(torch.zeros(4, 3, 8, 8), boxes.is_swapped, boxes.partner)
        patches = torch.randn(4, 16, 3)
        assert torch.equal(swapped.over(swapped.over(patches)), patches)


# --- runs -------------------------------------------------------------------------------------


def method(**changes: Any) -> TokenLabeling:
    seed_everything(7, verbose=False)
    backbone = changes.pop("backbone", None) or LVViT("mu", 8, 32, drop_path=0.1)
    optimizer = Optimization(base_lr=2e-3, reference_batch=None, warmup_epochs=0.5)
    return TokenLabeling(
        **{"backbone": backbone, "num_classes": 10, "optimizer": optimizer, **changes}
    )


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("maps")
    write_maps(directory, open_source("shapes", "train", None, channels=3, num_train=20, num_val=4))
    return directory


def data(labels: Path, **changes: Any) -> TokenLabelDataModule:
    arguments: dict[str, Any] = {
        "source_args": {"num_train": 20, "num_val": 4},
        "batch_size": 4,
        "num_workers": 0,
        "erasing": 0.25,
    }
    return TokenLabelDataModule(str(labels), **arguments | changes)


def fit(directory: Path, module: TokenLabeling, given: Any, **options: Any) -> TokenLabeling:
    path = options.pop("ckpt_path", None)
    callbacks = options.pop("callbacks", [])
    how = {"max_epochs": 2, "limit_train_batches": 5} | options
    trainer = small.trainer(directory, *callbacks, **how)
    trainer.fit(module, given, ckpt_path=path, weights_only=True)
    module.metrics = dict(trainer.logged_metrics)  # type: ignore[assignment]
    return module


BACKBONES: dict[str, Any] = {
    "LV-ViT": lambda: LVViT("mu", 8, 32),
    "ViT": lambda: ViT("mu", 8, 32),
    "average": lambda: ViT("mu", 8, 32, pooling="avg", class_token=False),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_it_trains(name: str, maps: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, method(backbone=BACKBONES[name](), ema_decay=0.9), data(maps))
    logged = module.metrics
    assert {"train/token_loss", "train/class_loss", "val/accuracy", "val/ema_accuracy"} <= set(
        logged
    )
    parts = logged["train/class_loss"] + 0.5 * logged["train/token_loss"]
    assert logged["train/loss"].item() == pytest.approx(parts.item(), abs=1e-5)
    first = dict(method(backbone=BACKBONES[name](), ema_decay=0.9).classifier.named_parameters())
    for parameter_name, parameter in module.classifier.named_parameters():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, first[parameter_name]), parameter_name


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(maps: Path, tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", method(ema_decay=0.9), data(maps), max_steps=7)
    fit(tmp_path / "b", method(ema_decay=0.9), data(maps), max_steps=3)
    (last,) = (tmp_path / "b").rglob("last.ckpt")
    again = fit(
        tmp_path / "c",
        method(ema_decay=0.9),
        data(maps),
        max_steps=7,
        max_epochs=None,
        ckpt_path=last,
    )
    assert differences(dict(again.state_dict()), dict(whole.state_dict())) == []


def test_options_change_what_is_learned(maps: Path, tmp_path: Path) -> None:
    """Every option has an effect; none of them changes the images."""
    options: list[dict[str, Any]] = [
        {},
        {"dense_weight": 1.0},
        {"dense_weight": 0.0},
        {"mix_tokens": "pair"},
        {"mix_tokens": None},
        {"ground_truth": True},
        {"label_smoothing": 0.0},
    ]
    seen = []
    for i, option in enumerate(options):
        module = fit(tmp_path / str(i), method(**option), data(maps), max_steps=2)
        seen.append(module.classifier.backbone.blocks[0].mlp.fc1.weight.detach())
        assert (module.classifier.aux_head is None) == (option.get("dense_weight") == 0.0)
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i]), options[i]


def test_relabel_alone_and_no_maps_at_all(maps: Path, tmp_path: Path) -> None:
    given = data(maps)
    crop = fit(tmp_path / "crop", method(dense_weight=0.0), given)
    assert given.label_size == (1, 1)
    assert "train/token_loss" not in crop.metrics
    plain = ImageDataModule(
        "shapes", source_args={"num_train": 20, "num_val": 4}, batch_size=4, num_workers=0
    )
    labels = fit(tmp_path / "labels", method(), plain)
    assert labels.metrics["train/token_loss"] > 0


def test_weights_begin_both_networks(maps: Path, tmp_path: Path) -> None:
    first = fit(tmp_path / "a", method(), data(maps), max_steps=1)
    (last,) = (tmp_path / "a").rglob("last.ckpt")
    options = {"weights": str(last), "weights_part": "classifier", "ema_decay": 0.0}
    still = Optimization(base_lr=0.0, reference_batch=None, warmup_epochs=0, weight_decay=0.0)
    second = fit(tmp_path / "b", method(**options, optimizer=still), data(maps), max_steps=1)
    parameters = dict(second.classifier.named_parameters())
    for name, parameter in first.classifier.named_parameters():
        torch.testing.assert_close(parameters[name], parameter)


def test_pictures_show_labels_over_the_crops_they_are_of(maps: Path, tmp_path: Path) -> None:
    """Tokens of the written maps are sure of the image's class; the picture has its colour."""
    given = data(maps, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    module = fit(tmp_path, method(), given, max_steps=1, callbacks=[Pictures(num_images=3)])
    events = EventAccumulator(module.trainer.log_dir, size_guidance={"images": 0}).Reload()
    assert "pictures/token_labels" in events.Tags()["images"]
    with torch.no_grad():
        drawn = module.eval().pictures(torch.zeros(3, 3, 32, 32))["token_labels"]
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    again = given.crops(3, torch.device("cpu"))
    assert again.indices.tolist() == [0, 1, 2]  # the classes of scenes take turns
    assert torch.equal(again.images, given.crops(3, torch.device("cpu")).images)
    best = best_scored(again.tokens, 10)
    assert (best.classes == torch.arange(3)[:, None]).all()
    assert (best.share > 0.5).all()
    written = written_out(again.tokens, 10).softmax(-1).max(-1)
    torch.testing.assert_close(best.share, written.values)
    tiles = over(torch.full((3, 3, 64, 64), 0.5), best, (4, 4))
    for tile, number in zip(tiles, range(3), strict=True):
        colour = torch.tensor(colour_of(number))
        towards = (tile.mean((1, 2)) - 0.5) * (colour - 0.5)
        assert (towards > 0).all()


class NoMasks(ViT):
    takes_masks = False


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        (
            {"num_classes": 11},
            {},
            r"are of 10 classes, but model.num_classes is 11",
        ),
        ({}, {"label_size": 1}, "label_size is 1 or the backbone makes one patch"),
        ({"mix_tokens": "pair"}, {"batch_size": 5}, "batch_size is 5; expected an even number"),
        ({"dense_weight": -1.0}, {}, "dense_weight is -1.0"),
        ({"label_smoothing": 1.0}, {}, "label_smoothing is 1.0"),
        ({"ema_decay": 1.0}, {}, "ema_decay is 1.0"),
        ({"weights_drop": ["head"]}, {}, "weights_part and weights_drop are about weights"),
        ({"backbone": NoMasks("mu", 8, 32)}, {}, "which NoMasks cannot; set mix_tokens to null"),
        (
            {"backbone": Timm("test_resnet.r160_in1k", 80), "mix_tokens": None},
            {},
            r"Timm makes \(3, 3\) patches of an image of 80x80, .* labels for \(2, 2\), squares",
        ),
    ],
)
def test_errors_come_before_the_first_step(
    maps: Path, tmp_path: Path, arguments: dict, changes: dict, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        fit(tmp_path, method(**arguments), data(maps, **changes))
    assert not list(tmp_path.rglob("*.ckpt"))
