"""Pairs of texts: a source of pairs, vocabularies of it, batches of token numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.accelerators import XLAAccelerator
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import TextBatch
from datamodules.pairs import Pair, Pairs, open_pairs
from datamodules.placed import PlacedDataModule, limited
from datamodules.sampling import EvalBatches, Sample, TrainBatches
from datamodules.sources import Split
from datamodules.vocabulary import END, LEVELS, START, Codec, Level, Vocabulary, check_room, split

SPLITS: tuple[Split, Split] = ("train", "val")


class Item(NamedTuple):
    """A pair and the request that it answers."""

    pair: Pair
    sample: Sample


class PairDataset(Dataset[Item]):
    """Pairs by request."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, sample: Sample) -> Item:
        return Item(self.pairs.pair(sample.item, sample.key), sample)


class Collate:
    """A batch of items, in the numbers of a codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def __call__(self, items: Sequence[Item]) -> TextBatch:
        return TextBatch(
            *self.codec.encode_sources([item.pair.source for item in items]),
            *self.codec.encode_targets([item.pair.target for item in items]),
            indices=torch.tensor([item.sample.item for item in items]),
            keys=torch.tensor([item.sample.key for item in items]),
            is_valid=torch.tensor([item.sample.is_valid for item in items]),
        )


class TextDataModule(PlacedDataModule):
    """Batches of pairs of texts, to learn to translate one into the other.

    Args:
        source: "numbers", "dates" or "numbers_and_dates", generated in English and French words;
            or the path of a text file, `source \\t target [\\t attribution]` a line.
        source_args: further arguments of the source (`datamodules.pairs`): num_train, num_val and
            max_digits of generated ones, val_share and max_pairs of a file.
        reverse: translate targets into sources.
        level: tokens are "characters" or "words".
        shared_vocabulary: source and target have one vocabulary, which a Transformer whose
            embeddings are tied needs.
        pad_to: tokens that sources and targets (with their two marks) are padded to, such as
            [16, 60]; null for the longest of each batch.
        batch_size: pairs in a batch of one device.
        num_workers: processes that make batches; 0 does it in the training process. It changes
            nothing but speed.

    Attributes:
        codec: the vocabularies, once it was set up.

    Raises:
        ValueError: values out of range, texts that `pad_to` has no room for, or what the source
            raises.
    """

    def __init__(
        self,
        source: str = "numbers",
        source_args: dict[str, Any] | None = None,
        reverse: bool = False,
        level: Level = "characters",
        shared_vocabulary: bool = False,
        pad_to: tuple[int, int] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")
        if pad_to is not None and min(pad_to) < 3:
            raise ValueError(f"pad_to is {pad_to}; expected two numbers of at least 3, or null")
        self.source, self.source_args, self.reverse = source, dict(source_args or {}), reverse
        self.level, self.shared_vocabulary, self.pad_to = level, shared_vocabulary, pad_to
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str) -> None:
        super().setup(stage)
        on_tpu = self.trainer is not None and isinstance(self.trainer.accelerator, XLAAccelerator)
        if on_tpu and self.pad_to is None:
            raise ValueError(
                "pad_to is null, so batches are as long as their longest text, and a TPU compiles "
                "the step anew for every length; set data.init_args.pad_to, such as [16, 60]"
            )
        self.train_pairs, self.val_pairs = (
            open_pairs(self.source, split, self.reverse, self.source_args) for split in SPLITS
        )
        texts = list(self.train_pairs.texts())
        sources, targets = [pair.source for pair in texts], [pair.target for pair in texts]
        marks = (START, END)
        if self.shared_vocabulary:
            both = Vocabulary.of([*sources, *targets], self.level, marks)
            self.codec = Codec(both, both, self.pad_to)
        else:
            source = Vocabulary.of(sources, self.level)
            self.codec = Codec(source, Vocabulary.of(targets, self.level, marks), self.pad_to)
        if self.pad_to is not None:
            self.check_pad_to(sources, targets)

    def check_pad_to(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        """Before the first step rather than at the batch that has the longest text.

        Raises:
            ValueError: a text that there is no room for, with the least `pad_to` that has it.
        """
        lengths = [[len(split(t, self.level)) for t in texts] for texts in (sources, targets)]
        lengths[1] = [length + 2 for length in lengths[1]]
        rooms = self.pad_to or (None, None)
        try:
            for name, texts, each, room in zip(
                ("source", "target"), (sources, targets), lengths, rooms, strict=True
            ):
                check_room(name, texts, each, room)
        except ValueError as error:
            raise ValueError(
                f"{error}; set it to [{max(lengths[0])}, {max(lengths[1])}] or more, or to null"
            ) from None

    def train_dataloader(self) -> DataLoader[TextBatch]:
        """The loader of this rank, going on where the trainer's batch counter stands."""
        rank, world_size = self.place()
        batches_done, limit = self.progress()
        size = (len(self.train_pairs), self.batch_size, self.seed, rank, world_size)
        length = len(TrainBatches(*size))
        per_epoch = limited(length, limit)
        self.check_resumed(
            {
                "pairs": len(self.train_pairs),
                "pairs in a global batch": self.batch_size * world_size,
                "batches in an epoch": per_epoch,
            }
        )
        batches = TrainBatches(*size, batches_done, per_epoch)
        return self.loader(PairDataset(self.train_pairs), batches, Collate(self.codec))

    def val_dataloader(self) -> DataLoader[TextBatch]:
        """The held-out pairs that are this rank's, each once."""
        batches = EvalBatches(len(self.val_pairs), self.batch_size, *self.place())
        return self.loader(PairDataset(self.val_pairs), batches, Collate(self.codec))

    def examples(self, count: int, device: torch.device) -> TextBatch:
        """The first held-out pairs, for pictures."""
        samples = [Sample(i, key=i) for i in range(min(count, len(self.val_pairs)))]
        items = [PairDataset(self.val_pairs)[sample] for sample in samples]
        batch: TextBatch = move_data_to_device(Collate(self.codec)(items), device)
        return batch
