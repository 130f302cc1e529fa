"""Parameter groups, scaling of the learning rate, clipping, and every option of Optimization."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from timm.optim import param_groups_layer_decay
from torch import nn

from modules import optim
from modules.adamw import DataAdamW
from modules.backbones import Backbone, ViT
from modules.groups import describe_groups, layer_scale, parameter_groups
from modules.optim import Optimization
from modules.supervised import Classifier
from modules.weights.names import with_our_names

GOLDEN = Path(__file__).parent.parent / "golden" / "mae_optim.safetensors"


def small() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ViT("mu", image_size=32), 3)


def test_every_parameter_is_in_exactly_one_group() -> None:
    network = small()
    exempt = {f"backbone.{name}" for name in network.backbone.no_weight_decay()}
    groups = parameter_groups(network, 0.3, exempt)
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
    names = [n for g in parameter_groups(network, 0.1) for n in g["param_names"]]
    assert not any(name.startswith("head") for name in names)
    with pytest.raises(ValueError, match=r"no_decay names no parameter of Classifier: {'tokken'}"):
        parameter_groups(network, 0.1, {"tokken"})
    with pytest.raises(ValueError, match="has no trainable parameter"):
        parameter_groups(network.requires_grad_(False), 0.1)


class Published(Backbone):
    """The parameters of the golden table: a stem, three blocks and a norm."""

    embed_dim, num_layers = 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, 4)) for n in (1, 5))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)})
        block = {"norm1": nn.LayerNorm(4), "fc": nn.Linear(4, 4)}
        self.blocks = nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(3))
        self.fc_norm = nn.LayerNorm(4)

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset({"cls_token", "pos_embed"})


def test_layer_decay_equals_the_published_table() -> None:
    with safe_open(GOLDEN, "pt") as file:
        about = file.metadata()
    table, decay = json.loads(about["layer_table"]), float(about["layer_decay"])
    network = Classifier(Published(), 2)
    exempt = {f"backbone.{name}" for name in network.backbone.no_weight_decay()}
    groups = parameter_groups(network, float(about["weight_decay"]), exempt, decay)
    ours = {
        name.removeprefix("backbone."): [group["lr_scale"], group["weight_decay"]]
        for group in groups
        for name in group["param_names"]
    }
    assert ours.keys() == table.keys()
    for name, row in table.items():
        assert ours[name] == pytest.approx(row, rel=1e-12), name


def test_layer_scales_of_a_base_model() -> None:
    network = Classifier(ViT("mu", image_size=32, depth=12), 3)
    names = ("cls_token", "positions.table", "patch_embed.proj.bias", "blocks.0.norm1.bias")
    names = (*names, "blocks.5.mlp.fc1.weight", "blocks.11.attn.qkv.weight", "norm.weight")
    scales = [layer_scale(network, f"backbone.{name}", 0.65) for name in names]
    expected = [0.00370, 0.00370, 0.00370, 0.00569, 0.04902, 0.65, 1.0]
    assert scales == pytest.approx(expected, abs=5e-6)
    assert layer_scale(network, "head.weight", 0.65) == 1.0


def test_layer_decay_agrees_with_timms() -> None:
    """But for the final norm: MAE has it beside the head, timm in the last block's layer."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2)
    groups = param_groups_layer_decay(theirs, 0.1, theirs.no_weight_decay(), layer_decay=0.5)
    by_parameter = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {name: by_parameter[id(p)] for name, p in theirs.named_parameters()}
    ours = Classifier(ViT("mu", image_size=224, depth=3, embed_dim=24), 1000)
    exempt = {f"backbone.{name}" for name in ours.backbone.no_weight_decay()}
    got = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(ours, 0.1, exempt, 0.5)
        for name in group["param_names"]
    }
    named, _ = with_our_names({name: torch.tensor(0) for name in expected})
    renamed = [n if n.startswith("head.") else f"backbone.{n}" for n in named]
    assert got.keys() == set(renamed)
    for name, timms in zip(renamed, expected.values(), strict=True):
        assert got[name] == ((1.0, 0.0) if name.startswith("backbone.norm.") else timms), name


@pytest.mark.parametrize("decay", [None, 0.65])
def test_groups_cover_every_parameter_once_and_the_table_shows_them(decay: float | None) -> None:
    network = small()
    groups = parameter_groups(network, 0.3, layer_decay=decay)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(dict(network.named_parameters()))
    # Two layers, stem and head, with and without decay; the class token is a matrix here.
    assert len(groups) == (2 if decay is None else 2 * 4)
    table = describe_groups(groups)
    for scale in {group["lr_scale"] for group in groups}:
        assert f"x {scale:.4g}" in table


def test_layer_decay_needs_a_network_with_layers() -> None:
    with pytest.raises(ValueError, match=r"Linear has no layer_of.*set optimizer.layer_decay to"):
        optim.build(Optimization(layer_decay=0.5), nn.Linear(3, 3))


