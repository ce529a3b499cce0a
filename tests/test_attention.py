"Squeeze-and-excitation, soft masks and Grad-CAM against their equations; loaded weights survive the conversion."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision.models.resnet import BasicBlock, Bottleneck

from reidnb.networks.attention import (
    add_residual_attention, add_se, grad_cam, overlay, SoftMask, spread, SqueezeExcite)
from reidnb.networks.backbones import make_backbone, split_backbone


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 33), h=st.integers(1, 4), w=st.integers(1, 4), ratio=st.integers(1, 40),
       seed=st.integers(0, 99))
def test_block_is_its_equations(b, c, h, w, ratio, seed):
    "Hu et al. 2018, eqs. 2-4, number by number"
    torch.manual_seed(seed)
    se, x = SqueezeExcite(c, ratio).double(), torch.randn(b, c, h, w, dtype=torch.float64)
    torch.nn.init.normal_(se.excite.weight)
    y = se(x)
    w1, b1, w2, b2 = (p.detach().numpy() for p in (se.squeeze.weight, se.squeeze.bias, se.excite.weight, se.excite.bias))
    assert w1.shape == (max(c // ratio, 1), c)
    for n in range(b):
        z = [sum(float(x[n, k, i, j]) for i in range(h) for j in range(w)) / (h * w) for k in range(c)]
        hidden = [max(sum(w1[m, k] * z[k] for k in range(c)) + b1[m], 0) for m in range(len(w1))]
        for k in range(c):
            gate = 1 / (1 + np.exp(-(sum(w2[k, m] * hidden[m] for m in range(len(hidden))) + b2[k])))
            assert np.allclose(y[n, k].detach().numpy(), gate * x[n, k].numpy(), atol=1e-9)


def test_gradient_of_the_block():
    torch.manual_seed(0)
    se, x = SqueezeExcite(4, 2).double(), torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(se, (x,))


@pytest.mark.parametrize('name', ['small', 'resnet18', 'resnet50'])
def test_old_weights_and_names_stay(name):
    torch.manual_seed(0)
    net = make_backbone(name)
    old = {k: v.clone() for k, v in net.state_dict().items()}
    blocks = sum(isinstance(m, (BasicBlock, Bottleneck)) for m in net.modules())
    new = add_se(net).state_dict()
    assert all(torch.equal(new[k], v) for k, v in old.items())
    extra = [k for k in new if k not in old]
    assert len(extra) == 4 * blocks and all('.se.' in k for k in extra)


@pytest.mark.parametrize('name', ['small', 'resnet18'])
def test_open_gates_change_nothing(name):
    torch.manual_seed(0)
    net, x = make_backbone(name).eval(), torch.randn(2, 3, 64, 32)
    plain = copy.deepcopy(net)
    assert torch.allclose(add_se(net, start=40.)(x), plain(x), atol=1e-6)
    assert not torch.allclose(add_se(copy.deepcopy(plain), start=0.)(x), plain(x), atol=1e-3)


def test_split_and_copied_like_other_networks():
    net = add_se(make_backbone('small'))
    shared, tails = split_backbone(net, 'layer3.0', 2)
    x = torch.randn(1, 3, 64, 32)
    assert torch.equal(tails[0].eval()(shared.eval()(x)), net.eval()(x))
    assert not set(map(id, tails[0].parameters())) & set(map(id, tails[1].parameters()))
    assert copy.deepcopy(net).state_dict().keys() == net.state_dict().keys()


def test_frozen_stages_get_frozen_blocks():
    net = add_se(make_backbone('small', frozen_stages=3))
    for i in range(5):
        for m in net.modules_of(i): assert all(p.requires_grad == (i >= 3) for p in m.parameters())


def test_refusals():
    with pytest.raises(ValueError, match='already'): add_se(add_se(make_backbone('small')))
    with pytest.raises(ValueError, match='no residual blocks'): add_se(make_backbone('mobilenet_v2'))
    with pytest.raises(ValueError, match='at least 1'): SqueezeExcite(8, 0)


# --- residual attention


@settings(max_examples=20, deadline=None)
@given(c=st.sampled_from([4, 8]), out=st.sampled_from([0, 3]), depth=st.integers(1, 3), h=st.integers(1, 13), w=st.integers(1, 7),
       size=st.sampled_from([None, (5, 2)]), seed=st.integers(0, 99))
def test_mask_of_any_size(c, out, depth, h, w, size, seed):
    "In (0,1), of the size asked for; images of a batch do not touch each other"
    torch.manual_seed(seed)
    mask, x = SoftMask(c, out, depth, start=0.).eval(), torch.randn(2, c, h, w)
    m = mask(x, size)
    assert m.shape == (2, out or c, *(size or (h, w))) and 0 < m.min() and m.max() < 1
    assert torch.allclose(m[:1], mask(x[:1], size), atol=1e-5)


@pytest.mark.parametrize('name,index', [('small', 0), ('resnet18', 1), ('resnet50', 1)])
def test_masked_block_is_one_plus_mask_times_trunk(name, index):
    "Wang et al. 2017, eq. 3, on the last block of layer2: where stride and width may change, and where not"
    torch.manual_seed(0)
    net = add_residual_attention(make_backbone(name), start=0.).eval()
    stage = net.get_submodule('layer2')
    block = stage[-1]
    x = torch.randn(2, block.conv1.in_channels, 8, 4)
    trunk = (Bottleneck if isinstance(block, Bottleneck) else BasicBlock).forward(block, x)
    m = block.mask(x, trunk.shape[2:])
    assert m.shape == trunk.shape and torch.allclose(block(x), (1 + m) * trunk)
    assert not any(hasattr(b, 'mask') for b in stage[:-1]) and len(stage) > index


@pytest.mark.parametrize('name', ['small', 'resnet18', 'resnet50'])
def test_masks_leave_old_weights_and_names(name):
    torch.manual_seed(0)
    net, x = make_backbone(name).eval(), torch.randn(2, 3, 64, 32)
    old, before = {k: v.clone() for k, v in net.state_dict().items()}, net(x)
    new = add_residual_attention(net, start=-40.).eval()
    assert all(torch.equal(new.state_dict()[k], v) for k, v in old.items())
    extra = [k for k in new.state_dict() if k not in old]
    assert extra and {k.split('.mask.')[0].split('.')[0] for k in extra} == {'layer1', 'layer2', 'layer3'}
    assert torch.allclose(new(x), before, rtol=1e-4, atol=1e-5)
    for b in (m for m in new.modules() if hasattr(m, 'mask')): torch.nn.init.constant_(b.mask.last[-1].bias, 0.)
    assert not torch.allclose(new(x), before, atol=1e-3)


def test_masks_are_split_frozen_copied_and_trained():
    net = add_residual_attention(make_backbone('small'))
    shared, tails = split_backbone(net, 'layer2', 2)
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(tails[0].eval()(shared.eval()(x)), net.eval()(x))
    assert copy.deepcopy(net).state_dict().keys() == net.state_dict().keys()
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    cold = add_residual_attention(make_backbone('small', frozen_stages=3))
    for i in range(5):
        for m in cold.modules_of(i): assert all(p.requires_grad == (i >= 3) for p in m.parameters())


def test_mask_learns_where_to_read():
    "A patch marked in channel 0 holds the number to predict in channel 1; elsewhere channel 1 is noise"
    torch.manual_seed(0)
    x = torch.randn(64, 4, 8, 4)
    inside = torch.zeros(64, 8, 4, dtype=torch.bool)
    for n in range(64): inside[n, n % 6:n % 6 + 3, n % 3:n % 3 + 2] = True
    y = torch.randn(64)
    x[:, 0] = 3. * inside
    x[:, 1] = torch.where(inside, y[:, None, None], x[:, 1])
    mask = SoftMask(4, start=0.)
    optimizer = torch.optim.Adam(mask.parameters(), .02)
    for _ in range(60):
        read = ((1 + mask(x))[:, 1] * x[:, 1]).mean((1, 2)) * 32 / 12
        optimizer.zero_grad()
        (read - y).square().mean().backward()
        optimizer.step()
    m = mask(x)[:, 1]
    assert m[inside].mean() > m[~inside].mean() + .2


def test_refusals_of_masks():
    with pytest.raises(ValueError, match='already'): add_residual_attention(add_se(make_backbone('small')))
    with pytest.raises(ValueError, match='already'): add_se(add_residual_attention(make_backbone('small')))
    with pytest.raises(ValueError, match='no residual blocks'): add_residual_attention(make_backbone('mobilenet_v2'))
    for k in (dict(channels=6), dict(channels=8, depth=0)):
        with pytest.raises(ValueError, match='multiple of 4'): SoftMask(**k)


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 5), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99),
       pool=st.sampled_from(['mean', 'max']))
