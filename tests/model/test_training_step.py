"""A training step through MoA: checkpointing, compilation and DDP give the same gradients; the right weights train."""

from functools import partial

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moa_train.denoiser import Denoiser
from moa_train.losses import (
    masked_reconstruction,
    mean_prior_routing,
    mean_subject_attention,
    object_loss,
    router_loss,
)
from moa_train.model.unet import (
    add_moa,
    attention_layers,
    compile_blocks,
    personalized_state_dict,
    trainable_parameters,
)


class Step(nn.Module):
    """The whole loss in one forward, as the training module has it."""

    def __init__(self, unet):
        super().__init__()
        self.denoiser = Denoiser(unet)

    def forward(self, z, t, conditioning):
        prediction, seen = self.denoiser(z, t, conditioning)
        size = tuple(z.shape[-2:])
        masks = torch.zeros(2, 2, *size)
        masks[:, 0, 1:4, 2:5], masks[0, 1, 5:, 5:] = 1, 1
        foreground = masks.amax(1, keepdim=True)
        masked = masked_reconstruction(prediction, torch.ones_like(prediction), foreground)
        router = router_loss(mean_prior_routing(seen, size), foreground)
        attention = object_loss(mean_subject_attention(seen, size), masks, conditioning.subject_present)
        return (masked + 3 * router + 5 * attention).mean()


def gradients(step, tools):
    unet = step.denoiser.unet
    unet.zero_grad()
    loss = step(*tools.latents(), tools.make_conditioning())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for group in trainable_parameters(unet).values() for n, p in group}


def assert_same(left, right):
    torch.testing.assert_close(left[0], right[0])
    for name, gradient in left[1].items():
        torch.testing.assert_close(right[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_gradients_are_equal_with_and_without_checkpointing(tools, family):
    step = Step(tools.trained(family)).train()
    plain = gradients(step, tools)
    step.denoiser.unet.enable_gradient_checkpointing()
    runs = []
    layer = step.denoiser.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.register_forward_hook(lambda *_: runs.append(1))
    checkpointed = gradients(step, tools)
    assert len(runs) == 2
    assert_same(plain, checkpointed)
    assert all(gradient.abs().sum() > 0 for gradient in plain[1].values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_record_alone_trains_the_router_and_the_expert_of_each_layer(tools, checkpointed):
    unet = tools.trained().train()
    if checkpointed:
        unet.enable_gradient_checkpointing()
    last = attention_layers(unet)[-1]
    for record, part in (("routing", "router.layers.3.weight"), ("subject_attention", "query.weight")):
        unet.zero_grad()
        _, seen = Denoiser(unet)(*tools.latents(), tools.make_conditioning())
        getattr(seen, record)[last].square().mean().backward()
        assert unet.get_parameter(f"{last}.processor.{part}").grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(tools):
    step = Step(tools.trained()).train()
    step.denoiser.unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        step(*tools.latents(), tools.make_conditioning())


@pytest.mark.filterwarnings("ignore")  # of the compiler's own dependencies
def test_gradients_are_equal_when_every_block_is_compiled(tools):
    step = Step(tools.trained())
    plain = gradients(step, tools)
    graphs = []
    jaxtyping.config.update("jaxtyping_disable", True)  # else every shape check is compiled, too
    try:
        compile_blocks(
            step.denoiser.unet, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True
        )
        compiled = gradients(step, tools)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert len(graphs) == 4
    assert torch._dynamo.config.recompile_limit >= 4 * 8
    assert_same(plain, compiled)


@pytest.fixture
def process_group(tmp_path):
    """A gloo group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ddp_finds_no_unused_parameter(tools, process_group):
    step = Step(tools.trained())
    plain = gradients(step, tools)
    wrapped = DistributedDataParallel(step, find_unused_parameters=False)
    for _ in range(2):
        step.denoiser.unet.zero_grad()
        wrapped(*tools.latents(), tools.make_conditioning()).backward()
    found = {n: p.grad for group in trainable_parameters(step.denoiser.unet).values() for n, p in group}
    assert_same(plain, (plain[0], found))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_everything_that_moa_adds_trains_and_nothing_of_the_prior_does(tools, family):
    step = Step(add_moa(tools.make_unet(family), tools.config))
    unet = step.denoiser.unet
    groups = trainable_parameters(unet)
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    optimizer = torch.optim.AdamW([p for group in groups.values() for _, p in group], lr=1e-2, weight_decay=0)
    for _ in range(3):  # a last layer at zero passes a gradient on only after its own first step
        optimizer.zero_grad()
        step(*tools.latents(), tools.make_conditioning()).backward()
        optimizer.step()
    changed = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == personalized_state_dict(unet).keys()
    assert all(groups.values())
