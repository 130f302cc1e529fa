"""Parameter groups, scaling of the learning rate, clipping, and every option of Optimization."""

import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from modules import optim
from modules.backbones import ViT
from modules.optim import Optimization
from modules.supervised import Classifier


def small() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ViT("mu", image_size=32), 3)


def test_every_parameter_is_in_exactly_one_group() -> None:
    network = small()
    exempt = {f"backbone.{name}" for name in network.backbone.no_weight_decay()}
    groups = optim.parameter_groups(network, 0.3, exempt)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(dict(network.named_parameters()))
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert dict(network.named_parameters())[name] is parameter
    decayed = {g["name"]: g for g in groups}["decay"]
    assert decayed["weight_decay"] == 0.3
    assert all(name.endswith("weight") and "norm" not in name for name in decayed["param_names"])
    rest = {g["name"]: g for g in groups}["no decay"]
    assert rest["weight_decay"] == 0.0
    assert {"backbone.cls_token", "backbone.positions.table"} <= set(rest["param_names"])


def test_frozen_parameters_are_left_out_and_unknown_names_refused() -> None:
    network = small()
    network.head.requires_grad_(False)
    names = [n for g in optim.parameter_groups(network, 0.1) for n in g["param_names"]]
    assert not any(name.startswith("head") for name in names)
    with pytest.raises(ValueError, match=r"no_decay names no parameter of Classifier: {'tokken'}"):
        optim.parameter_groups(network, 0.1, {"tokken"})
    with pytest.raises(ValueError, match="has no trainable parameter"):
        optim.parameter_groups(network.requires_grad_(False), 0.1)


def test_table_counts_what_is_optimised() -> None:
    network = small()
    table = optim.describe_groups(optim.parameter_groups(network, 0.3))
    decayed = sum(p.numel() for n, p in network.named_parameters() if p.ndim > 1)
    assert f"{decayed:,}" in table
    assert "no decay" in table


def trained(how: Optimization, lr: float = 0.1) -> torch.Tensor:
    """The weights after three steps of `how` on a fixed problem, as one vector."""
    torch.manual_seed(1)
    network = nn.Linear(4, 3)
    optimizer = optim.build(how, network)
    data = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        (10 * network(data).square().sum(1)).mean().backward()
        optim.clip(how, network.parameters())
        optim.set_lr(optimizer, lr)
        optimizer.step()
    return nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"name": "sgd"}),
        ({}, {"weight_decay": 0.5}),
        ({}, {"momentum": 0.5}),
        ({}, {"beta2": 0.9}),
        ({"name": "sgd"}, {"momentum": 0.5}),
        ({"name": "sgd"}, {"clip_norm": 0.1}),
        ({"name": "sgd", "clip_norm": 0.1}, {"clip_per_parameter": True}),
    ],
)
def test_every_option_of_a_step_changes_the_step(base: dict, change: dict) -> None:
    how = Optimization(**base)
    assert not torch.allclose(trained(how), trained(dataclasses.replace(how, **change)))


def trainer(batches: int, epochs: int, batch: int, devices: int, accumulate: int) -> Mock:
    fake = Mock(spec=Trainer)
    fake.train_dataloader = SimpleNamespace(
        batch_size=None, batch_sampler=SimpleNamespace(batch_size=batch)
    )
    fake.world_size, fake.accumulate_grad_batches = devices, accumulate
    fake.num_training_batches = batches
    fake.estimated_stepping_batches = epochs * -(-batches // accumulate)
    return fake


@pytest.mark.parametrize(
    ("batch", "devices", "accumulate"), [(1024, 1, 1), (128, 8, 1), (64, 4, 4)]
)
def test_rate_follows_the_true_global_batch(batch: int, devices: int, accumulate: int) -> None:
    how = Optimization(base_lr=5e-4, reference_batch=512, warmup_epochs=5, min_lr=1e-5)
    batches = 1000 * accumulate
    lr = optim.learning_rate(how, trainer(batches, 300, batch, devices, accumulate))
    assert (lr.peak, lr.warmup, lr.total) == (1e-3, 5000, 300_000)
    assert lr.at(0) == 0
    assert lr.at(2500) == pytest.approx(5e-4)
    assert lr.at(5000) == pytest.approx(1e-3)
    assert lr.at(300_000) == 1e-5


def test_rate_without_a_reference_is_taken_as_it_is() -> None:
    how = Optimization(base_lr=0.03, reference_batch=None, warmup_epochs=0)
    assert optim.learning_rate(how, trainer(10, 2, 4096, 8, 1)).at(0) == 0.03


def test_warmup_longer_than_the_run_only_rises() -> None:
    with pytest.warns(UserWarning, match="warm-up of 5 epochs is 50 steps, but the run has 20"):
        lr = optim.learning_rate(Optimization(reference_batch=None), trainer(10, 2, 1, 1, 1))
    assert [lr.at(s) for s in (0, 10, 19)] == pytest.approx([0, 2.5e-4, 4.75e-4])


def test_run_without_an_end_is_refused() -> None:
    endless = trainer(10, 1, 1, 1, 1)
    endless.estimated_stepping_batches = float("inf")
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or max_steps"):
        optim.learning_rate(Optimization(), endless)


def test_layer_scale_of_a_group_multiplies_its_rate() -> None:
    parameter = nn.Parameter(torch.ones(1))
    other = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr_scale": 0.5}, {"params": [other]}])
    optim.set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_clipping_matches_its_formula() -> None:
    def gradients() -> list[nn.Parameter]:
        first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
        return [first, second, nn.Parameter(torch.zeros(1))]  # the last has no gradient

    whole = gradients()
    optim.clip(Optimization(clip_norm=1.0), whole)
    norm = (25 + 0.25) ** 0.5
    torch.testing.assert_close(whole[0].grad, torch.tensor([3.0, 4.0]) / norm)
    torch.testing.assert_close(whole[1].grad, torch.tensor([0.3, 0.4]) / norm)
    each = gradients()
    optim.clip(Optimization(clip_norm=1.0, clip_per_parameter=True), each)
    torch.testing.assert_close(each[0].grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(each[1].grad, torch.tensor([0.3, 0.4]))  # below the norm: untouched


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "sgd", "beta2": 0.9}, "sgd has no beta2"),
        ({"clip_per_parameter": True}, "set clip_norm"),
        ({"base_lr": -1.0}, "base_lr is -1.0; expected 0 or more"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"reference_batch": 0}, "reference_batch is 0"),
    ],
)
def test_wrong_options_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Optimization(**arguments)
