"""Every backbone with every method: it trains, or says before the first step why it does not.

README has the table of it under `## Which backbone with which method`, and the last test compares.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.knn import KNN
from datamodules import (
    ImageDataModule,
    MultiCropDataModule,
    PackedDataModule,
    TokenLabelDataModule,
)
from datamodules.sources import open_source
from modules import DINO, MAE, LinearProbe, MoCo, Supervised, TokenLabeling
from modules.backbones import (
    Backbone,
    Hybrid,
    LVViT,
    NaViT,
    Positions,
    RowRNN,
    Swin,
    T2TViT,
    Timm,
    TwinsPCPVT,
    TwinsSVT,
    TwinsSVTCompact,
    ViT,
)
from modules.distillation import Distillation
from modules.ibot import MaskedPatches
from modules.optim import Optimization
from tests.label_maps import write_maps
from tests.runs import ROOT

SIDE = 32  # of local crops too: a ResNet halves them five times
TEACHER = "test_resnet.r160_in1k"


class Family(NamedTuple):
    """A row of the table.

    toy:      a small one for gray images of 32 pixels; it takes `distillation_token` where its
              family has one
    refuses:  the methods that it is not for, and the mark of the reason
    projects: its patches are made by one projection, which MoCo v3 keeps as it is
    """

    toy: partial[Backbone]
    refuses: Mapping[str, str] = MappingProxyType({})
    projects: bool = True


NO_TOKEN = {"distillation": "a"}
WHOLE_IMAGES = {"packs": "b", "MAE": "c", "MAE on packs": "c"} | NO_TOKEN
NO_MASKS = {"iBOT": "d", "MixToken": "e"}
FAMILIES = {
    "ViT": Family(
        partial(ViT, "mu", 8, image_size=SIDE, in_channels=1, positions=Positions("sincos2d"))
    ),
    "NaViT": Family(partial(NaViT, "mu", 8, 1), NO_TOKEN),
    "hybrid": Family(
        partial(Hybrid, "mu", image_size=SIDE, in_channels=1), WHOLE_IMAGES, projects=False
    ),
    "T2T-ViT": Family(
        partial(T2TViT, "mu", image_size=SIDE, in_channels=1), WHOLE_IMAGES, projects=False
    ),
    "LV-ViT": Family(
        partial(LVViT, "mu", 8, image_size=SIDE, in_channels=1), WHOLE_IMAGES, projects=False
    ),
    "Swin": Family(
        partial(Swin, "mu", image_size=SIDE, in_channels=1, window=4), WHOLE_IMAGES | NO_MASKS
    ),
    "Twins-SVT": Family(
        partial(TwinsSVT, "mu", image_size=SIDE, in_channels=1),
        WHOLE_IMAGES | NO_MASKS,
        projects=False,
    ),
    "Twins-PCPVT": Family(
        partial(TwinsPCPVT, "mu", image_size=SIDE, in_channels=1),
        WHOLE_IMAGES | NO_MASKS,
        projects=False,
    ),
    "Twins-SVT compact": Family(
        partial(TwinsSVTCompact, "mu", image_size=SIDE, in_channels=1),
        WHOLE_IMAGES | NO_MASKS,
        projects=False,
    ),
    "rows of images": Family(
        partial(RowRNN, image_size=SIDE, in_channels=1, hidden_dim=16),
        WHOLE_IMAGES | NO_MASKS | {"token labels": "f"},
        projects=False,
    ),
    "Transformers of timm's": Family(
        partial(Timm, "test_vit", image_size=SIDE, in_channels=1), WHOLE_IMAGES | NO_MASKS
    ),
    "ResNets and others of timm's": Family(
        partial(Timm, "test_resnet", image_size=SIDE, in_channels=1),
        WHOLE_IMAGES | NO_MASKS,
        projects=False,
    ),
}
# What the error says, by the mark that the table has.
REASONS = {
    "a": "distillation needs a token that learns from the teacher, and this .* has none",
    "b": "takes no packs: relative positions, windows and convolutions need images of one size",
    "c": "MAE shows its encoder some patches and no others, and this .* needs the whole grid",
    "d": "masked_patches hides patches, and .* takes no masks",
    "e": "mix_tokens puts patches of one image into another, which .* cannot",
    "f": r"makes .* patches of an image of .*, and the data has labels for \(64, 64\)",
}

GRAY: dict[str, Any] = {"source": "digits", "channels": 1, "mean": (0.5,), "std": (0.5,)}
GRAY |= {"num_workers": 0}
SCENES = {"num_train": 8, "num_val": 4}
SGD = Optimization("sgd", base_lr=0.05, reference_batch=None, weight_decay=0.0, warmup_epochs=0.0)
HEADS = {"num_prototypes": 16, "hidden_dim": 8, "bottleneck_dim": 4, "freeze_last_layer": 0}
HEADS |= {"stop_on_collapse": False}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


class Twice:
    """The same batch for two steps, so that a loss that changes does so because weights have."""

    def train_dataloader(self) -> DataLoader[Any]:
        first = next(iter(super().train_dataloader()))  # type: ignore[misc]
        return DataLoader([first, first], batch_size=None)  # type: ignore[arg-type]


class SameImages(Twice, ImageDataModule):
    pass


class SamePacks(Twice, PackedDataModule):
    pass


class SameLabels(Twice, TokenLabelDataModule):
    pass


class SameViews(Twice, MultiCropDataModule):
    pass


def images() -> ImageDataModule:
    return SameImages(**GRAY, image_size=SIDE, batch_size=4)


def packs() -> PackedDataModule:
    return SamePacks(**GRAY, num_rows=2, row_length=48, eval_side=SIDE)


def views(num_local: int) -> MultiCropDataModule:
    sizes = {"image_size": SIDE, "local_size": SIDE, "num_local": num_local}
    return SameViews(**GRAY, **sizes, batch_size=4)


def labelled(maps: str) -> TokenLabelDataModule:
    given = GRAY | {"source": "shapes", "source_args": SCENES}
    return SameLabels(maps, **given, image_size=2 * SIDE, batch_size=4)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the tokens' labels of all training images."""
    path = tmp_path_factory.mktemp("maps")
    write_maps(path, open_source("shapes", "train", None, 1, **SCENES))
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a teacher."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(timm.create_model(TEACHER, num_classes=10, in_chans=1).state_dict(), path)
    return str(path)


