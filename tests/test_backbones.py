"""Networks of timm and ResNeXt as backbones: maps, gradients, weights, stages, training, and clear refusals."""
import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from reidnb.core.distributed import GlobalBatchNorm2d, global_batch_norm
from reidnb.data.toys import toy_crops
from reidnb.methods.registry import recipe
from reidnb.networks import partitions as P
from reidnb.networks.attention import add_residual_attention, add_se
from reidnb.networks.backbones import Backbone, Encoder, make_backbone, split_backbone
from reidnb.networks.norms import alphas, convert_norms
from reidnb.networks.weights import load_weights
from reidnb.training.loop import fit
from reidnb.training.models import load_model

torch.set_num_threads(1)
try: import timm
except ImportError: timm = None
needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed: pip install 'reidnb[timm]'")
# name: channels, stride of the map with last_stride=1, stages in a row, has batch norms
NETS = {'timm:convnext_atto': (320, 16, True, False), 'timm:regnetx_002': (368, 16, True, True),
        'timm:resnext50_32x4d': (2048, 16, True, True), 'resnext50_32x4d': (2048, 16, True, True),
        'timm:vit_tiny_patch16_224': (192, 16, False, False)}
each = pytest.mark.parametrize('name', [pytest.param(k, marks=needs_timm if 'timm' in k else ()) for k in NETS])
VIT = 'timm:test_vit'
X = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0))


