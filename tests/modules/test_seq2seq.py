"""The recurrent encoder and decoder: its attention, its two ways through a text, its training."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from datamodules.batch import TextBatch
from datamodules.pairs import Pair
from datamodules.sampling import Sample
from datamodules.text import Collate, Item, TextDataModule
from datamodules.vocabulary import END, START, Codec, Vocabulary
from modules import Seq2Seq, Transformer
from modules.alignment import Alignment
from modules.backbones import RowRNN
from modules.decoding import Search
from modules.optim import Optimization
from modules.seq2seq_network import EncoderDecoder, masked
from modules.translation import Judge, is_exact, text_losses, translate_texts
from tests.runs import differences
from tests.small import data as images
from tests.small import trainer

WORDS = ("ab cab", "b", "cba abc", "a c", "bbb ac", "abcab")


def codec(pad_to: tuple[int, int] | None = None) -> Codec:
    letters = Vocabulary.of([" abc"], "characters")
    return Codec(letters, Vocabulary.of([" abc"], "characters", (START, END)), pad_to)


def batch_of(*texts: str, pad_to: tuple[int, int] | None = None) -> TextBatch:
    """Pairs of a text and the same backwards."""
    items = [Item(Pair(t, t[::-1]), Sample(i, key=i)) for i, t in enumerate(texts)]
    return Collate(codec(pad_to))(items)


def method(pad_to: tuple[int, int] | None = None, seed: int = 0, **changes: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    built = Seq2Seq(**{"hidden_dim": 8, "search": Search(max_length=12)} | changes)
    built.build(codec(pad_to))
    return built


def test_the_three_scores() -> None:
    torch.manual_seed(0)
    s, h = torch.randn(2, 3, 4), torch.randn(2, 5, 6)
    is_valid = torch.arange(5) < torch.tensor([5, 2])[:, None]
    additive = Alignment("additive", 4, 6, 7)
    general = Alignment("general", 4, 6, 7)
    dot = Alignment("dot", 6, 6, 7)
    assert isinstance(additive.memory, nn.Linear)
    for kind, layer in (("additive", additive), ("general", general), ("dot", dot)):
        query = torch.randn(2, 3, 6) if kind == "dot" else s
        weights = layer(query, layer.prepare(h), is_valid)
        for b, i in product(range(2), range(3)):
            valid = 5 if b == 0 else 2
            scores = []
            for j in range(valid):
                if kind == "additive":
                    hidden = additive.query.weight @ query[b, i] + additive.memory(h[b, j])
                    scores.append(additive.score.weight[0] @ torch.tanh(hidden))
                elif kind == "general":
                    scores.append(query[b, i] @ (general.memory.weight @ h[b, j]))
                else:
                    scores.append(query[b, i] @ h[b, j])
            expected = torch.stack(scores).softmax(0)
            torch.testing.assert_close(weights[b, i, :valid], expected, atol=1e-5, rtol=1e-4)
            assert (weights[b, i, valid:] == 0).all()


def test_parameters_of_the_classic_formulation() -> None:
    network = EncoderDecoder(71, 93)
    count = sum(parameter.numel() for parameter in network.parameters())
    encoder, decoder = (4 * 256 * (k + 256 + 1) for k in (71, 93))
    assert encoder + decoder + 93 * 257 == 718_173  # one bias a gate there
    assert count == 718_173 + 2 * 4 * 256  # two here


VARIANTS = [
    {"cell": cell, "attention": kind, "context": context, "num_layers": layers, **more}
    for cell, (kind, context), layers, more in product(
        ("lstm", "gru"),
        ((None, "output"), ("additive", "input"), ("dot", "output"), ("general", "input")),
        (1, 2),
        ({}, {"bidirectional": True, "embedding_dim": 5}),
    )
]


@torch.no_grad()
def test_step_by_step_is_the_whole_and_padding_changes_nothing() -> None:
    """Shapes, too, of every combination."""
    batch = batch_of(*WORDS)
    for changes in VARIANTS:
        model = method(**changes).eval()
        network = model.network
        whole, _, weights = network.decode(batch.inputs, model.encode(batch))
        assert whole.shape == (6, 8, 6)
        if changes["attention"] is not None:
            assert weights is not None
            assert weights.shape == (6, 8, 7)
            torch.testing.assert_close(weights.sum(-1), torch.ones(6, 8))
            after = torch.arange(7) >= batch.source_lengths[:, None]
            assert (weights.transpose(1, 2)[after] == 0).all()
        memory = model.encode(batch)
        for i in range(batch.inputs.shape[1]):
            logits, memory = network.step(batch.inputs[:, i], memory)
            torch.testing.assert_close(logits, whole[:, i], atol=1e-5, rtol=1e-4)
        for i, text in enumerate(WORDS):
            alone = model(batch_of(text))[0]
            torch.testing.assert_close(alone, whole[i, : len(alone)], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_with_spaces_is_read_and_counts() -> None:
    given, fixed = batch_of("ab", "abcab"), batch_of("ab", "abcab", pad_to=(9, 9))
    classic = method(pad_to=(9, 9), mask_padding=False).eval()
    padded, is_counted = classic.padded(fixed)
    assert bool(is_counted.all())
    assert classic.codec is not None
    texts = [classic.codec.source.tokens[i] for i in padded.source[0].tolist()]
    assert "".join(texts) == "ab" + 7 * " "
    wanted = [classic.codec.target.tokens[i] for i in padded.wanted[0].tolist()]
    assert "".join(wanted) == "ba\n" + 5 * " "
    spaces = classic.codec.source.encode("ab       ")
    assert padded.source[0].tolist() == spaces
    masked = method(pad_to=(9, 9)).eval()
    masked.load_state_dict(classic.state_dict())
    assert not torch.allclose(classic(padded)[0], masked(fixed)[0], atol=1e-3)
    torch.testing.assert_close(masked(fixed)[:, :6], masked(given)[:, :6])
    for model in (classic, masked):  # and whoever is beside it in a batch changes nothing
        alone = model.padded(batch_of("ab", pad_to=(9, 9)))[0]
        both = model.padded(fixed)[0]
        torch.testing.assert_close(model(alone)[0, :3], model(both)[0, :3])
    losses = [
        text_losses(m(b), b.wanted, c) for m in (classic, masked) for b, c in [m.padded(fixed)]
    ]
    assert not torch.allclose(losses[0], losses[1])
    with pytest.raises(ValueError, match=r"set data.init_args.pad_to"):
        method(mask_padding=False)
    without = Codec(Vocabulary.of(["abc"], "characters"), codec().target, (9, 9))
    with pytest.raises(ValueError, match="the source vocabulary has no space"):
        Seq2Seq(mask_padding=False).build(without)


def test_losses_are_means_of_texts() -> None:
    logits, wanted = torch.randn(2, 3, 4), torch.tensor([[1, 2, 3], [0, 0, 0]])
    is_counted = torch.tensor([[True, True, True], [True, False, False]])
    got = text_losses(logits, wanted, is_counted, 0.1)
    log_p = logits.log_softmax(-1)
    smooth = 0.9 * F.one_hot(wanted, 4) + 0.1 / 4
    each = -(smooth * log_p).sum(-1)
    torch.testing.assert_close(got, torch.stack((each[0].mean(), each[1, 0])))


def test_teacher_forcing_and_what_takes_its_place() -> None:
    batch = batch_of(*WORDS)
    for reinject in ("argmax", "softmax"):
        model = method(attention="dot", reinject=reinject, teacher_forcing=0.0).eval()
        torch.testing.assert_close(model.reinjected(batch, 1.0), model(batch))
        free = model.reinjected(batch, 0.0)
        memory, given = model.encode(batch), batch.inputs[:, :1]
        for i in range(free.shape[1]):
            tokens: Tensor = given if i else batch.inputs[:, :1]
            logits, memory, _ = model.network.decode(tokens, memory)
            torch.testing.assert_close(free[:, i : i + 1], logits)
            given = logits.argmax(-1) if reinject == "argmax" else logits.softmax(-1)
        half = model.reinjected(batch, 0.5)
        assert not torch.allclose(half, free)
        assert not torch.allclose(half, model(batch))
        # Which steps are forced is a function of the pair, not of the batch.
        part = TextBatch(*(x[2:4] for x in batch))
        torch.testing.assert_close(model.reinjected(part, 0.5), half[2:4])
        model.zero_grad()
        free[:, -1].square().sum().backward()
        assert model.network.sources.table is None
    # Probabilities pass gradients on, the most probable token does not.
    grads = []
    for reinject in ("argmax", "softmax"):
        model = method(reinject=reinject, embedding_dim=3, teacher_forcing=0.0)
        model.reinjected(batch, 0.0)[:, 1].square().sum().backward()
        grads.append(model.network.head.weight.grad)
    assert not torch.allclose(grads[0], grads[1])


def test_scheduled_sampling_falls_over_the_run() -> None:
    model = method(teacher_forcing=1.0, teacher_forcing_end=0.2)
    model.lr = type("Rate", (), {"total": 100})()
    shares = []
    for step in (0, 50, 100, 200):
        model._trainer = type("At", (), {"global_step": step})()  # type: ignore[assignment]
        shares.append(model.share())
    assert shares == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.slow
def test_it_learns_to_copy_backwards() -> None:
    """What it has seen and what it has not; the text is in the memory, the order is learned."""
    torch.manual_seed(0)
    model = method(hidden_dim=32, embedding_dim=8, attention="general", bidirectional=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def texts(count: int) -> list[str]:
        drawn = torch.randint(0, 3, (count, 5)).tolist()
        return ["".join("abc"[i] for i in row) for row in drawn]

    for _ in range(120):
        batch = batch_of(*texts(32))
        loss = text_losses(model(batch), batch.wanted, batch.is_wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = texts(50)
    model.eval()
    said = translate_texts(model, held_out)
    assert sum(a == b[::-1] for a, b in zip(said, held_out, strict=True)) >= 48


def test_exact_matches_and_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of("ab", "abcab", "c")
    model = method(attention="dot").eval()
    decoded = model.decode(batch)
    end = codec().end
    right = decoded._replace(tokens=batch.wanted.masked_fill(~batch.is_wanted, end))
    assert is_exact(right, batch, end).tolist() == [True] * 3
    longer = right._replace(tokens=F.pad(right.tokens, (0, 3), value=end))
    assert is_exact(longer, batch, end).tolist() == [True] * 3
    wrong = right._replace(tokens=right.tokens.index_fill(1, torch.tensor([1]), 5))
    assert is_exact(wrong, batch, end).tolist() == [False, False, False]
    cut = right._replace(tokens=right.tokens[:, :5])  # "bacba" without its end
    assert is_exact(cut, batch, end).tolist() == [True, False, True]
    judge = Judge((1, 4))
    assert judge.names() == ["1_to_1", "2_to_4", "from_5"]
    logged: dict[str, float] = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(model, "all_gather", lambda rows: rows)
    judge.add(batch, model(batch), batch.is_wanted, torch.tensor([True, False, True]))
    last = batch._replace(is_valid=torch.tensor([False, False, True]))
    judge.add(last, model(batch), batch.is_wanted, torch.tensor([True, True, False]))
    judge.log(model)
    assert logged["val/accuracy"] == pytest.approx(2 / 4)
    assert logged["val/accuracy_1_to_1"] == pytest.approx(1 / 2)
    assert logged["val/accuracy_2_to_4"] == 1.0
    assert logged["val/accuracy_from_5"] == 0.0
    each = text_losses(model(batch), batch.wanted, batch.is_wanted).tolist()
    assert logged["val/loss"] == pytest.approx((sum(each) + each[2]) / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_forcing": 1.5}, r"teacher_forcing is 1.5; expected within \[0, 1\]"),
        ({"teacher_forcing_end": -0.1}, "teacher_forcing_end is -0.1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"hidden_dim": 7, "bidirectional": True}, "hidden_dim is 7.*make it even"),
        ({"reinject": "softmax"}, "reinject is 'softmax', but with teacher_forcing 1.0 nothing"),
        ({"context": "input"}, "context is 'input', but attention is null"),
        ({"length_bins": (5, 5)}, "length_bins is .*expected lengths that rise"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seq2Seq(**changes)


def small_data(**changes: Any) -> TextDataModule:
    arguments = {"num_train": 12, "num_val": 5, "max_digits": 3}
    return TextDataModule(source_args=arguments, batch_size=4, **changes)


TRANSLATORS: list[Any] = [
    lambda: Seq2Seq(
        **{"hidden_dim": 8, "attention": "additive", "context": "input", "bidirectional": True},
        **{"dropout": 0.1, "teacher_forcing_end": 0.5, "search": Search(2, 0.5, 9)},
        optimizer=Optimization(base_lr=1e-2, reference_batch=None, warmup_epochs=0.5),
    ),
    lambda: Transformer(
        *(8, 2, 16, 1),
        **{"search": Search(max_length=9)},
        optimizer=Optimization(base_lr=1e-2, reference_batch=None, schedule="noam", warmup_steps=4),
    ),
]


class KeepFirst(Callback):
    """Keeps a run as it was after its first epoch: one that was killed there."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "first.ckpt"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", TRANSLATORS, ids=["seq2seq", "transformer"])
