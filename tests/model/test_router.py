"""The router: a distribution a pixel, constant before training."""

import pytest
import torch

from moa_train.model.router import Router


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("initial_prior", [0.5, 0.8])
def test_routing_starts_at_its_initial_value_for_every_input(kind, initial_prior):
    routing = Router(16, kind, initial_prior)(100 * torch.randn(2, 5, 16))
    torch.testing.assert_close(routing, torch.tensor([initial_prior, 1 - initial_prior]).expand(2, 5, 2))


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_routing_sums_to_one_whatever_was_trained(kind):
    router = Router(16, kind)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    routing = router(torch.randn(2, 500, 16))
    assert routing.std() > 0.1
    torch.testing.assert_close(routing.sum(-1), torch.ones(2, 500))


def test_softmax_is_exact_in_half_precision_up_to_the_last_rounding():
    router = Router(16).bfloat16()
    torch.nn.init.normal_(router.layers[-1].weight)
    hidden = torch.randn(1, 50, 16).bfloat16()
    routing = router(hidden)
    assert routing.dtype == torch.bfloat16
    assert torch.equal(routing, router.layers(hidden).float().softmax(-1).bfloat16())


def test_hard_routing_takes_the_more_probable_expert_whole_with_the_gradient_of_the_softmax():
    soft, hard = Router(16), Router(16, hard=True)
    for parameter in soft.parameters():
        torch.nn.init.normal_(parameter)
    hard.load_state_dict(soft.state_dict())
    hidden, weight = torch.randn(2, 50, 16), torch.randn(2, 50, 2)
    probability, routing = soft(hidden), hard(hidden)
    for row, pixel in ((0, 0), (0, 7), (1, 31), (1, 49)):
        prior, personalized = probability[row, pixel].tolist()
        assert routing[row, pixel].tolist() == ([0.0, 1.0] if personalized > prior else [1.0, 0.0])
    assert set(routing.unique().tolist()) == {0.0, 1.0}
    (probability * weight).sum().backward()
    (routing * weight).sum().backward()
    for one, other in zip(soft.parameters(), hard.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_hard_routing_begins_with_the_personalized_expert_which_would_never_be_tried_otherwise():
    assert Router(16, hard=True)(torch.randn(1, 3, 16))[..., 1].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("options", [{"kind": "deep"}, {"initial_prior": 1.0}, {"initial_prior": 0.0}])
def test_impossible_routers_are_refused(options):
    with pytest.raises(Exception, match=r"deep|between 0 and 1"):
        Router(16, **options)
