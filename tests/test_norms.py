"""Properties and faults of norms, of their conversion, and of networks split into branches."""
import copy

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reidnb.networks import backbones as B
from reidnb.networks import norms as R
from reidnb.networks.weights import load_weights
from reidnb.core.distributed import global_batch_norm, GlobalBatchNorm2d

torch.set_num_threads(1)
QUIET = settings(max_examples=50, deadline=None)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def slow(x, alpha, gamma, beta, eps, unbiased, running=None):
    "IICS eq. 12, one image and one channel at a time"
    N, C, H, W = x.shape
    y, stats = torch.empty_like(x), []
    for c in range(C):
        mu = [sum(x[n, c].flatten()) / (H * W) for n in range(N)]
        var = [sum((v - mu[n])**2 for v in x[n, c].flatten()) / (H * W - 1 if unbiased and H * W > 1 else H * W)
               for n in range(N)]
        mu_bn = sum(mu) / N
        var_bn = sum(v + m**2 for m, v in zip(mu, var)) / N - mu_bn**2
        stats.append((mu_bn, var_bn))
        if running: mu_bn, var_bn = running[0][c], running[1][c]
        for n in range(N):
            m, v = alpha * mu_bn + (1 - alpha) * mu[n], alpha * var_bn + (1 - alpha) * var[n]
            y[n, c] = gamma[c] * (x[n, c] - m) / (v + eps).sqrt() + beta[c]
    return y, torch.tensor(stats, dtype=x.dtype).T


def norm_of(channels, seed, **k):
    torch.manual_seed(seed)
    n = R.AIBN2d(channels, **k).double()
    with torch.no_grad():
        n.weight.uniform_(.5, 2), n.bias.normal_(), n.running_mean.normal_(), n.running_var.uniform_(.5, 2)
    return n


# --- AIBN ----------------------------------------------------------------------------------------
@QUIET
@given(SHAPES, st.integers(-2, 6).map(lambda i: i / 4), st.booleans(), st.booleans(), st.integers(0, 999))
def test_aibn_equals_the_equation(shape, alpha, unbiased, train, seed):
    n = norm_of(shape[1], seed, alpha=alpha, unbiased=unbiased).train(train)
    x = torch.randn(shape, dtype=torch.float64) * 3 + torch.randn(shape[:2], dtype=torch.float64)[..., None, None]
    before = n.running_mean.clone(), n.running_var.clone()
    if train and shape[0] * shape[2] * shape[3] < 2:
        with pytest.raises(ValueError, match='one value'): n(x)
        return
    expected, (mean, var) = slow(x, min(max(alpha, 0), 1), n.weight, n.bias, n.eps, unbiased, None if train else before)
    x.requires_grad_()
    y = n(x)
    assert torch.allclose(y, expected, atol=1e-9)
    y.square().sum().backward()
    assert x.grad.isfinite().all() and n.weight.grad.isfinite().all() and n.alpha.grad.isfinite()
    if train:
        assert torch.allclose(n.running_mean, .9 * before[0] + .1 * mean)
        count = shape[0] * shape[2] * shape[3]
        exact = unbiased and shape[2] * shape[3] > 1
        assert torch.allclose(n.running_var, .9 * before[1] + .1 * var * (1 if exact else count / (count - 1)))
    else: assert torch.equal(n.running_mean, before[0]) and torch.equal(n.running_var, before[1])


@QUIET
@given(SHAPES, st.integers(0, 999))
def test_aibn_does_not_see_the_order_or_duplicates(shape, seed):
    shape = (shape[0] + 1, *shape[1:])
    n = norm_of(shape[1], seed)
    x = torch.randn(shape, dtype=torch.float64)
    order = torch.randperm(len(x))
    assert torch.allclose(n(x)[order], n(x[order]), atol=1e-10)
    assert torch.allclose(n(torch.cat([x, x]))[:len(x)], n(x), atol=1e-10)
    # a change of gain and offset of all images leaves the output; of one image only when alpha is 0
    scale = lambda v: (v - n.bias[:, None, None])
    m = copy.deepcopy(n)
    m.eps = n.eps * 16
    assert torch.allclose(scale(m(4 * x + 7)), scale(n(x)), atol=1e-8)


