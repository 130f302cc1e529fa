"""Images read row by row, by two recurrent networks: one from the top, one from the bottom.

"Bidirectional Recurrent Neural Networks" (Schuster and Paliwal 1997), with the cells of "Long
Short-Term Memory" (Hochreiter and Schmidhuber 1997) or "Learning Phrase Representations using RNN
Encoder-Decoder" (GRU; Cho et al. 2014).

    x_1 .. x_n = rows of the image                       28 steps of 28 values for MNIST
    f_i = forward cell(x_i, f_{i-1});  b_i = backward cell(x_i, b_{i+1})
    sequence: merge(f_i, b_i) for every row;  pooled: merge(f_n, b_1), the last output of each

A way's last output has read the whole image: f_n ends at the bottom row, b_1 at the top one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, overload

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from modules.backbones.attention import Packed
from modules.backbones.layers import Backbone, Features
from modules.backbones.masked import Group, Visible

Cell = Literal["lstm", "gru", "rnn"]
Merge = Literal["concat", "sum", "mul", "ave", "none"]
CELLS: dict[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
MERGES = ("concat", "sum", "mul", "ave", "none")
# (h, c) of an LSTM, h of the others, each [1, b, d].
State = Tensor | tuple[Tensor, Tensor]
Both = tuple[Tensor, Tensor]


@contextmanager
def whole(x: Float[Tensor, "b n e"]) -> Iterator[Float[Tensor, "b n e"]]:
    """x in float32 and no autocast on a CPU, whose bfloat16 LSTM is not on all processors."""
    if x.device.type != "cpu":
        yield x
        return
    with torch.autocast("cpu", enabled=False):
        yield x.float()


def merged(forward: Tensor, backward: Tensor, merge: Merge) -> Tensor | Both:
    """What both ways gave as one, or, with "none", as they are."""
    if merge == "none":
        return forward, backward
    if merge == "concat":
        return torch.cat((forward, backward), dim=-1)
    if merge == "mul":
        return forward * backward
    return (forward + backward) * (0.5 if merge == "ave" else 1.0)


class Bidirectional(nn.Module):
    """Two recurrent networks over one sequence, the second one from its end.

    Args:
        input_dim: width of the sequence.
        hidden_dim: width of each network's states.
        cell: "lstm", "gru" or "rnn" (tanh) of the one from the start.
        backward_cell: of the one from the end; null for the same.
        merge: how two outputs become one: "concat", "sum", "mul", "ave", or "none": both.

    Raises:
        ValueError: unknown cells, or an unknown way to merge.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        cell: Cell = "lstm",
        backward_cell: Cell | None = None,
        merge: Merge = "concat",
    ) -> None:
        super().__init__()
        backward_cell = backward_cell or cell
        for name, value in (("cell", cell), ("backward_cell", backward_cell)):
            if value not in CELLS:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(CELLS)}")
        if merge not in MERGES:
            raise ValueError(f"merge is {merge!r}; expected one of {', '.join(MERGES)}")
        self.merge, self.out_dim = merge, hidden_dim * (2 if merge == "concat" else 1)
        self.forward_rnn = CELLS[cell](input_dim, hidden_dim, batch_first=True)
        self.backward_rnn = CELLS[backward_cell](input_dim, hidden_dim, batch_first=True)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        forward_state: State | None = None,
        backward_state: State | None = None,
    ) -> tuple[Tensor | Both, Tensor | Both]:
        """Merged outputs [b, n, d] of every step, and merged last ones [b, d].

        The states are what each network begins with, zeros where none are given.
        """
        with whole(x) as x:
            ahead, _ = self.forward_rnn(x, forward_state)
            back, _ = self.backward_rnn(x.flip(1), backward_state)
        sequence = merged(ahead, back.flip(1), self.merge)
        return sequence, merged(ahead[:, -1], back[:, -1], self.merge)