def test_layer_decay_reaches_the_rates_of_the_optimiser() -> None:
    optimizer = optim.build(Optimization(layer_decay=0.5), small())
    optim.set_lr(optimizer, 0.8)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_lamb_equals_its_formula() -> None:
    """Two steps of METHODS H restated: Adam's direction, decay, trust ratio; none for biases."""
    how = Optimization("lamb", weight_decay=0.1, momentum=0.8, beta2=0.9)
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    values = [p.detach().clone() for p in network.parameters()]
    first, second = ([torch.zeros_like(v) for v in values] for _ in range(2))
    optimizer = optim.build(how, network)
    optim.set_lr(optimizer, 0.05)
    for step in (1, 2):
        for i, parameter in enumerate(network.parameters()):
            parameter.grad = gradient = 3 * torch.randn(parameter.shape)  # above a norm of 1
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.9 * second[i] + 0.1 * gradient**2
            hat = first[i] / (1 - 0.8**step), second[i] / (1 - 0.9**step)
            update = hat[0] / (hat[1].sqrt() + 1e-8)
            trust = torch.tensor(1.0)
            if parameter.ndim > 1:
                update = update + 0.1 * values[i]
                trust = values[i].norm() / update.norm()
            values[i] = values[i] - 0.05 * trust * update
        optimizer.step()
        for parameter, value in zip(network.parameters(), values, strict=True):
            torch.testing.assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-5)


def test_table_counts_what_is_optimised() -> None:
    network = small()
    table = describe_groups(parameter_groups(network, 0.3))
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
        ({}, {"eps": 0.1}),
        ({"name": "sgd"}, {"momentum": 0.5}),
        ({"name": "sgd"}, {"clip_norm": 0.1}),
        ({"name": "sgd", "clip_norm": 0.1}, {"clip_per_parameter": True}),
        ({}, {"name": "lamb"}),
        ({"name": "lamb"}, {"weight_decay": 0.5}),
        ({"name": "lamb"}, {"momentum": 0.5}),
        ({"name": "lamb"}, {"beta2": 0.9}),
        ({"name": "lamb"}, {"clip_norm": 0.1}),
        ({"name": "sgd"}, {"name": "lars"}),
        ({"name": "lars"}, {"weight_decay": 5.0}),
        ({"name": "lars"}, {"momentum": 0.5}),
        ({}, {"name": "rmsprop"}),
        ({"name": "rmsprop"}, {"momentum": 0.5}),
        ({"name": "rmsprop"}, {"beta2": 0.9}),
        ({"name": "rmsprop"}, {"eps": 0.1}),
        ({"name": "lamb"}, {"eps": 0.1}),
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
    fake.gradient_clip_val = None
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


def test_the_root_rule_of_dinov2() -> None:
    how = Optimization(base_lr=4e-3, reference_batch=1024, scaling="sqrt")
    assert optim.learning_rate(how, trainer(10, 20, 512, 8, 1)).peak == pytest.approx(8e-3)


def test_rate_without_a_reference_is_taken_as_it_is() -> None:
    how = Optimization(base_lr=0.03, reference_batch=None, warmup_epochs=0)
    assert optim.learning_rate(how, trainer(10, 2, 4096, 8, 1)).at(0) == 0.03


def at_epochs(how: Optimization, epochs: tuple[float, ...], total: int) -> list[float]:
    """Rates of a run of 100 steps an epoch and a global batch of 4096."""
    lr = optim.learning_rate(how, trainer(100, total, 512, 8, 1))
    return [lr.at(round(100 * epoch)) for epoch in epochs]


def test_published_rates_of_mae() -> None:
    how = Optimization(base_lr=1.5e-4, reference_batch=256, warmup_epochs=40, min_lr=0)
    got = at_epochs(how, (0, 20, 40, 100, 420, 800), 800)
    assert got == pytest.approx([0, 0.0012, 0.0024, 0.002363, 0.0012, 0], abs=5e-7)


def test_published_rates_of_the_first_vit() -> None:
    how = Optimization(
        base_lr=1e-3, reference_batch=4096, schedule="linear", warmup_steps=1000, min_lr=1e-5
    )
    got = at_epochs(how, (0, 5, 10, 50, 90), 90)
    assert got == pytest.approx([0, 5e-4, 1e-3, 5.05e-4, 1e-5])


@pytest.mark.parametrize(
    "change",
    [
        {"base_lr": 2e-3},
        {"reference_batch": 2048},
        {"schedule": "linear"},
        {"schedule": "noam"},
        {"warmup_epochs": 2.0},
        {"warmup_steps": 123},
        {"warmup_lr": 1e-6},
        {"min_lr": 1e-5},
    ],
)
def test_every_option_of_the_rate_changes_it(change: dict) -> None:
    changed = Optimization(**{"min_lr": 1e-6} | change)
    epochs = (0.5, 3, 6, 9.9)
    assert at_epochs(changed, epochs, 10) != at_epochs(Optimization(), epochs, 10)


def test_warmup_begins_at_its_own_rate() -> None:
    how = Optimization(warmup_lr=1e-6, reference_batch=None)
    assert at_epochs(how, (0, 2.5, 5), 10) == pytest.approx([1e-6, 2.505e-4, 5e-4])


