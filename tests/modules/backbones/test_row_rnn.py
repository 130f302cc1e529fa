"""Bidirectional networks over the rows of images."""

from typing import Any

import pytest
import torch
from torch import nn

from modules.backbones import RowRNN, create
from modules.backbones.row_rnn import Bidirectional, merged
from modules.supervised import Classifier


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_for_mnist() -> None:
    backbone = RowRNN()
    keras = 2 * 4 * (128 * (28 + 128) + 128)
    assert keras == 160_768
    assert count(backbone) == keras + 1_024  # torch has two biases a gate
    assert count(Classifier(backbone, 10)) == 163_338 + 1_024
    features = backbone(torch.randn(2, 1, 28, 28))
    assert features.pooled.shape == (2, 256)
    assert features.patches.shape == (2, 28, 256)
    assert features.grid == (28, 1)


def test_both_ways_are_torchs() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    for cell, family in (("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)):
        theirs = family(4, 6, batch_first=True, bidirectional=True)
        mine = Bidirectional(4, 6, cell)  # type: ignore[arg-type]
        own = {n.removesuffix("_reverse"): n for n in theirs.state_dict() if n.endswith("reverse")}
        state = theirs.state_dict()
        mine.forward_rnn.load_state_dict({n: state[n] for n in own})
        mine.backward_rnn.load_state_dict({n: state[other] for n, other in own.items()})
        sequence, last = mine(x)
        expected, _ = theirs(x)
        torch.testing.assert_close(sequence, expected)
        torch.testing.assert_close(last, torch.cat((expected[:, -1, :6], expected[:, 0, 6:]), 1))


def test_every_way_to_merge() -> None:
    f, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    expected = {"concat": [1, 2, 3, 5], "sum": [4, 7], "mul": [3, 10], "ave": [2, 3.5]}
    for merge, values in expected.items():
        found = merged(f, b, merge)  # type: ignore[arg-type]
        assert isinstance(found, torch.Tensor)
        assert found.tolist() == [values]
        backbone = RowRNN(8, hidden_dim=6, merge=merge, depth=2)  # type: ignore[arg-type]
        width = 12 if merge == "concat" else 6
        assert backbone.embed_dim == width
        assert backbone(torch.randn(2, 1, 8, 8)).pooled.shape == (2, width)
    both, last = Bidirectional(4, 6, merge="none")(torch.randn(3, 5, 4))
    assert [part.shape for part in both] == [(3, 5, 6)] * 2
    assert [part.shape for part in last] == [(3, 6)] * 2


def test_different_cells_and_first_states() -> None:
    torch.manual_seed(0)
    net = Bidirectional(4, 6, "lstm", "gru")
    assert isinstance(net.forward_rnn, nn.LSTM)
    assert isinstance(net.backward_rnn, nn.GRU)
    x = torch.randn(3, 5, 4)
    zeros = torch.zeros(1, 3, 6)
    start, ahead = net(x), (torch.ones(1, 3, 6), torch.zeros(1, 3, 6))
    torch.testing.assert_close(net(x, (zeros, zeros), zeros), start)
    sequence, _ = net(x, ahead, None)
    assert not torch.allclose(sequence[..., :6], start[0][..., :6])
    torch.testing.assert_close(sequence[..., 6:], start[0][..., 6:])  # the same input, another way
    sequence, _ = net(x, None, torch.ones(1, 3, 6))
    assert not torch.allclose(sequence[:, -1, 6:], start[0][:, -1, 6:])


def test_learned_states_and_layers() -> None:
    torch.manual_seed(0)
    net = RowRNN(8, 3, 6, depth=2, backward_cell="gru", learned_states=True)
    images = torch.randn(2, 3, 8, 8)
    net(images).pooled.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
        assert net.layer_of(name) in (1, 2)
    assert net.no_weight_decay() == {f"states.{i}" for i in range(4)}
    assert net.layer_of("blocks.1.forward_rnn.bias_ih_l0") == 2
    assert net.layer_of("states.1") == 1
    before = net(images).pooled
    with torch.no_grad():
        net.states[0].add_(1.0)  # type: ignore[index]
    assert not torch.allclose(net(images).pooled, before)


def test_groups_and_blocks() -> None:
    torch.manual_seed(0)
    net = create("row_rnn", image_size=(6, 8), hidden_dim=4, depth=2, dropout=0.5)
    images = torch.randn(3, 1, 6, 8)
    assert not torch.equal(net(images).pooled, net(images).pooled)  # dropout
    net.eval()
    first, last = net.last_blocks(images, 2)
    torch.testing.assert_close(last.pooled, net(images).pooled)
    assert not torch.allclose(first.pooled, last.pooled)
    tall = torch.randn(2, 1, 9, 8)
    groups = net([images, tall])
    torch.testing.assert_close(groups[1].pooled, net(tall).pooled)
    assert groups[1].patches.shape == (2, 9, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowRNN(**changes)


def test_images_that_are_refused() -> None:
    net = RowRNN(8)
    with pytest.raises(ValueError, match="images of 3 channels, 8 pixels wide, reached a RowRNN"):
        net(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="9 pixels wide"):
        net(torch.randn(1, 1, 8, 9))
    with pytest.raises(ValueError, match="the last 2 of 1 blocks"):
        net.last_blocks(torch.randn(1, 1, 8, 8), 2)
