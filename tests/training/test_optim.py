"""Learning rates against closed forms."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from moa_train.training.optim import Constant, Cosine, OptimizerSettings


def named(module):
    return list(module.named_parameters())


def test_cosine_rises_over_its_warmup_and_falls_to_its_floor():
    factor = Cosine(total_steps=110, warmup_steps=10, floor=0.1)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    for step in (10, 35, 60, 110):
        assert factor(step) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 100)))
    assert factor(500) == pytest.approx(0.1)


def test_constant_is_one_after_its_warmup():
    assert [Constant(4)(step) for step in (0, 1, 4, 100)] == pytest.approx([0.2, 0.4, 1, 1])


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warmup_longer_than_the_run_is_refused(warmup):
    with pytest.raises(ValueError, match="warmup_steps"):
        Cosine(total_steps=10, warmup_steps=warmup)


def test_each_group_has_its_learning_rate_and_vectors_do_not_decay():
    trained = {"experts": named(nn.Linear(2, 3)), "router": [*named(nn.LayerNorm(2)), *named(nn.Linear(2, 2))]}
    settings = OptimizerSettings(partial(torch.optim.AdamW), lr=0.1, lr_scale={"router": 5.0}, weight_decay=0.3)
    groups = settings.groups(trained)
    assert [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("experts", 0.1, 0.3, 1),
        ("experts_vectors", 0.1, 0.0, 1),
        ("router", 0.5, 0.3, 1),
        ("router_vectors", 0.5, 0.0, 3),
    ]
    held = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for parameters in trained.values() for _, p in parameters}


def test_the_schedule_scales_every_group_by_step():
    settings = OptimizerSettings(partial(torch.optim.SGD), 1.0, {"router": 5.0}, 0.0, Cosine(total_steps=4))
    optimizer, schedule = settings.build({"experts": named(nn.Linear(1, 1)), "router": named(nn.Linear(1, 1))})
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5, 2.5, 2.5])


def test_a_saved_schedule_does_not_bring_back_its_own_length():
    parameters = {"experts": named(nn.Linear(1, 1))}
    _, short = OptimizerSettings(partial(torch.optim.SGD), 1.0, schedule=Cosine(total_steps=4)).build(parameters)
    _, long = OptimizerSettings(partial(torch.optim.SGD), 1.0, schedule=Cosine(total_steps=8)).build(parameters)
    long.load_state_dict(short.state_dict())
    assert long.lr_lambdas[0](4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"fused": None}, True), ({"fused": False}, False), ({}, None)],
    ids=["left open", "decided", "an optimizer that knows no such thing"],
)
def test_one_kernel_for_all_parameters_is_chosen_where_the_settings_leave_it_open(settings, expected):
    trained = {"experts": named(nn.Linear(2, 3))}
    given = OptimizerSettings(partial(torch.optim.AdamW, **settings), lr=0.1)
    assert given.build(trained, fused=True)[0].param_groups[0]["fused"] is expected
    assert given.build(trained, fused=False)[0].param_groups[0]["fused"] is settings.get("fused")