def test_a_resumed_run_ends_with_the_same_bits(make: Any, tmp_path: Path) -> None:
    def fit(place: str, resume: Path | None = None) -> tuple[Any, TextDataModule, Path]:
        torch.manual_seed(3)
        model, limits = make(), {"limit_train_batches": 3, "limit_val_batches": 1.0}
        run = trainer(tmp_path / place, KeepFirst(tmp_path), max_epochs=2, **limits)
        data = small_data(shared_vocabulary=isinstance(model, Transformer))
        run.fit(model, data, ckpt_path=resume)
        return model, data, Path(run.log_dir or "") / "checkpoints" / "last.ckpt"

    model, data, whole = fit("whole")
    _, _, resumed = fit("resumed", tmp_path / "first.ckpt")
    ends = [torch.load(path, weights_only=True) for path in (whole, resumed)]
    for end in ends:
        end["loops"] = None
    assert differences(*ends) == []
    assert ends[0]["global_step"] == 6
    # The vocabularies are in the checkpoint: no data is needed to translate.
    fresh = make()
    assert fresh.codec is None
    fresh.on_load_checkpoint(ends[0])
    fresh.load_state_dict(ends[0]["state_dict"])
    fresh.eval()
    model.eval()
    assert translate_texts(fresh, ["forty-two"]) == translate_texts(model, ["forty-two"])
    with pytest.raises(ValueError, match="character 'Z'"):
        translate_texts(fresh, ["Z"])
    picture = fresh.pictures(data.examples(3, torch.device("cpu")))["alignment"]
    assert picture.shape[0] == 3
    assert float(picture.min()) < 0.3
    # Other data than that of the checkpoint.
    other = small_data(level="words", shared_vocabulary=isinstance(fresh, Transformer))
    with pytest.raises(ValueError, match="use the data that it was trained on"):
        trainer(tmp_path / "other").fit(fresh, other)


