"""`patchlight relabel`: maps of timm's teachers and of ours; stopped, it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.data import has_len_all_ranks
from PIL import Image
from torchvision import datasets

from callbacks.score_maps import ScoreMaps
from datamodules.label_maps import LabelMaps
from datamodules.label_shards import About, shard_path
from datamodules.labelling import LabellingDataModule
from datamodules.sources import open_source
from experiments.relabel import relabel
from tests import small

ARGS = {"num_train": 10, "num_val": 2}
SHAPES = ["--data", "shapes", "--source-args", json.dumps(ARGS), "--num-workers", "0"]
SMALL = ["--batch-size", "2", "--shard-size", "4", "--accelerator", "cpu", "--devices", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    torch.manual_seed(0)
    name, path = "test_resnet.r160_in1k", tmp_path_factory.mktemp("teacher") / "weights.pth"
    torch.save(timm.create_model(name, num_classes=10).state_dict(), path)
    return ["--teacher", f"timm:{name}", "--weights", str(path)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_timm_teacher_labels_every_image(
    teacher: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size", "64", "96", "--top", "3", "--remainder"]
    assert relabel([*teacher, *SHAPES, *SMALL, *options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "maps of 10 images, up to 2x3 cells, 3 of 10 classes each" in said.out
    assert "GB in all, about" in said.err
    source = open_source("shapes", "train", None, channels=3, **ARGS)
    maps = LabelMaps(tmp_path, source, None)
    labels = maps.read(9, "teacher")
    assert labels.ids.shape == (2, 3, 3)
    assert len(maps.shards) == 3
    # The scores are those of the network for the whole image, stretched.
    network = timm.create_model(
        "test_resnet.r160_in1k", num_classes=10, checkpoint_path=teacher[-1]
    )
    image = torch.from_numpy(source[9].image).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(
        image, (64, 96), mode="bicubic", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(network.pretrained_cfg[n]).view(3, 1, 1) for n in ("mean", "std"))
    pixels = (image.round().clamp(0, 255) / 255 - mean) / std
    answer = network.eval()(pixels)[0]
    dense = np.repeat(labels.rest[..., None], 10, axis=-1)
    np.put_along_axis(dense, labels.ids.astype(np.int64), labels.scores, axis=-1)
    best = answer.argmax()
    assert dense[..., best].mean() == pytest.approx(answer[best].item(), abs=0.02)


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_ends_with_the_same_maps(
    teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> Path:
        relabel([*teacher, *SHAPES, *SMALL, "--image-size", "64", "--out", str(tmp_path / name)])
        return tmp_path / name

    whole = contents(run("whole"))
    assert len(whole) == 4
    original = ScoreMaps.on_predict_batch_end

    def stopping(self: ScoreMaps, *arguments: Any) -> None:
        original(self, *arguments)
        if arguments[4] == 2:  # in the midst of the second shard
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(ScoreMaps, "on_predict_batch_end", stopping)
        with pytest.raises(Stop):
            run("stopped")
    assert len(contents(tmp_path / "stopped")) == 2
    first = shard_path(tmp_path / "stopped", 0)
    made = first.stat().st_mtime_ns
    assert contents(run("stopped")) == whole
    assert first.stat().st_mtime_ns == made
    shard_path(tmp_path / "stopped", 1).write_bytes(b"damaged")
    assert contents(run("stopped")) == whole


def test_maps_of_images_that_were_changed_or_cannot_be_read(
    teacher: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "images"
    for name in ("train/a/0.png", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(root / name)
    (root / "train/a/1.png").write_bytes(b"broken")
    run = [*teacher, "--data", str(root), "--num-classes", "10", "--num-workers", "0", *SMALL]
    run += ["--shard-size", "1", "--image-size", "64", "--out", str(tmp_path / "maps")]
    relabel(run)
    source = open_source("folder", "train", str(root), channels=3)
    maps = LabelMaps(tmp_path / "maps", source, str(root))
    assert [maps.read(i, "zeros").ids.shape[:2] for i in range(3)] == [(2, 2), (0, 0), (2, 2)]
    before = contents(tmp_path / "maps")
    Image.fromarray(np.full((40, 60, 3), 11, np.uint8)).save(root / "train/a/1.png")
    relabel(run)
    after = contents(tmp_path / "maps")
    assert [name for name in before if before[name] != after[name]] == ["maps-00001.safetensors"]
    assert LabelMaps(tmp_path / "maps", source, str(root)).read(1, "zeros").ids.shape[:2] == (2, 2)


def test_a_checkpoint_of_ours_is_a_teacher(tmp_path: Path) -> None:
    trainer = small.trainer(tmp_path, max_epochs=1)
    trainer.fit(small.method(), small.data())
    (last,) = tmp_path.rglob("last.ckpt")
    run = ["--teacher", str(last), "--network", "averaged", "--data", "digits", *SMALL]
    run += ["--shard-size", "1000", "--batch-size", "500", "--num-workers", "0"]
    relabel([*run, "--out", str(tmp_path / "maps")])
    source = open_source("digits", "train", None, channels=1)
    maps = LabelMaps(tmp_path / "maps", source, None)
    assert maps.about.num_classes == 10
    assert maps.read(0, "zeros").ids.shape == (2, 2, 5)
    assert maps.about.teacher.endswith("averaged at 16x16")
    for name in "abcdefghijkl":
        (tmp_path / "twelve" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "twelve" / name / "0.png")
    many = ["--data", str(tmp_path / "twelve"), "--source-args", "{val_fraction: 0.5}"]
    with pytest.raises(ValueError, match="maps are of 10 classes, but the data has 12; take a"):
        relabel(["--teacher", str(last), *many, "--out", str(tmp_path / "none")])
    # A checkpoint tells its classes, so that images need none.
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (16, 16)).save(flat / "0.png")
    run = ["--teacher", str(last), "--data", str(flat), *SMALL, "--num-workers", "0"]
    run += ["--source-args", json.dumps({"val_root": str(flat)})]
    assert relabel([*run, "--out", str(tmp_path / "unlabelled")]) == 0
    with pytest.raises(ValueError, match=r"0.png is a file; expected a directory for the maps"):
        relabel([*run, "--out", str(flat / "0.png")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a teacher"),
        (["--teacher", "timm:nothing"], "no model that timm knows"),
        (["--teacher", "nowhere.ckpt"], "no such file"),
        (["--import", "nowhere"], r"shapes|there is no label map"),
        (["--import", "nowhere", "--top", "3"], "--top is 3, which nothing reads with --import"),
        (["--teacher", "timm:resnet18", "--network", "x"], "--network is x, which nothing reads"),
        (["--teacher", "x.ckpt", "--num-classes", "7"], "--num-classes is 7, which nothing reads"),
        (["--teacher", "timm:resnet18", "--weights", "x"], "--weights: there is no file x"),
        (["--import", "nowhere", "--num-classes", "9"], "of 9 classes, but the data has 10; take"),
    ],
)
def test_errors_name_the_fix(arguments: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        relabel([*arguments, *SHAPES, *SMALL, "--out", str(tmp_path)])


def test_scenes_of_other_options_are_no_images_of_these_maps(
    teacher: list[str], tmp_path: Path
) -> None:
    relabel([*teacher, *SHAPES, *SMALL, "--image-size", "64", "--out", str(tmp_path)])
    before = contents(tmp_path)
    fewer, plain = ({**ARGS, **other} for other in ({"num_train": 6}, {"texture": 0.0}))
    grey = open_source("shapes", "train", None, channels=1, **fewer)
    assert LabelMaps(tmp_path, grey, None).read(5, "zeros").ids.shape == (2, 2, 5)
    with pytest.raises(ValueError, match=r"shapes/train\[0\] is not the image that its label map"):
        LabelMaps(tmp_path, open_source("shapes", "train", None, channels=3, **plain), None)
    source = ["--data", "shapes", "--source-args", json.dumps(plain), "--num-workers", "0"]
    relabel([*teacher, *source, *SMALL, "--image-size", "64", "--out", str(tmp_path)])
    after = contents(tmp_path)
    assert [name for name in before if before[name] != after[name]] == [
        f"maps-{number:05d}.safetensors" for number in range(3)
    ]


def test_another_teacher_does_not_go_on(teacher: list[str], tmp_path: Path) -> None:
    run = [*teacher, *SHAPES, *SMALL, "--out", str(tmp_path)]
    relabel([*run, "--image-size", "64"])
    with pytest.raises(ValueError, match=r"holds maps with teacher .* at 64x64.* now it is"):
        relabel([*run, "--image-size", "96"])
    with pytest.raises(ValueError, match="--top is 11; expected 1 to 10"):
        relabel([*run, "--image-size", "64", "--top", "11"])


def test_what_is_not_made_alike_does_not_go_on(teacher: list[str], tmp_path: Path) -> None:
    """Other weights in the same file, or the same that see images otherwise."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(Path(teacher[-1]).read_bytes())
    run = [*teacher[:-1], str(weights), *SHAPES, *SMALL, "--image-size", "64"]
    run += ["--out", str(tmp_path / "maps")]
    relabel(run)
    relabel(run)  # nothing is missing
    with pytest.raises(ValueError, match="with interpolation 'bicubic', now it is 'bilinear'"):
        relabel([*run, "--interpolation", "bilinear"])
    with pytest.raises(ValueError, match="with precision '32-true', now it is 'bf16-mixed'"):
        relabel([*run, "--precision", "bf16-mixed"])
    state = torch.load(weights)
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, weights)
    with pytest.raises(ValueError, match=r"with fingerprint '.*', now it is '.*'; name another"):
        relabel(run)