class RowRNN(Backbone):
    """A bidirectional recurrent network over the rows of images.

    `Features.patches` has one vector a row. Takes images of one width, and lists of groups.

    Args:
        image_size: side in pixels, or (height, width).
        in_channels: of the images; a row has width * channels values.
        hidden_dim: width of the states each way.
        depth: networks over each other, the next over the merged outputs of the one before.
        cell: "lstm", "gru" or "rnn".
        backward_cell: of the way from the bottom; null for the same.
        merge: "concat", "sum", "mul" or "ave".
        learned_states: what the networks begin with is learned, in the place of zeros.
        dropout: of what each network over another one reads, and of the pooled vector.

    Raises:
        ValueError: values out of range.
    """

    patch_size, num_prefix_tokens, max_grid, takes_packs = 1, 0, None, False
    image_size: tuple[int, int]

    def __init__(
        self,
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        hidden_dim: int = 128,
        depth: int = 1,
        cell: Cell = "lstm",
        backward_cell: Cell | None = None,
        merge: Literal["concat", "sum", "mul", "ave"] = "concat",
        learned_states: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        sizes = {"height": height, "width": width, "in_channels": in_channels}
        for name, value in (sizes | {"hidden_dim": hidden_dim, "depth": depth}).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if merge not in MERGES[:-1]:
            listed = ", ".join(MERGES[:-1])
            raise ValueError(f"merge is {merge!r}; a head reads one vector: expected {listed}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; expected within [0, 1)")
        self.image_size, self.in_channels, self.num_layers = (height, width), in_channels, depth
        dims = [width * in_channels]
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = Bidirectional(dims[-1], hidden_dim, cell, backward_cell, merge)
            self.blocks.append(block)
            dims.append(block.out_dim)
        self.embed_dim = dims[-1]
        # Two tensors of an LSTM, one of the others, for each way of each network.
        self.states: nn.ParameterList | None = None
        if learned_states:
            ways = [way for block in self.blocks for way in (block.forward_rnn, block.backward_rnn)]
            shapes = [2 if isinstance(way, nn.LSTM) else 1 for way in ways]
            zeros = [torch.zeros(count, 1, 1, hidden_dim) for count in shapes]
            self.states = nn.ParameterList(nn.Parameter(each) for each in zeros)
        self.drop = nn.Dropout(dropout)

    @overload
    def forward(self, images: Group | Visible | Packed) -> Features: ...
    @overload
    def forward(self, images: list[Group]) -> list[Features]: ...
    def forward(self, images: Group | Visible | Packed | list[Group]) -> Features | list[Features]:
        if isinstance(images, list):
            return [self(group) for group in images]
        return self.last_blocks(images, 1)[0]

    def last_blocks(self, images: Group | Visible | Packed, count: int) -> list[Features]:
        """What the last `count` networks give, the last one last.

        Raises:
            ValueError: images that it was not made for, or more networks than there are.
        """
        if not 1 <= count <= self.num_layers:
            raise ValueError(
                f"the last {count} of {self.num_layers} blocks: set num_blocks to less"
            )
        x, found = self.rows(images), []
        for i, block in enumerate(self.blocks):
            states = [self.state(2 * i + way, len(x)) for way in range(2)]
            x, pooled = block(x if i == 0 else self.drop(x), *states)
            found.append(Features(self.drop(pooled), None, x, (x.shape[1], 1)))
        return found[-count:]

    def rows(self, images: Group | Visible | Packed) -> Float[Tensor, "b n e"]:
        """The rows of images, the channels of a row one after another."""
        expected = (self.in_channels, self.image_size[1])
        if not isinstance(images, Tensor) or (images.shape[1], images.shape[3]) != expected:
            what = type(images).__name__
            if isinstance(images, Tensor):
                what = f"images of {images.shape[1]} channels, {images.shape[3]} pixels wide,"
            raise ValueError(
                f"{what} reached a RowRNN, which takes images of {expected[0]} channel(s) "
                f"{expected[1]} pixels wide; set its in_channels and image_size"
            )
        return rearrange(images, "b c y x -> b y (c x)")

    def state(self, place: int, count: int) -> State | None:
        """What a network begins with, for so many images; None for zeros."""
        if self.states is None:
            return None
        parts = [part.expand(-1, count, -1).contiguous() for part in self.states[place].unbind(0)]
        return (parts[0], parts[1]) if len(parts) == 2 else parts[0]

    def no_weight_decay(self) -> frozenset[str]:
        """Learned states; biases have one axis."""
        return frozenset(name for name, _ in self.named_parameters() if name.startswith("states."))

    def layer_of(self, name: str) -> int:
        """The network of a parameter, from 1 on."""
        kind, place, *_ = name.split(".")
        return int(place) // (2 if kind == "states" else 1) + 1
