"""The Transformer against torch's layers, and its two ways through a text."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import Transformer
from modules.backbones.layers import Block, BlockStyle
from modules.decoding import Search, search
from modules.multihead import MultiHeadAttention
from modules.transformer_network import EncoderDecoder, Layer, sinusoids
from tests.modules.test_seq2seq import WORDS, batch_of, codec


def own_like(theirs: nn.MultiheadAttention, mine: MultiHeadAttention) -> MultiHeadAttention:
    """Ours with torch's weights."""
    weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    if theirs.in_proj_weight is not None:
        weights = theirs.in_proj_weight.chunk(3)
    parts = (mine.query, mine.key, mine.value)
    with torch.no_grad():
        for part, weight, bias in zip(parts, weights, theirs.in_proj_bias.chunk(3), strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        mine.out.load_state_dict(theirs.out_proj.state_dict())
    return mine


@pytest.mark.parametrize("memory_dim", [12, 7])
def test_multi_head_attention_is_torchs(memory_dim: int) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, kdim=memory_dim, vdim=memory_dim)
    nn.init.normal_(theirs.in_proj_bias)
    mine = own_like(theirs, MultiHeadAttention(12, 3, 4, memory_dim=memory_dim))
    query, key, value = torch.randn(2, 5, 12), *torch.randn(2, 2, 6, memory_dim).unbind()
    is_valid = torch.arange(6) < torch.tensor([6, 4])[:, None]
    for mask in (None, is_valid):
        expected, weights = theirs(
            *(query, key, value),
            key_padding_mask=None if mask is None else ~mask,
            average_attn_weights=False,
        )
        got, ours = mine(query, key, value, None if mask is None else mask[:, None, None])
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(ours, weights)


def test_keys_and_values_of_their_own_widths() -> None:
    """Against torch's scaled dot-product attention, and the parameters of Keras's layer."""
    torch.manual_seed(0)
    mine = MultiHeadAttention(10, 2, key_dim=3, value_dim=5, memory_dim=7, out_dim=6)
    count = sum(parameter.numel() for parameter in mine.parameters())
    assert count == (10 + 1) * 2 * 3 + (7 + 1) * 2 * 3 + (7 + 1) * 2 * 5 + (2 * 5 + 1) * 6
    query, key, value = torch.randn(4, 5, 10), torch.randn(4, 8, 7), torch.randn(4, 8, 7)
    mask = torch.rand(4, 1, 5, 8) < 0.7
    mask[..., 0] = True
    out, weights = mine(query, key, value, mask)
    assert out.shape == (4, 5, 6)
    assert weights.shape == (4, 2, 5, 8)
    q, k, v = (
        layer(x).unflatten(-1, (2, -1)).transpose(1, 2)
        for layer, x in ((mine.query, query), (mine.key, key), (mine.value, value))
    )
    assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (3, 3, 5)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, mine.out(expected.transpose(1, 2).flatten(2)))
    assert (weights[~mask.expand_as(weights)] == 0).all()
    nothing = torch.zeros(4, 1, 5, 8, dtype=torch.bool)  # a query that sees nothing: no NaN
    torch.testing.assert_close(mine(query, key, value, nothing)[1], torch.full_like(weights, 1 / 8))
    same, _ = mine(query, key)
    torch.testing.assert_close(same, mine(query, key, key)[0])
    other = MultiHeadAttention(10, 2, 5, memory_dim=7, content_dim=9)
    theirs = torch.nn.MultiheadAttention(10, 2, kdim=7, vdim=9, batch_first=True)
    state = {"q": other.query, "k": other.key, "v": other.value}
    with torch.no_grad():
        for name, layer in state.items():
            getattr(theirs, f"{name}_proj_weight").copy_(layer.weight)
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in state.values()]))
        theirs.out_proj.load_state_dict(other.out.state_dict())
    read = torch.randn(4, 8, 9)
    torch.testing.assert_close(other(query, key, read)[0], theirs(query, key, read)[0])
    with pytest.raises(ValueError, match="value_dim is 0; expected at least 1"):
        MultiHeadAttention(10, 2, 5, value_dim=0)
    dropped = MultiHeadAttention(10, 2, 3, dropout=0.5, memory_dim=7)
    assert not torch.equal(dropped(query, key)[0], dropped(query, key)[0])
    assert torch.equal(dropped.eval()(query, key)[0], dropped(query, key)[0])


def test_places() -> None:
    table = sinusoids(7, 6)
    for p, j in product(range(7), range(3)):
        angle = torch.tensor(p / 10_000 ** (2 * j / 6))
        assert float(table[p, 2 * j]) == pytest.approx(float(angle.sin()), abs=1e-6)
        assert float(table[p, 2 * j + 1]) == pytest.approx(float(angle.cos()), abs=1e-6)
    torch.testing.assert_close(sinusoids(3, 6, first=4), table[4:])


