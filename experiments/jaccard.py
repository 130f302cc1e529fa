"""`patchlight jaccard`: does the attention of a backbone lie on the objects?

    patchlight jaccard --checkpoint RUN/checkpoints/last.ckpt
    patchlight jaccard --checkpoint random --config RECIPE

Intersection over union of the patches that hold most of each head's attention with the object's
mask, mean over held-out images (DINO, Caron et al. 2021, figure 4: 60 % of the attention, the last
block's class token). It needs a source that knows masks, such as `shapes`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from datamodules.geometry import EvalGeometry
from datamodules.one_size import OneSizeDataModule
from datamodules.progress import Bar
from datamodules.sources import BadImageError, Source
from experiments.judge import Case, make_parser
from modules import analysis

MEAN, EACH = "mean of heads", "best head of each image"


def masks_of(source: Source, indices: Sequence[int], geometry: EvalGeometry) -> Tensor:
    """Bool [b, height, width]: masks of images, cut and resized as these are."""
    masks = []
    for index in indices:
        mask = source[index].mask
        assert mask is not None
        masks.append(geometry(255 * mask[:, :, None].astype(np.uint8), 0)[0] > 127)
    return torch.stack(masks)


def check_masks(source: Source, name: str) -> None:
    """Refuse images without masks, by the first that can be read."""
    for index in range(len(source)):
        try:
            example = source[index]
        except BadImageError:
            continue
        if example.mask is None:
            break
        return
    raise ValueError(
        f"images of {name} have no masks of their objects; a source that has is shapes: "
        f"--data shapes"
    )


def overlaps(case: Case, mass: float) -> Tensor:
    """[n, 1 + h] of every held-out image that shows an object: mean of heads, then each head."""
    data, backbone = case.data, case.subject.backbone.to(case.device)
    if not isinstance(data, OneSizeDataModule):
        raise ValueError("attention is compared with masks of images of one size: --data shapes")
    source, found = data.val_source, []
    check_masks(source, data.source)
    with torch.inference_mode(), Bar("attention", len(source)) as bar:
        for batch in data.eval_batches(source, case.device):
            attention = analysis.readout_attention(analysis.observe(backbone, batch.images))
            maps = torch.cat((attention.mean(dim=1, keepdim=True), attention), dim=1)
            geometry = EvalGeometry(batch.images.shape[-2:], data.eval_crop, data.interpolation)
            valid = batch.is_valid
            masks = masks_of(source, batch.indices[valid].tolist(), geometry).to(case.device)
            kept = analysis.keep_mass(maps[valid], mass)
            iou = analysis.jaccard(kept, masks[:, None].expand(-1, kept.shape[1], -1, -1))
            found.append(iou[masks.any(dim=(-2, -1))].cpu())
            bar.advance(len(masks))
    return torch.cat(found)


def jaccard(argv: Sequence[str]) -> int:
    """The verb."""
    parser = make_parser("jaccard", "Compare attention with the masks of objects.")
    parser.add_argument(
        "--mass", type=float, default=0.6, help="share of the attention kept; %(default)s"
    )
    given, options = parser.parse_known_args(argv)
    if not 0.0 < given.mass <= 1.0:
        raise ValueError(f"--mass {given.mass}; expected a share within (0, 1]")
    case = Case(given, options)
    found = overlaps(case, given.mass)
    if len(found) == 0:
        raise ValueError("no held-out image shows an object")
    heads = found[:, 1:]
    values = {MEAN: float(found[:, 0].mean())}
    values |= {f"head {i + 1}": float(mean) for i, mean in enumerate(heads.mean(dim=0))}
    values["best head"] = float(heads.mean(dim=0).max())
    values[EACH] = float(heads.amax(dim=1).mean())
    table = Table("attention", "intersection over union")
    for name, value in values.items():
        table.add_row(name, f"{100 * value:.2f} %")
    images = f"{len(found):,} held-out images, {100 * given.mass:g} % of the attention"
    if given.mass != 0.6:
        case.variant += f".mass{given.mass:g}"
    case.report("jaccard", "best head", table, values, images)
    return 0