@pytest.mark.parametrize('shape', [(8, 5, 6, 3), (8, 5, 1, 1), (2, 5, 1, 9)])
def test_pure_ends_are_torchs_norms_for_many_steps(shape):
    torch.manual_seed(0)
    bn, ours = nn.BatchNorm2d(5), R.AIBN2d(5, 1., unbiased=False)
    for _ in range(4):
        x = torch.randn(shape) * 2 + 1
        assert torch.allclose(ours(x), bn(x), atol=1e-5)
    assert torch.allclose(ours.running_var, bn.running_var, atol=1e-5)
    assert ours.num_batches_tracked == bn.num_batches_tracked
    assert torch.allclose(ours.eval()(x), bn.eval()(x), atol=1e-5)
    if shape[2] * shape[3] > 1:
        assert torch.allclose(R.AIBN2d(5, 0., unbiased=False)(x), nn.InstanceNorm2d(5)(x), atol=1e-5)


def test_cumulative_average_like_torch():
    torch.manual_seed(0)
    bn, ours = nn.BatchNorm2d(2, momentum=None), R.AIBN2d(2, 1., momentum=None, unbiased=False)
    for _ in range(3):
        x = torch.randn(4, 2, 3, 3)
        bn(x), ours(x)
    assert torch.allclose(ours.running_var, bn.running_var, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_statistics_in_float32(dtype):
    "The variance of 1024 cells around 200 is lost in half precision and in a sum of squares"
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 32, 32) * 2 + 200).to(dtype)
    n = R.AIBN2d(3)
    expected = R.AIBN2d(3)(x.float())
    with torch.autocast('cpu', torch.bfloat16): y = n(x)
    assert y.dtype == dtype and torch.allclose(y.float(), expected, atol=.02)
    assert n.running_var.dtype == torch.float32
    offset = torch.randn(4, 3, 8, 8) + 1e4   # float32: the sum of squares would lose the variance
    assert abs(R.AIBN2d(3, 1.)(offset).std() - 1) < .02


def test_alpha_outside_stays_until_weight_decay_brings_it_back():
    n = R.AIBN2d(2, 1.2)
    x = torch.randn(4, 2, 3, 3)
    for decay, moves in ((0, False), (.5, True)):
        opt = torch.optim.SGD(n.parameters(), lr=.1, weight_decay=decay)
        before = n.alpha.item()
        opt.zero_grad()
        n(x).pow(3).sum().backward()
        opt.step()
        assert (n.alpha.item() < before) == moves


# --- IBN -----------------------------------------------------------------------------------------
@QUIET
@given(st.integers(2, 9), st.integers(2, 4), st.integers(2, 4), st.integers(0, 99))
def test_ibn_halves_are_torchs_norms(channels, n, size, seed):
    torch.manual_seed(seed)
    x, norm = torch.randn(n, channels, size, size) * 2 + 1, R.IBNa(channels)
    h = channels // 2
    expected = torch.cat([nn.InstanceNorm2d(h)(x[:, :h]), nn.BatchNorm2d(channels - h)(x[:, h:])], 1)
    assert torch.allclose(norm(x), expected, atol=1e-5)


# --- conversion ----------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 4), min_size=1), st.sampled_from(['none', 'bottleneck', 'layer']), st.booleans())
def test_conversion_keeps_the_function_at_alpha_one(stages, share, learned):
    torch.manual_seed(0)
    net = B.make_backbone('small').eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(), m.running_var.uniform_(.5, 2), m.weight.data.uniform_()
    x = torch.randn(2, 3, 64, 32)
    new = R.convert_norms(copy.deepcopy(net), 'aibn', stages=stages, share=share, alpha=1., learned=learned)
    with torch.inference_mode(): assert torch.allclose(new(x), net(x), atol=1e-5)
    norms = {f'layer{i}' if i else 'bn1' for i in stages}
    assert {k.split('.')[0] for k, m in new.named_modules() if isinstance(m, R.AIBN2d)} == norms
    found = R.alphas(new)
    assert set(found.values()) == {1.} and len(found) <= sum(3 if i > 1 else 2 for i in stages)
    if share != 'none': assert len(found) == len(stages)
    assert sum(k.endswith('alpha') for k, _ in new.named_parameters()) == (len(found) if learned else 0)
    kept = new.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('name,kind', [(n, k) for n in ('small', 'resnet18') for k in ('aibn', 'in', 'ibn-a', 'ibn-b')] + [('resnet50', 'ibn-b')])