def test_warmup_steps_are_optimizer_steps() -> None:
    how = Optimization(warmup_steps=500)
    for accumulate in (1, 4):
        assert optim.learning_rate(how, trainer(4000, 3, 64, 1, accumulate)).warmup == 500
    with pytest.warns(UserWarning, match="the warm-up is 500 steps, but the run has 20"):
        optim.learning_rate(how, trainer(10, 2, 1, 1, 1))


def test_warmup_longer_than_the_run_only_rises() -> None:
    with pytest.warns(UserWarning, match="warm-up of 5 epochs is 50 steps, but the run has 20"):
        lr = optim.learning_rate(Optimization(reference_batch=None), trainer(10, 2, 1, 1, 1))
    assert [lr.at(s) for s in (0, 10, 19)] == pytest.approx([0, 2.5e-4, 4.75e-4])


def test_run_without_an_end_is_refused() -> None:
    endless = trainer(10, 1, 1, 1, 1)
    endless.estimated_stepping_batches = float("inf")
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or max_steps"):
        optim.learning_rate(Optimization(), endless)


def test_clipping_by_the_trainer_is_refused() -> None:
    clips = trainer(10, 1, 1, 1, 1)
    clips.gradient_clip_val = 1.0
    with pytest.raises(ValueError, match=r"set optimizer\.clip_norm of the model, not trainer"):
        optim.learning_rate(Optimization(), clips)


def test_layer_scale_of_a_group_multiplies_its_rate() -> None:
    parameter = nn.Parameter(torch.ones(1))
    other = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr_scale": 0.5}, {"params": [other]}])
    optim.set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_weight_decay_moves_where_there_is_some() -> None:
    how = Optimization(weight_decay=0.04, weight_decay_end=0.4)
    optimizer = optim.build(how, nn.Linear(2, 2))
    for step, expected in ((0, 0.04), (50, 0.22), (100, 0.4)):
        assert optim.set_weight_decay(optimizer, how, step, 100) == pytest.approx(expected)
        found = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
        assert found == {"decay": pytest.approx(expected), "no decay": 0.0}
    assert optim.set_weight_decay(optimizer, Optimization(), 50, 100) == 0.05
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.4)  # left alone


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
        ({"name": "sgd", "eps": 0.1}, "sgd has no eps"),
        ({"schedule": "noam", "warmup_steps": 0}, "noam rises over its warm-up"),
        ({"schedule": "noam", "warmup_lr": 0.1}, "noam rises over its warm-up"),
        ({"clip_per_parameter": True}, "set clip_norm"),
        ({"weight_decay_end": -0.1}, r"weight_decay_end is -0\.1; expected 0 or more"),
        ({"scaling": "sqrt", "reference_batch": None}, "reference_batch is null, so nothing"),
        ({"base_lr": -1.0}, "base_lr is -1.0; expected 0 or more"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"reference_batch": 0}, "reference_batch is 0"),
        ({"name": "lars", "beta2": 0.9}, "lars has no beta2"),
        ({"layer_decay": 0.0}, r"layer_decay is 0.0; expected within \(0, 1\]"),
        ({"layer_decay": 1.1}, r"layer_decay is 1.1; expected within \(0, 1\]"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_lr": -1e-6}, "warmup_lr is -1e-06"),
        ({"warmup_steps": 10, "warmup_epochs": 3.0}, "give the length of the warm-up once"),
        ({"warmup_lr": 1e-6, "warmup_epochs": 0.0}, "there is no warm-up"),
        ({"warmup_lr": 1e-6, "warmup_steps": 0}, "there is no warm-up"),
    ],
)
def test_wrong_options_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Optimization(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("name", "adam", "'adam' is not known; expected adamw, sgd, lamb, lars"),
        ("schedule", "step", "schedule is 'step'; expected cosine, linear, rsqrt"),
        ("scaling", "cubic", "scaling is 'cubic'; expected linear, sqrt"),
    ],
)
def test_unknown_choices_are_refused(field: str, value: str, says: str) -> None:
    how = Optimization()
    object.__setattr__(how, field, value)  # past the type checker of the tests
    with pytest.raises(ValueError, match=says):
        how.__post_init__()


def test_adamw_of_tpus_is_that_of_torch() -> None:
    """At a rate of nothing as well, and each goes on with the other's state."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 4), nn.Linear(3, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizers: list[torch.optim.Optimizer] = []
    for network, kind in ((ours, DataAdamW), (theirs, torch.optim.AdamW)):
        groups = optim.parameter_groups(network, 0.1)
        optimizers.append(kind(groups, lr=1e-2, betas=(0.9, 0.95)))
    for step in range(6):
        x = torch.randn(5, 3)
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optim.set_lr(optimizer, 1e-2 * step)
            network(x).square().sum().backward()
            if step == 1:  # a parameter that rests takes other steps than the rest
                network.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        if step == 3:
            states = [optimizer.state_dict() for optimizer in optimizers]
            assert states[0]["param_groups"] == states[1]["param_groups"]
            for optimizer, state in zip(optimizers, states[::-1], strict=True):
                optimizer.load_state_dict(state)
    steps = [float(state["step"]) for state in optimizers[0].state_dict()["state"].values()]
    assert sorted(steps) == [5, 6]
