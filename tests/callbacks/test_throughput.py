"""What is said of a run's speed is what happened."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import Throughput, throughput
from callbacks.throughput import peak_flops, tokens_of
from datamodules import placed
from datamodules.batch import ImageBatch, MultiCropBatch
from datamodules.module import Needs
from datamodules.placed import WaitedLoader
from tests import small, views

NAMES = ("images_per_s", "tokens_per_s", "data_wait", "memory_gib", "mfu")


def curves(directory: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(next(directory.rglob("events*")).parent))
    events.Reload()
    known = events.Tags()["scalars"]
    return {
        name: [event.value for event in events.Scalars(f"train/{name}")]
        for name in NAMES
        if f"train/{name}" in known
    }


class Clock(Callback):
    """A clock by which a batch takes 3 s to load and 1 s to compute, and the optimizer 2 s."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def data(self) -> Any:
        data = small.data()
        ordinary = data.train_dataloader

        def train_dataloader() -> Any:
            loader = ordinary()
            collate = loader.collate_fn

            def load(samples: Any) -> Any:
                self.now += 3.0
                return collate(samples)

            loader.collate_fn = load
            return loader

        data.train_dataloader = train_dataloader  # type: ignore[method-assign]
        return data

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 1.0

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.now += 2.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_and_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Three epochs of five batches of eight; two to a step leave one for the last of an epoch."""
    # Batches of the steps that are logged: the first of an epoch starts the clock.
    batches = [1] * 12 if accumulate == 1 else [2, 1] * 3
    seconds = [4 * count + 2 for count in batches]
    promised = 1e9  # by a device whose FLOPs are known
    clock, callback = Clock(), Throughput()
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: promised)
    for module in (throughput, placed):
        monkeypatch.setattr(module, "time", clock)
    run = small.trainer(tmp_path, clock, callback, accumulate_grad_batches=accumulate)
    run.fit(small.method(), clock.data())
    found = curves(tmp_path)
    assert set(found) == set(NAMES)
    rates = [8 * count / time for count, time in zip(batches, seconds, strict=True)]
    assert found["images_per_s"] == pytest.approx(rates)
    assert found["tokens_per_s"] == pytest.approx([5 * rate for rate in rates])  # 2 x 2 and a class
    waits = [3 * count / time for count, time in zip(batches, seconds, strict=True)]
    assert found["data_wait"] == pytest.approx(waits)
    assert all(0.05 < size < 100 for size in found["memory_gib"])
    assert callback.flops_per_image is not None
    share = callback.flops_per_image / promised
    assert found["mfu"] == pytest.approx([share * rate for rate in rates], rel=1e-4)


def test_flops_are_those_of_forward_and_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: 1e9)
    callback = Throughput()
    module = small.method(backbone=small.Pixels(), ema_decay=None)
    run = small.trainer(tmp_path, callback)
    run.fit(module, small.data())
    head = 256 * 10  # a product forward, and one each for the weight's and the input's gradient
    assert callback.flops_per_image == 3 * 2 * head
    # The count is in the checkpoint, so that a resumed run does not compute its first step apart.
    again = Throughput()
    again.load_state_dict(callback.state_dict())
    assert again.flops_per_image == callback.flops_per_image


def test_flops_are_the_same_while_dinos_last_layer_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted in the first step, in which it takes part in backward all the same."""
    monkeypatch.setattr(throughput, "peak_flops", lambda *_: 1e9)
    found = []
    for epochs in (0, 1):
        callback = Throughput()
        run = views.trainer(tmp_path / str(epochs), callback, max_steps=1, limit_val_batches=0)
        run.fit(views.method(freeze_last_layer=epochs), views.data())
        found.append(callback.flops_per_image)
    assert found[0] == found[1] > 0


def test_tokens_of_batches() -> None:
    needs = Needs(8, 1, (32, 32), None, 3, True)
    nothing: Any = [torch.zeros(2)] * 5
    views = (torch.zeros(2, 2, 3, 32, 32), torch.zeros(3, 2, 3, 16, 16))
    assert tokens_of(ImageBatch(torch.zeros(2, 3, 32, 16), *nothing), needs) == 2 * (4 * 2 + 1)
    assert tokens_of(MultiCropBatch(views, *nothing), needs) == 2 * (2 * 17 + 3 * 5)
    assert tokens_of(ImageBatch(torch.zeros(2, 3, 32, 16), *nothing), None) == 0
    assert tokens_of(SimpleNamespace(num_images=3), needs) == 0


def test_what_devices_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), "32-true") is None
    for name, expected in (("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989.4e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert peak_flops(torch.device("cuda", 0), "bf16-mixed") == expected


def test_a_loader_knows_how_long_it_was_waited_for() -> None:
    class Late(torch.utils.data.Dataset[int]):
        def __getitem__(self, item: int) -> int:
            time.sleep(0.05)
            return item

        def __len__(self) -> int:
            return 3

    loader: Any = WaitedLoader(Late(), batch_size=1)
    for _ in loader:
        time.sleep(0.2)
    assert 0.15 <= loader.waited < 0.5