def test_larger_shards_leave_none_of_the_smaller_ones(teacher: list[str], tmp_path: Path) -> None:
    run = [*teacher, *SHAPES, *SMALL, "--image-size", "64", "--out", str(tmp_path)]
    relabel(run)
    (tmp_path / ".maps-00000.safetensors.123").write_bytes(b"half")
    relabel([*run, "--shard-size", "8"])
    assert list(contents(tmp_path)) == [
        "maps-00000.safetensors",
        "maps-00001.safetensors",
        "maps.json",
    ]


def test_fewer_missing_shards_than_devices(tmp_path: Path) -> None:
    """A device without a shard has no batches, and Lightning lets it wait for the others."""
    source = open_source("shapes", "train", None, channels=3, **ARGS)
    about = About("someone", 10, 3, remainder=False)
    data = LabellingDataModule(source, None, tmp_path, about, (8, 8), "bilinear", 2, 100, 0)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)  # type: ignore[assignment]
    loader = data.predict_dataloader()
    assert len(loader) == 0
    strategy = SingleDeviceStrategy("cpu")
    strategy.reduce = lambda *_, **__: torch.tensor(5)  # type: ignore[method-assign]
    assert has_len_all_ranks(
        loader, strategy, data.allow_zero_length_dataloader_with_multiple_devices
    )