def test_grad_cam_is_its_equations(b, c, h, w, seed, pool):
    "Selvaraju et al. 2017, eqs. 1, 2; for a linear score of pooled maps the gradients are known by hand"
    torch.manual_seed(seed)
    maps, weight = torch.randn(b, c, h, w, requires_grad=True), torch.randn(c)
    pooled = maps.mean((2, 3)) if pool == 'mean' else maps.amax((2, 3))
    heat = grad_cam(maps, pooled @ weight)
    for n in range(b):
        alpha = weight / (h * w)   # each channel's pooled value passes a gradient of 1 in all
        raw = [[max(sum(float(alpha[k] * maps.detach()[n, k, i, j]) for k in range(c)), 0) for j in range(w)] for i in range(h)]
        raw = np.array(raw)
        want = raw / raw.max() if raw.max() > 1e-9 else raw
        assert np.allclose(heat[n].numpy(), want, atol=1e-4)
    assert heat.min() >= 0 and heat.max() <= 1


def test_grad_cam_ignores_what_the_score_does_not_read():
    maps = torch.rand(1, 4, 3, 2, requires_grad=True)
    heat = grad_cam(maps, maps[:, :2].mean((1, 2, 3)))
    other = maps.detach().clone()
    other[:, 2:] = 9
    other.requires_grad_()
    assert torch.allclose(heat, grad_cam(other, other[:, :2].mean((1, 2, 3))))


def test_spread_of_known_maps():
    even, one, none = torch.ones(1, 4, 2), torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    one[0, 2, 1] = 5
    half = torch.ones(1, 4, 2)
    half[0, 2:] = 0
    assert torch.allclose(spread(torch.cat([even, one, none, half])), torch.tensor([1, 1 / 8, 0, .5]))
    assert torch.allclose(spread(7 * half), spread(half))


def test_overlay_is_an_image_of_the_same_size():
    image = Image.new('RGB', (32, 64), (10, 200, 30))
    hot = overlay(image, torch.rand(8, 4))
    assert hot.size == image.size and hot.mode == 'RGB'
    assert np.array_equal(np.asarray(overlay(image, torch.rand(8, 4), strength=0.)), np.asarray(image))