@each
def test_map_gradients_and_unit_features(name):
    torch.manual_seed(0)
    channels, stride, chained, _ = NETS[name]
    net = make_backbone(name)
    assert isinstance(net, Backbone) and net.training and net.chained == chained
    assert (net.channels, net.stride) == (channels, stride) and net.names == ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    enc = Encoder(net)
    y = net(X)
    assert y.shape == (2, channels, 128 // stride, 64 // stride)
    enc(X)[1].square().sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    f = enc.eval().embed(X)
    assert f.shape == (2, channels) and torch.allclose(f.norm(dim=1), torch.ones(2), atol=1e-5)


@each
def test_state_goes_into_a_new_network_and_a_file_fills_it(name, tmp_path):
    one, two = (make_backbone(name).eval() for _ in range(2))
    with torch.no_grad():
        assert not torch.equal(one(X), two(X))
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(X), two(X))
        if 'timm:' in name: # a file of timm has the names of timm, and a classifier
            theirs = timm.create_model(name[5:]).eval()
            torch.save(theirs.state_dict(), tmp_path / 'w.pth')
            net = make_backbone(name, weights=tmp_path / 'w.pth', last_stride=1 + ('vit' not in name)).eval()
            assert net.report.complete and net.report.unexpected
            size = theirs.default_cfg['input_size']
            x = torch.randn(1, *size)
            y = theirs.forward_features(x)
            if y.ndim == 3: y = y[:, theirs.num_prefix_tokens:].mT.unflatten(2, (size[1] // 16, -1))
            assert torch.equal(net(x), y)


@each
def test_cuts_and_frozen_stages(name):
    net = make_backbone(name, cut_at='layer3', frozen_stages=2).train()
    assert net.names == ['stem', 'layer1', 'layer2', 'layer3'] and net.stride == 16
    before = copy.deepcopy(net.state_dict())
    y = net(X)
    assert y.shape == (2, net.channels, 8, 4)
    y.square().mean().backward()
    moving = {k for k, p in net.named_parameters() if p.requires_grad}
    assert moving == {k for k, p in net.named_parameters() if p.grad is not None}
    late = tuple(f'{k}.' for s in net.stages[2:] for k in s)
    assert moving == {k for k, _ in net.named_parameters() if k.startswith(late)} and moving
    assert all(v.equal(before[k]) for k, v in net.state_dict().items() if not k.startswith(late))
    assert any(not p.requires_grad for p in net.parameters())


@needs_timm
def test_the_positions_of_a_transformer_freeze_with_its_stem():
    net = make_backbone(VIT, frozen_stages=1)
    assert not net.net.pos_embed.requires_grad and not net.net.cls_token.requires_grad
    assert net.net.blocks[0].attn.qkv.weight.requires_grad
    assert net.freeze(0).net.pos_embed.requires_grad


@needs_timm
def test_tokens_go_back_to_their_places():
    "A change of one patch, seen through a network without attention between tokens, stays in its cell"
    net = make_backbone(VIT).eval()
    class Nothing(nn.Module):
        def forward(self, x, **k): return x
    for b in net.net.blocks: b.attn = Nothing()
    assert type(net.net.patch_embed.proj) is nn.Conv2d and net.net.num_prefix_tokens == 1
    x = X.clone()
    x[:, :, 48:64, 16:32] += 1
    with torch.no_grad(): moved = (net(x) - net(X)).abs().sum(1)[0] > 1e-6
    assert moved.nonzero().tolist() == [[3, 1]]
    for size in ((256, 128), (384, 128), (64, 64)):
        with torch.no_grad(): assert net(torch.zeros(1, 3, *size)).shape[2:] == (size[0] // 16, size[1] // 16)
    with torch.no_grad(), pytest.raises(AssertionError, match='divisible by patch size'): net(torch.zeros(1, 3, 100, 64))


@needs_timm
@pytest.mark.parametrize('name', ['timm:test_convnext', 'timm:regnetx_002', 'timm:resnet26d', 'timm:test_efficientnet'])
def test_last_stride_one_doubles_the_map_and_keeps_the_weights(name):
    whole, fine = make_backbone(name, last_stride=2), make_backbone(name)
    assert (whole.stride, fine.stride) == (32, 16) and whole.state_dict().keys() == fine.state_dict().keys()
    fine.load_state_dict(whole.state_dict())
    with torch.no_grad(): assert fine.eval()(X).shape[2:] == (8, 4) and whole.eval()(X).shape[2:] == (4, 2)


@needs_timm
@pytest.mark.parametrize('name', ['timm:test_convnext', 'timm:regnetx_002', 'timm:test_efficientnet'])
def test_chains_are_split(name):
    net = make_backbone(name, frozen_stages=2).eval()
    for after in net.names:
        shared, (tail, other) = split_backbone(net, after, 2)
        with torch.no_grad(): assert torch.equal(tail(shared(X)), net(X)) and torch.equal(other(shared(X)), net(X))
        assert shared(X).shape[1] == shared.channels and tail.channels == net.channels
    assert split_backbone(net, 'layer3.0')[0].channels == split_backbone(net, 'layer3')[0].channels


@needs_timm
@pytest.mark.parametrize('k,match', [
    (dict(name='timm:convnext_zetta'), 'it has convnext_atto'), (dict(name='timm:zzz'), "no network 'zzz'$"),
    (dict(name=VIT, last_stride=2), 'it is 1'), (dict(name='timm:swin_tiny_patch4_window7_224'), 'it is 2'),
    (dict(name='timm:resnetblur50'), 'cannot be changed'), (dict(name=VIT, cut_at='stem'), 'one piece'),
    (dict(name='timm:test_maxvit'), 'takes no crops of 128 x 64'), (dict(name='timm:hrnet_w18_small'), 'stages are not known'),
    (dict(name=VIT, stem_relu=False), 'stem_relu'), (dict(name=VIT, cut_at='layer5'), 'layer5'),
    (dict(name=VIT, frozen_stages=6), '5 stages'), (dict(name=VIT, weights='small'), "'small' belong"),
    (dict(name=VIT, weights='nowhere.pth'), 'no weight file')])
def test_refusals(k, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match): make_backbone(**k)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r"pip install 'reidnb\[timm\]'"): make_backbone('timm:convnext_atto')


def test_timm_is_imported_when_asked_for_only():
    code = ("import sys\nfrom reidnb.networks.backbones import make_backbone\nfrom reidnb.methods import registry\n"
            "make_backbone('small'); registry.recipe('baseline')\nassert 'timm' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parent.parent)


@needs_timm
def test_weights_of_timm(monkeypatch):
    real, asked = timm.create_model, []
    def offline(name, pretrained=False, **k):
        if pretrained: raise OSError('no route to host')
        return real(name, **k)
    monkeypatch.setattr(timm, 'create_model', offline)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        with pytest.raises(ConnectionError, match="timm/test_convnext.*weights='PATH'"):
            make_backbone('timm:test_convnext', weights='imagenet')
    assert 'expect pixels of mean (0.5, 0.5, 0.5)' in str(w[0].message)
    def online(name, pretrained=False, **k):
        asked.append(pretrained)
        return real(name, **k)
    monkeypatch.setattr(timm, 'create_model', online)
    assert make_backbone('timm:convnext_atto', weights='imagenet').report.complete and asked[-1] is True
    assert make_backbone('timm:convnext_atto', weights='none').report is None and asked[-1] is False
    with pytest.raises(ValueError, match='no weights'): make_backbone('timm:convnext_atto_rms', weights='imagenet')


@each
def test_norms(name):
    net = make_backbone(name).eval()
    if not NETS[name][3]:
        with pytest.raises(ValueError, match='no batch norm to convert in these stages, only .*LayerNorm'): convert_norms(net, 'aibn')
        with pytest.raises(ValueError, match='residual blocks of a ResNet'): convert_norms(net, 'ibn-a')
        return
    for m in net.modules(): # timm starts the last norm of a block at 0, which would hide the block
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 1.5)
    one = convert_norms(copy.deepcopy(net), 'aibn', alpha=1.)
    assert len(alphas(one)) > 1
    with torch.no_grad():
        assert torch.allclose(one(X), net(X), atol=1e-4 * net(X).abs().max()), 'alpha=1 is the batch norm, activation and all'
    assert not load_weights(one, net.state_dict()).skipped
    y = convert_norms(copy.deepcopy(net), 'in').train()(X)
    assert y.isfinite().all()
    if 'timm' in name:
        with pytest.raises(ValueError, match='residual blocks of a ResNet'): convert_norms(net, 'ibn-b')
    else: assert convert_norms(net, 'ibn-a')(X).shape == y.shape


@needs_timm
def test_batch_norms_with_an_activation_go_over_all_processes():
    net = make_backbone('timm:regnetx_002').train()
    other = global_batch_norm(copy.deepcopy(net))
    bns = [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bns and all(isinstance(m, GlobalBatchNorm2d) for m in bns) and other.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad(): assert torch.equal(other(X), net(X))
    assert len(alphas(convert_norms(other, 'aibn'))) > 1


@needs_timm
def test_parts_and_attention():
    for name, a in ((VIT, P.pcb(4, dim=16)), ('timm:test_convnext', P.pcb(4)), ('timm:test_convnext', P.scr()),
                    ('timm:regnetx_002', P.scr())):
        net = P.MultiBranch(make_backbone(name), a, 3)
        out = net(X)
        assert all(z.shape == (2, 3) for z in out.logits.values())
        sum(z.square().mean() for z in out.logits.values()).backward()
        assert net.eval().embed(X).shape == (2, net.dim)
    for a in (P.scr(), P.asymmetric()):
        with pytest.raises(ValueError, match='one piece'): P.MultiBranch(make_backbone(VIT), a)
    with pytest.raises(ValueError, match='no residual blocks'): P.MultiBranch(make_backbone('timm:test_convnext'), P.asymmetric())
    for f in (add_se, add_residual_attention):
        with pytest.raises(ValueError, match='no residual blocks of a ResNet'): f(make_backbone(VIT))
        assert f(make_backbone('resnext50_32x4d')).eval()(X).shape == (2, 2048, 8, 4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('name', [pytest.param(k, marks=needs_timm if 'timm' in k else ()) for k in NETS if k != 'timm:resnext50_32x4d'])
def test_an_epoch_of_the_baseline(name, tmp_path):
    cls, settings = recipe('baseline-small', backbone=name, weights='none', epochs=1, p=2, k=2, workers=0)
    crops = toy_crops(4, height=128)
    method = cls(settings, crops)
    before = copy.deepcopy(method.encoder.backbone.state_dict())
    log = fit(method, tmp_path / 'run', progress=False)
    assert log[-1]['images'] == 16 and all(r['loss'] == r['loss'] for r in log[:-1])
    now = method.encoder.backbone.state_dict()
    still = [k for k, p in method.encoder.backbone.named_parameters() if p.equal(before[k].to(p))]
    assert len(still) < len(before) / 10 and now.keys() == before.keys()
    loaded = load_model(tmp_path / 'run')
    assert loaded.settings.backbone == name
    with torch.no_grad(): assert torch.equal(loaded.embed(X), method.eval().embed(X))