@pytest.mark.parametrize(("bias", "says"), [(1e5, r"is 1e\+05;"), (float("nan"), "is NaN;")])
def test_scores_that_no_map_can_hold_stop_it_at_once(
    teacher: list[str], bias: float, says: str, tmp_path: Path
) -> None:
    state = torch.load(teacher[-1])
    torch.save({**state, "fc.bias": state["fc.bias"] + bias}, tmp_path / "weights.pth")
    run = [*teacher[:-1], str(tmp_path / "weights.pth"), *SHAPES, *SMALL, "--image-size", "64"]
    with pytest.raises(ValueError, match=rf"score of shapes/train\[0\] {says} expected .*65504"):
        relabel([*run, "--out", str(tmp_path / "maps")])
    assert list(contents(tmp_path / "maps")) == ["maps.json"]


def test_data_of_torchvision(
    teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Few(datasets.VisionDataset):
        def __init__(self, root: str, train: bool = True) -> None:
            super().__init__(root)
            self.targets = list(range(10))

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (40, 30), (9 * index, 0, 0)), index

    monkeypatch.setattr(datasets, "Few", Few, raising=False)
    run = [*teacher, "--data", "torchvision:Few", "--num-workers", "0", *SMALL]
    run += ["--image-size", "64", "--out", str(tmp_path / "maps")]
    assert relabel([*run, "--root", str(tmp_path)]) == 0
    source = open_source("torchvision:Few", "train", str(tmp_path), channels=3)
    assert LabelMaps(tmp_path / "maps", source, str(tmp_path)).read(9, "zeros").ids.any()
    with pytest.raises(ValueError, match="torchvision:Few needs --root"):
        relabel(run)
    with pytest.raises(ValueError, match="--source-args has root; remove it: it is --root"):
        relabel([*run, "--source-args", "{root: here}"])
    with pytest.raises(ValueError, match=r"--root is .*, but --data .* is a directory itself"):
        relabel([*run, "--root", "x", "--data", str(tmp_path)])
