"""`patchlight look`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import look as verb
from experiments.look import chosen_paths, look, size_for
from modules import weights
from modules.backbones import NaViT, ViT
from tests.modules.test_weights import small_network

ALL = {
    *("attention", "attention_mass", "rollout", "attention_distance", "position_similarity"),
    *("embedding_filters", "patch_pca"),
}
RECIPE = """
model:
  class_path: modules.Supervised
  init_args:
    num_classes: 5
    backbone:
      class_path: modules.backbones.ViT
      init_args: {variant: mu, patch_size: 4, image_size: 16, in_channels: 1, num_registers: 1}
"""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in a flat folder and one that is none; the working directory is another."""
    monkeypatch.setenv("PATCHLIGHT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_pictures_of_a_published_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    network = small_network(patch_size=8, num_heads=1)  # a width of 48 tells nothing of heads
    save_file(weights.to_timm(network), tmp_path / "vit.safetensors")
    config = tmp_path / "recipe.yaml"
    arguments = "{embed_dim: 48, depth: 2, num_heads: 1, patch_size: 8, image_size: 32}"
    head, _ = RECIPE.split("init_args: {variant")
    config.write_text(f"{head}init_args: {arguments}\n", encoding="utf-8")
    options = ["--checkpoint", "vit.safetensors", "--config", str(config)]
    assert look([*options, "--images", str(photos), "--count", "4"]) == 0
    said = capsys.readouterr()
    written = [Path(line) for line in said.out.split()]
    assert {path.stem for path in written} == ALL
    assert all(path.parent == Path("pictures") for path in written)
    assert "left out" in said.err
    assert "broken.png" in said.err
    for path in written:
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert min(picture.size) > 100


def test_size_out_and_mass_change_the_pictures(photos: Path, recipe: Path, tmp_path: Path) -> None:
    random = ["-c", "random", "--config", str(recipe), "--images", str(photos / "0.png")]
    for out, more in (
        ("plain", []),
        ("same", []),
        ("rect", ["--size", "16", "24"]),
        ("mass", ["--mass", "0.1"]),
    ):
        assert look([*random, "--out", str(tmp_path / out), *more]) == 0

    def read(out: str, name: str) -> np.ndarray:
        with Image.open(tmp_path / out / f"{name}.png") as picture:
            return np.asarray(picture)

    for name in ALL:
        assert np.array_equal(read("plain", name), read("same", name)), name
    assert read("rect", "attention").shape[1] > read("plain", "attention").shape[1]
    assert np.array_equal(read("mass", "attention"), read("plain", "attention"))
    assert not np.array_equal(read("mass", "attention_mass"), read("plain", "attention_mass"))


def test_pictures_of_a_run_lie_in_the_run(
    photos: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "vit"
    (run / "checkpoints").mkdir(parents=True)
    recipe.rename(run / "config.yaml")
    backbone = ViT("mu", patch_size=4, image_size=16, in_channels=1, num_registers=1)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"model": state}, run / "checkpoints" / "best.ckpt")
    drawn = {"one": torch.rand(3, 4, 5)}
    monkeypatch.setattr(verb, "pictures_of", lambda *_: drawn)
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert look(["--checkpoint", str(checkpoint), "--images", str(photos)]) == 0
    with Image.open(run / "pictures" / "one.png") as picture:
        found = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, drawn["one"], atol=0.5 / 255, rtol=0)


def test_images_are_chosen_evenly(photos: Path) -> None:
    names = [path.name for path in chosen_paths(photos, 2)]
    assert names == ["0.png", "2.png"]
    assert len(chosen_paths(photos, 100)) == 4


def test_sizes() -> None:
    vit, navit = ViT("mu", patch_size=8, image_size=(16, 24)), NaViT("mu", patch_size=8)
    assert size_for(vit, None, None) == (16, 24)
    assert size_for(vit, 32, None) == (32, 32)
    assert size_for(navit, None, [8, 40]) == (8, 40)
    with pytest.raises(ValueError, match="images of any size; choose one, such as --side"):
        size_for(navit, None, None)
    with pytest.raises(ValueError, match=r"20x20 are not divisible by patches of 8.*16x16"):
        size_for(vit, 20, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "--images nowhere does not exist"),
        (["--images", "photos/broken.png"], "none of 1 images could be read"),
        (["--images", "photos", "--count", "0"], "--count 0; expected at least 1"),
        (["--images", "photos", "--mass", "60"], r"--mass 60\.0; expected a share"),
        (["--images", "photos", "--side", "0"], "0x0 are not divisible"),
    ],
)
def test_what_cannot_be_looked_at_is_told(
    options: list[str], message: str, photos: Path, recipe: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        look(["-c", "random", "--config", str(recipe), *options])