def test_layers_are_torchs() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dim_feedforward": 20, "dropout": 0.0, "batch_first": True}
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    is_valid = torch.arange(6) < torch.tensor([6, 3])[:, None]
    for norm in ("post", "pre"):
        style = BlockStyle(mlp="relu", norm_eps=1e-5)
        theirs = nn.TransformerDecoderLayer(8, 2, **shape, norm_first=norm == "pre")
        mine = Layer(8, 2, 20, style, 0.0, norm, crosses=True)  # type: ignore[arg-type]
        assert mine.cross is not None
        own_like(theirs.multihead_attn, mine.cross)
        with torch.no_grad():
            mine.attn.qkv.weight.copy_(theirs.self_attn.in_proj_weight)
            mine.attn.qkv.bias.copy_(theirs.self_attn.in_proj_bias)
        for ours, other in (
            (mine.attn.proj, theirs.self_attn.out_proj),
            *((mine.mlp.fc1, theirs.linear1), (mine.mlp.fc2, theirs.linear2)),
        ):
            ours.load_state_dict(other.state_dict())
        names = ((mine.norm1, "norm1"), (mine.norm_cross, "norm2"), (mine.norm2, "norm3"))
        for ours, name in names:
            nn.init.normal_(getattr(theirs, name).weight)
            ours.load_state_dict(getattr(theirs, name).state_dict())
        expected = theirs(x, memory, ~causal, memory_key_padding_mask=~is_valid)
        sees = is_valid[:, None, None]
        got, _, _ = mine(x, causal[None, None], mine.cross.remember(memory), sees)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_pre_norm_encoder_is_made_of_the_vision_block() -> None:
    torch.manual_seed(0)
    network = EncoderDecoder(6, 6, 8, 2, 16, 2, 0.0, norm="pre")
    assert all(isinstance(block, Block) for block in network.encoder)
    layer = Layer(8, 2, 16, BlockStyle(mlp="relu"), 0.0, "pre", crosses=False)
    layer.load_state_dict(network.encoder[0].state_dict())
    x = torch.randn(3, 4, 8)
    mask = (torch.arange(4) < torch.tensor([4, 2, 1])[:, None])[:, None, None].expand(-1, -1, 4, -1)
    torch.testing.assert_close(layer(x, mask)[0], network.encoder[0](x, mask))


def test_parameters_of_the_base_model() -> None:
    with torch.device("meta"):
        network = EncoderDecoder(37_000, 37_000)
    attention, mlp, norm = 4 * (512**2 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
    layers = 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)
    assert layers == 44_138_496
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == layers + 37_000 * 512 == 63_082_496  # published as 65 million
    torchs = nn.Transformer(8, 2, 2, 2, 16)
    mine = EncoderDecoder(5, 5, 8, 2, 16, 2)
    ends = 2 * 2 * 8  # torch's has norms at both ends in the post-norm form, too
    theirs = sum(parameter.numel() for parameter in torchs.parameters()) - ends
    assert sum(p.numel() for p in mine.parameters()) == theirs + 5 * 8


def method(seed: int = 0, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    arguments = {"embed_dim": 8, "num_heads": 2, "mlp_dim": 16, "depth": 2, "tied": "output"}
    built = Transformer(**arguments | changes)
    built.build(codec())
    return built


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_step_by_step_is_the_whole_and_padding_changes_nothing(norm: str) -> None:
    model, batch = method(norm=norm).eval(), batch_of(*WORDS)
    network = model.network
    memory = network.encode(batch.source, batch.source_lengths)
    whole, _, weights = network.decode(batch.inputs, memory)
    assert whole.shape == (6, 8, 6)
    assert weights.shape == (6, 8, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 8))
    assert (weights.transpose(1, 2)[torch.arange(7) >= batch.source_lengths[:, None]] == 0).all()
    for i in range(8):
        logits, memory = network.step(batch.inputs[:, i], memory)
        torch.testing.assert_close(logits, whole[:, i], atol=1e-5, rtol=1e-4)
    for i, text in enumerate(WORDS):
        alone = model(batch_of(text))[0]
        torch.testing.assert_close(alone, whole[i, : len(alone)], atol=1e-5, rtol=1e-4)
    # No token sees those after it.
    changed = batch.inputs.clone()
    changed[:, 5:] = 1
    memory = network.encode(batch.source, batch.source_lengths)
    again, _, _ = network.decode(changed, memory)
    torch.testing.assert_close(again[:, :5], whole[:, :5])
    assert not torch.allclose(again[:, 5:], whole[:, 5:])
    # Searches: a beam of one is greedy, a wider one is no worse.
    marks = (codec().start, codec().end)
    how = [Search(size, 0.0, 8) for size in (1, 3)]
    found = [search(network.step, memory, *marks, each) for each in how]
    assert (found[1].scores >= found[0].scores - 1e-6).all()
    said = found[0].tokens
    given = torch.cat((batch.target[:, :1], said[:, :-1]), dim=1)
    logits, _, _ = network.decode(given, memory)
    log_p = logits.log_softmax(-1).gather(2, said[:, :, None])[..., 0]
    before = (said == marks[1]).cumsum(1) - (said == marks[1]).long() == 0
    torch.testing.assert_close((log_p * before).sum(1), found[0].scores, atol=1e-4, rtol=1e-4)
    assert (logits.argmax(-1)[before] == said[before]).all()


def test_every_option_changes_the_network() -> None:
    batch = batch_of(*WORDS)
    base = method()(batch)
    for changes in ({"norm": "pre"}, {"activation": "gelu"}, {"tied": "none"}, {"dropout": 0.5}):
        torch.manual_seed(1)
        other = method(**{"dropout": 0.0} | changes)
        assert not torch.allclose(other(batch), base), changes
    model = method()
    assert model.network.head.weight is model.network.targets.weight
    assert method(tied="none").network.head.weight is not model.network.targets.weight
    with pytest.raises(ValueError, match="tied is all, but source and target have a vocab"):
        method(tied="all")
    loss: Tensor = model(batch).logsumexp(-1).mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 10, "num_heads": 3}, "width 10 is not divisible by 3 heads"),
        ({"embed_dim": 3, "num_heads": 1}, "embed_dim is 3; sines and cosines"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(**changes)


def test_first_values_of_an_mlp_of_three_widths() -> None:
    """Glorot's bound, which its shape alone would take for three squares."""
    network = EncoderDecoder(11, 11, 8, 2, 24, 2)
    for name, weight in network.named_parameters():
        if name.endswith("fc1.weight"):
            assert 0.3 < weight.abs().max() <= (6 / (8 + 24)) ** 0.5