def test_converted_networks_train_and_come_back_from_a_file(name, kind, tmp_path):
    torch.manual_seed(0)
    net, x = R.convert_norms(B.make_backbone(name), kind).train(), torch.randn(3, 3, 64, 32)
    opt = torch.optim.SGD(net.parameters(), lr=.01)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    opt.step()
    safetensors.torch.save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / 'n.safetensors')
    again = R.convert_norms(B.make_backbone(name), kind)
    report = load_weights(again, tmp_path / 'n.safetensors')
    assert report.complete and not report.unexpected
    with torch.inference_mode(): assert torch.equal(again.eval()(x), net.eval()(x))
    clone = copy.deepcopy(net)
    assert len(R.alphas(clone)) == len(R.alphas(net)) and clone.state_dict().keys() == net.state_dict().keys()


def test_a_resnet_of_torchvision_and_an_encoder_convert_too():
    whole = torchvision.models.resnet18(weights=None).eval()
    R.convert_norms(whole, 'aibn')
    assert isinstance(whole.layer4[1].bn2, R.AIBN2d) and whole(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    enc = R.convert_norms(B.Encoder(B.make_backbone('small')), 'in')
    assert isinstance(enc.neck, nn.BatchNorm1d) and isinstance(enc.backbone.layer3[0].bn1, nn.InstanceNorm2d)
    with pytest.raises(ValueError, match='no Backbone'): R.convert_norms(torchvision.models.mobilenet_v2(weights=None), 'in')


@pytest.mark.parametrize('name', ['mobilenet_v2', 'efficientnet_b0'])
def test_other_families_take_instance_statistics_and_refuse_ibn(name):
    net, x = B.make_backbone(name), torch.randn(2, 3, 64, 32)
    before = copy.deepcopy(net.state_dict())
    for kind in ('ibn-a', 'ibn-b'):
        with pytest.raises(ValueError, match='residual blocks of a ResNet'): R.convert_norms(net, kind)
    assert net.state_dict().keys() == before.keys(), 'a refusal changes nothing'
    eps = {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    net = R.convert_norms(net, 'aibn', stages=(0, 1, 2, 3, 4))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert {m.eps for m in net.modules() if isinstance(m, R.AIBN2d)} == eps
    assert net(x).isfinite().all()


def test_global_norms_stay_global_and_sync_conversion_leaves_aibn_alone():
    net = global_batch_norm(B.make_backbone('small'))
    assert isinstance(R.convert_norms(net, 'ibn-a').layer1[0].bn1.BN, GlobalBatchNorm2d)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(R.convert_norms(B.make_backbone('small'), 'aibn'))
    assert isinstance(net.layer4[0].bn1, R.AIBN2d) and isinstance(net.layer1[0].bn1, nn.SyncBatchNorm)


def test_conversion_after_freezing_keeps_it():
    net = R.convert_norms(B.make_backbone('small', frozen_stages=5), 'aibn', stages=range(5)).train()
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(4, 3, 64, 32))
    assert not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- two processes -------------------------------------------------------------------------------
def both_norms():
    torch.manual_seed(0)
    x, w = torch.randn(8, 4, 5, 3) * torch.rand(8, 4, 1, 1) + torch.randn(8, 4, 1, 1), torch.randn(8, 4, 5, 3)
    return x, w, [R.AIBN2d(4, .3), R.AIBN2d(4, .7, unbiased=False), R.IBNa(4)]


def answers(norm, x, w):
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.pow(2) * w).sum().backward()
    return {'y': y.detach(), 'dx': x.grad, 'dp': torch.cat([p.grad.flatten() for p in norm.parameters()]),
            **{k: v for k, v in norm.state_dict().items() if 'running' in k}}


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    x, w, norms = both_norms()
    half = slice(4 * rank, 4 * rank + 4)
    torch.save([answers(global_batch_norm(n), x[half], w[half]) for n in norms], f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    x, w, norms = both_norms()
    a, b = (torch.load(tmp_path / f'{r}.pt') for r in (0, 1))
    for norm, p, q in zip(norms, a, b):
        whole = answers(norm, x, w)
        for k in ('y', 'dx'): assert torch.allclose(torch.cat([p[k], q[k]]), whole[k], atol=1e-4), k
        assert torch.allclose(p['dp'] + q['dp'], whole['dp'], atol=1e-3)
        for k in whole:
            if 'running' in k: assert torch.allclose(p[k], whole[k], atol=1e-5) and torch.equal(p[k], q[k]), k


# --- camera gap ----------------------------------------------------------------------------------
@QUIET
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 999))
def test_gap_is_a_share_and_sees_no_rotation(cams, dim, seed):
    torch.manual_seed(seed)
    f, c = torch.randn(30, dim, dtype=torch.float64), torch.arange(30) % cams * 7
    g = R.camera_gap(f, c)
    mean = f.mean(0)
    by_hand = sum(((f[c == k].mean(0) - mean)**2).sum() * (c == k).sum() for k in c.unique()) / ((f - mean)**2).sum()
    assert 0 <= g <= 1 and g == pytest.approx(float(by_hand))
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
    assert R.camera_gap(5 * f @ turn + 3, c) == pytest.approx(g)
    assert R.camera_gap(f + 1000 * c[:, None], c) > .99