def test_data_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Seq2Seq translates, and the data is ImageDataModule"):
        trainer(tmp_path).fit(Seq2Seq(hidden_dim=4), images(batch_size=2))
    with pytest.raises(ValueError, match="the checkpoint has no vocabularies"):
        Seq2Seq(hidden_dim=4).on_load_checkpoint({})


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bfloat16_leaves_the_cells_of_a_cpu_alone(cell: Any) -> None:
    """Not every processor has an LSTM in bfloat16."""
    torch.manual_seed(0)
    network = EncoderDecoder(9, 9, hidden_dim=8, cell=cell, attention="additive").eval()
    rows = RowRNN(8, 1, 8, cell=cell).eval()
    source, lengths = torch.randint(0, 9, (3, 5)), torch.tensor([5, 3, 4])
    images = torch.randn(2, 1, 8, 8)
    found = []
    for is_half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            logits, _, _ = network.decode(source, network.encode(source, lengths))
            found.append((logits.float(), rows(images).pooled))
    torch.testing.assert_close(found[1][0], found[0][0], atol=0.05, rtol=0.05)
    assert torch.equal(found[1][1], found[0][1])


@pytest.mark.parametrize(("kind", "ways"), [*product((nn.LSTM, nn.GRU), (False, True))])
def test_masked_cells_are_packed_sequences(kind: Any, ways: bool) -> None:
    """What TPUs run in the place of these: outputs, last states and gradients."""
    torch.manual_seed(0)
    rnn = kind(3, 4, num_layers=2, bidirectional=ways, batch_first=True)
    x, lengths = torch.randn(4, 6, 3, requires_grad=True), torch.tensor([6, 1, 4, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, state = rnn(packed)
    expected = pad_packed_sequence(outputs, batch_first=True, total_length=6)[0], state
    found = masked(rnn, x, lengths)
    gradients = []
    for outputs, state in (expected, found):
        states = state if kind is nn.LSTM else (state,)
        total = outputs.square().sum() + sum((part * part.sin()).sum() for part in states)
        gradients.append(torch.autograd.grad(total, (x, *rnn.parameters())))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