class Method(NamedTuple):
    """A column: the method around a toy, and its data."""

    build: Callable[[Family, str], LightningModule]
    data: Callable[..., Any]


def distilled(family: Family, weights: str) -> Supervised:
    has_token = "distillation" not in family.refuses
    backbone = family.toy(**({"distillation_token": True} if has_token else {}))
    return Supervised(backbone, 10, SGD, distillation=Distillation(TEACHER, weights))


def token_labeling(family: Family, _: str, mix_tokens: Literal["batch"] | None) -> TokenLabeling:
    """Of larger images: some make one patch of 32 x 32 pixels."""
    size = {"image_size": 2 * SIDE} if "image_size" in family.toy.keywords else {}
    return TokenLabeling(family.toy(**size), 10, SGD, mix_tokens=mix_tokens)


METHODS = {
    "supervised": Method(lambda f, _: Supervised(f.toy(), 10, SGD), images),
    "packs": Method(lambda f, _: Supervised(f.toy(), 10, SGD), packs),
    "distillation": Method(distilled, images),
    "token labels": Method(partial(token_labeling, mix_tokens=None), labelled),
    "MixToken": Method(partial(token_labeling, mix_tokens="batch"), labelled),
    "DINO": Method(lambda f, _: DINO(f.toy(), SGD, **HEADS), partial(views, 1)),
    "iBOT": Method(
        lambda f, _: DINO(f.toy(), SGD, **HEADS, masked_patches=MaskedPatches(probability=1.0)),
        partial(views, 1),
    ),
    "MoCo v3": Method(
        lambda f, _: MoCo(f.toy(), SGD, 8, 4, freeze_patches=f.projects), partial(views, 0)
    ),
    "MAE": Method(lambda f, _: MAE(f.toy(), SGD, **DECODER), images),
    "MAE on packs": Method(lambda f, _: MAE(f.toy(), SGD, **DECODER), packs),
    "linear probe": Method(lambda f, _: LinearProbe(f.toy(), 10, optimizer=SGD), images),
    "k-NN": Method(lambda f, _: Supervised(f.toy(), 10, SGD), images),
}


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def fit(method: LightningModule, data: Any, *callbacks: Callback) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=1 if callbacks[1:] else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **quiet,
    )
    trainer.fit(method, data)
    return trainer


def parameters(network: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize("column", METHODS)
@pytest.mark.parametrize("row", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_two_steps(row: str, column: str, weights: str, maps: str) -> None:
    family, method, losses = FAMILIES[row], METHODS[column], Losses()
    data = method.data(maps) if method.data is labelled else method.data()
    seed_everything(0, verbose=False)
    if column in family.refuses:
        with pytest.raises(ValueError, match=REASONS[family.refuses[column]]):
            fit(method.build(family, weights), data, losses)
        assert not losses.seen
        return
    module = method.build(family, weights)
    network: Any = next(iter(module.networks().values()))  # type: ignore[operator]
    network = getattr(module, "student", network)
    before = parameters(network.backbone)
    callbacks = [losses, KNN(k=[2], max_bank=8)] if column == "k-NN" else [losses]
    trainer = fit(module, data, *callbacks)
    first, second = losses.seen
    assert math.isfinite(first)
    assert math.isfinite(second)
    assert first != second
    after = parameters(network.backbone)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (moved == 0) if column == "linear probe" else (moved > len(before) // 2)
    if column == "k-NN":
        assert 0 <= trainer.callback_metrics["val/knn_top1"] <= 1


@pytest.mark.parametrize("row", [row for row, family in FAMILIES.items() if not family.projects])
def test_moco_says_where_there_is_no_projection_to_keep(row: str) -> None:
    says = "freeze_patches keeps the projection of patches .* set freeze_patches to false"
    with pytest.raises(ValueError, match=says):
        MoCo(FAMILIES[row].toy())


def test_the_table_of_the_readme_is_this_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## Which backbone with which method\n")
    lines = section.split("\n## ")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    head, _, *rows = table
    assert head[1:] == list(METHODS)
    assert [re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]) for row in rows] == list(FAMILIES)
    for row, family in zip(rows, FAMILIES.values(), strict=True):
        assert row[1:] == [family.refuses.get(column, "yes") for column in METHODS]
    assert [line[0] for line in lines if re.match("[a-z]: ", line)] == list(REASONS)


def test_every_family_of_ours_has_a_row() -> None:
    from modules.backbones import FAMILIES as KNOWN

    assert {f.toy.func for f in FAMILIES.values()} == set(KNOWN.values())  # type: ignore[attr-defined]
