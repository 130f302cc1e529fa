"""How the features of a network that is not known are laid out, from their shapes."""

from typing import NamedTuple

from torch import Tensor, nn

from modules.backbones.resampling import Grid


class Layout(NamedTuple):
    """How a network's map of features is laid out.

    kind:   "NLC" tokens, "NCHW" or "NHWC"
    stride: pixels between neighbours
    prefix: tokens before the patches
    """

    kind: str
    stride: int
    prefix: int

    def grid_of(self, size: tuple[int, int], count: int) -> Grid | None:
        """Rows and columns of so many patches of an image; None where they are no such grid."""
        rows, columns = (side // self.stride for side in size)
        if rows * columns != count:  # padded up to whole patches
            rows, columns = (-(-side // self.stride) for side in size)
        return (rows, columns) if rows * columns == count else None


def find_layout(model: nn.Module, features: Tensor, size: tuple[int, int]) -> Layout | None:
    """How features of an image of this size are laid out; None where they are no grid."""
    if features.ndim == 3:
        known = getattr(model, "num_prefix_tokens", None)
        for prefix in (0, 1, 2) if known is None else (known,):
            count = features.shape[1] - prefix
            rows = max(1, round((count * size[0] / size[1]) ** 0.5))
            if stride := find_stride(model, size, (rows, count // rows)):
                layout = Layout("NLC", stride, prefix)
                if layout.grid_of(size, count) is not None:
                    return layout
    elif features.ndim == 4:
        kinds = {"NCHW": features.shape[2:], "NHWC": features.shape[1:3]}
        told = str(getattr(model, "output_fmt", ""))
        for kind in (told,) if told in kinds else tuple(kinds):
            if stride := find_stride(model, size, (kinds[kind][0], kinds[kind][1])):
                return Layout(kind, stride, 0)
    return None


def find_stride(model: nn.Module, size: tuple[int, int], grid: Grid) -> int | None:
    """Pixels between neighbours of a grid over an image; None where they are not square."""
    info = getattr(model, "feature_info", None)
    told = info[-1].get("reduction") if isinstance(info, list) and info else None
    for stride in (told, round(size[0] / max(1, grid[0]))):
        if stride and all(
            n in (side // stride, -(-side // stride)) for n, side in zip(grid, size, strict=True)
        ):
            return int(stride)
    return None