# --- branches ------------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(['small', 'resnet18', 'mobilenet_v2', 'efficientnet_b0']), st.integers(0, 4),
       st.none() | st.integers(0, 6), st.integers(1, 3), st.integers(0, 5), st.booleans(), st.sampled_from([None, 'aibn', 'in']))
def test_any_split_computes_the_network(name, stage, block, copies, frozen, train, kind):
    torch.manual_seed(0)
    net, stage = B.make_backbone(name, frozen_stages=frozen), ['stem', 'layer1', 'layer2', 'layer3', 'layer4'][stage]
    if kind: R.convert_norms(net, kind)
    after = stage if block is None else f'{stage}.{block}'
    try: shared, tails = B.split_backbone(net.eval(), after, copies)
    except ValueError as e:
        assert block is not None and ('blocks 0 to' in str(e) or 'cannot be cut' in str(e))
        return
    x = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        mid, whole = shared(x), net(x)
        assert len(tails) == copies and all(torch.equal(t(mid), whole) for t in tails)
    assert mid.shape[1] == shared.channels and mid.shape[2] == 64 // shared.stride
    assert all(t.channels == net.channels and t.stride == net.stride for t in tails)
    assert not shared.state_dict().keys() & tails[0].state_dict().keys()
    own = [{p.data_ptr() for p in m.parameters()} for m in (shared, *tails)]
    assert all(not a & b for i, a in enumerate(own) for b in own[:i])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trainable = {k for k, p in net.named_parameters() if p.requires_grad}
    assert {k for m in (shared, tails[0]) for k, p in m.named_parameters() if p.requires_grad} == trainable
    tails[-1].train(train)(shared.train(train)(x))
    net.train(train)
    state = {**shared.state_dict(), **tails[-1].state_dict()}
    moved = {k for k, v in state.items() if not torch.equal(v, before[k])}
    cells = [k for i in range(frozen) for k in net.stages[i]]
    assert not [k for k in moved if k.startswith(tuple(c + '.' for c in cells))] if cells else True
    assert train or not moved


def test_bad_splits_say_so():
    net = B.make_backbone('resnet18', cut_at='layer3')
    for after in ('layer4', 'layer', '', 'layer3.', 'layer3.2', 'layer3.-1', 'layer3.0.bn1', 'stem.0'):
        with pytest.raises(ValueError, match='after='): B.split_backbone(net, after)
    with pytest.raises(ValueError, match='copies=0'): B.split_backbone(net, 'layer2', copies=0)
    assert copy.deepcopy(net).load_state_dict(net.state_dict())
