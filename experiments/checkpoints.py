"""The verbs that look at checkpoints and carry them elsewhere.

patchlight inspect FILE
patchlight export --checkpoint RUN/checkpoints/best.ckpt --out FILE.safetensors
patchlight export --checkpoint RUN/checkpoints/best.ckpt --network averaged --out FILE.onnx
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from callbacks.checkpoint_files import read_checkpoint
from experiments.subject import backbone_kept_in
from modules import weights
from modules.backbones import Backbone, LVViT
from modules.weights.files import read
from modules.weights.inspect import UNKNOWN, Description, describe


def inspect(argv: Sequence[str]) -> int:
    """The verb; 0 where a network was found that loads, 1 where none."""
    parser = argparse.ArgumentParser(
        prog="patchlight inspect", description="Say what a checkpoint holds and what it fits."
    )
    parser.add_argument("file", help=".pth, .ckpt, .safetensors or .npz")
    given = parser.parse_args(argv)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    parts = {name: describe(state) for name, state in read(given.file).items()}
    for name, found in parts.items():
        console.print(tell(name, found, given.file, several=len(parts) > 1))
    return 0 if any(found.backbone for found in parts.values()) else 1


def tell(part: str, found: Description, file: str, several: bool) -> str:
    """One network of a file in words, and the lines of a recipe that load it."""
    lines = [
        f"{part}: {found.num_tensors} tensors, {found.num_parameters:,} parameters, names as "
        f"{found.writer} writes them"
    ]
    if found.others:
        more = f", and {len(found.others) - 6} more" if len(found.others) > 6 else ""
        lines.append(f"  beside backbone and head: {', '.join(found.others[:6])}{more}")
    if found.backbone is None:
        return "\n".join([*lines, "  no ViT of this project: no loader fits it"])
    model: dict[str, Any] = {"weights": file}
    if several:
        model["weights_part"] = part
    drop = {name.split(".")[0] for name in found.others}
    if found.num_classes is None:
        drop |= {"head", "head_dist"} if found.backbone.get("distillation_token") else {"head"}
        drop |= {"aux_head"} if found.kind is LVViT else set()
    if drop:
        model["weights_drop"] = sorted(drop)
    model["num_classes"] = found.num_classes or UNKNOWN
    arguments = own_backbone(file, found.kind) or found.backbone
    name = f"modules.backbones.{found.kind.__name__}"
    model["backbone"] = {"class_path": name, "init_args": arguments}
    whose = {"class_path": "modules.TokenLabeling"} if found.kind is LVViT else {}
    recipe = yaml.safe_dump({"model": {**whose, "init_args": model}}, sort_keys=False)
    told = "it is this"
    if own_backbone(file, found.kind) is None:
        told = (
            "it fits this, but for what leaves no trace (activation, norm epsilon, residual scale, "
        )
        told += "average after the norm, fixed or repeated positions)"
    if UNKNOWN in recipe:
        told += f"; what is {UNKNOWN} is yours to fill in"
    return "\n".join([*lines, f"  {told}:", *(f"    {line}" for line in recipe.splitlines())])


def own_backbone(file: str, kind: type[Backbone]) -> dict[str, Any] | None:
    """The arguments of such a backbone as a run of ours wrote them into its checkpoint."""
    kept = backbone_kept_in(file)
    is_one = kept is not None and kept["class_path"].endswith(f".{kind.__name__}")
    return dict(kept.get("init_args") or {}) if kept is not None and is_one else None


def export(argv: Sequence[str]) -> int:
    """The verb; 0 where the file was written."""
    parser = argparse.ArgumentParser(
        prog="patchlight export", description="Write a trained network for other programs."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a run")
    parser.add_argument("--config", type=Path, help="the run's, where it does not lie beside it")
    parser.add_argument("--network", help="which of the method's, such as averaged or teacher")
    parser.add_argument(
        "--out", type=Path, required=True, help="FILE.safetensors (timm's names) or FILE.onnx"
    )
    given = parser.parse_args(argv)
    if given.out.suffix not in (".safetensors", ".onnx"):
        raise ValueError(f"--out {given.out} should end in .safetensors or .onnx")
    checkpoint = read_checkpoint(given.checkpoint)
    config = given.config or given.checkpoint.parent.parent / "config.yaml"
    method = build_method(config)
    method.load_state_dict(checkpoint["state_dict"], strict=True)
    network = useful_part(choose_network(method, given.network))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = given.out.with_name(f".{os.getpid()}{given.out.suffix}")
    try:
        if given.out.suffix == ".onnx":
            write_onnx(network, temporary)
        else:
            safetensors.torch.save_file(weights.to_timm(network), temporary)
        temporary.replace(given.out)
    finally:
        temporary.unlink(missing_ok=True)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"wrote {given.out}: {count:,} parameters of step {checkpoint['global_step']}")
    if given.out.suffix == ".safetensors":
        arguments = weights.timm_arguments(network)
        which = "create_model" if "model_name" in arguments else "VisionTransformer"
        print(f"timm's {which} takes them with", arguments)
    return 0


def build_method(config: Path) -> LightningModule:
    """The method of a run's `config.yaml`, with first values for weights.

    Raises:
        ValueError: no such file.
    """
    if not config.is_file():
        raise ValueError(f"{config}: no such file; name the run's config.yaml with --config")
    model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    # What these weights were started from need not be there any more.
    for name in ("weights", "weights_part", "weights_drop"):
        model["init_args"].pop(name, None)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    method = parser.instantiate_classes(parser.parse_object({"model": model})).model
    assert isinstance(method, LightningModule)
    return method.eval()


def choose_network(method: LightningModule, name: str | None) -> nn.Module:
    """The network of a method by its name; the first where none is asked for.

    Raises:
        ValueError: the method has no such network.
    """
    networks = {n: child for n, child in method.named_children() if hasattr(child, "backbone")}
    if name is None:
        name = next(iter(networks))
    if name not in networks:
        raise ValueError(
            f"{type(method).__name__} has no network {name!r}; it has {', '.join(networks)}"
        )
    return networks[name]


def useful_part(network: nn.Module) -> nn.Module:
    """A classifier as it is; of other networks the backbone: only training needs the rest."""
    has_classes = isinstance(getattr(network, "head", None), nn.Linear)
    has_classes |= isinstance(getattr(network, "heads", None), nn.Module)  # a probe
    return network if has_classes else network.get_submodule("backbone")


class Embedding(nn.Module):
    """The vector of an image that a backbone pools."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.backbone(images).pooled
        return pooled


def write_onnx(network: nn.Module, path: Path) -> None:
    """Images [batch, c, height, width] to logits, or of a bare backbone to embeddings.

    For any batch size, at the trained resolution.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX needs two more packages: pip install -e '.[onnx]'") from error
    output = "logits"
    if isinstance(network, Backbone):
        network, output = Embedding(network), "embeddings"
    backbone: Any = network.backbone
    images = torch.zeros(2, backbone.in_channels, *backbone.image_size)
    with torch.no_grad():
        network(images)  # what is computed once and kept should not be made while tracing
    # The fused kernel's memory layout is not what the exporter's decomposition gives.
    with sdpa_kernel(SDPBackend.MATH):
        torch.onnx.export(
            network,
            (images,),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=[output],
            dynamic_shapes={"images": {0: "batch"}},
            external_data=False,
            verbose=False,
        )
