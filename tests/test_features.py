"""Properties and faults of transforms, samplers, weights, backbones and extraction."""
import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from reidnb.networks import backbones as B
from reidnb.networks import extraction as X
from reidnb.networks import weights as W
from reidnb.data import samplers as S
from reidnb.data import transforms as R
from reidnb.data.items import CropDataset
from reidnb.data.toys import toy_crops

torch.set_num_threads(1)
QUIET = settings(max_examples=60, deadline=None)


# --- transforms --------------------------------------------------------------------------------
@QUIET
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 80), st.integers(1, 60), st.integers(0, 2**31))
def test_any_crop_gives_the_size_asked(h, w, height, width, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))
    torch.manual_seed(seed)
    for t in (R.test_transform(height, width), R.train_transform(height, width)):
        x = t(image)
        assert x.shape == (3, height, width) and x.dtype == torch.float32 and x.isfinite().all()


@QUIET
@given(st.floats(.01, .9), st.floats(.01, .9), st.floats(.1, 8), st.floats(.1, 8), st.integers(2, 300),
       st.integers(2, 300), st.integers(0, 2**31))
def test_erased_box_lies_inside_and_has_its_size(a1, a2, r1, r2, H, W, seed):
    area, aspect = sorted((a1, a2)), sorted((r1, r2))
    torch.manual_seed(seed)
    box = R.RandomErasing(1, area, aspect).box(H, W)
    if box is None: return
    top, left, h, w = box
    assert 0 <= top <= H-h and 0 <= left <= W-w and 0 < h < H and 0 < w < W
    rounding = lambda v, side: abs(v-side) <= .5+1e-9
    low, high = area[0]*H*W, area[1]*H*W
    assert rounding(h, np.clip(h, math.sqrt(low*aspect[0]), math.sqrt(high*aspect[1])))
    assert rounding(w, np.clip(w, math.sqrt(low/aspect[1]), math.sqrt(high/aspect[0])))


@pytest.mark.parametrize('p', [.1, .5, .6, 1.])
def test_share_of_erased_images(p):
    torch.manual_seed(0)
    n, x, erase = 1500, torch.zeros(3, 32, 16), R.RandomErasing(p, value=1)
    share = sum(bool(erase(x).any()) for _ in range(n))/n
    assert abs(share-p) <= 4*math.sqrt(p*(1-p)/n)


def test_erased_boxes_follow_an_independent_simulation():
    "Oracle: the table's law with rejection, in numpy; compared by a two-sample test"
    from scipy.stats import ks_2samp
    rng, H, W_ = np.random.default_rng(0), 256, 128
    a, r = rng.uniform(.02, .4, 20000)*H*W_, rng.uniform(.3, 1/.3, 20000)
    h, w = np.round(np.sqrt(a*r)), np.round(np.sqrt(a/r))
    ok = (h < H) & (w < W_)
    torch.manual_seed(0)
    erase = R.RandomErasing()
    boxes = np.array([erase.box(H, W_) for _ in range(2500)])
    for mine, theirs in ((boxes[:, 2], h[ok]), (boxes[:, 3], w[ok]), (boxes[:, 2]*boxes[:, 3], (h*w)[ok])):
        assert ks_2samp(mine, theirs).pvalue > .001
    assert ks_2samp(boxes[:, 0]/(H-boxes[:, 2]), rng.uniform(size=5000)).pvalue > .001


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    crops = toy_crops(3, n_cams=1, n_each=2)
    a, b = (CropDataset(crops, R.train_transform(64, 32), seed=5) for _ in range(2))
    first = [a[i][0] for i in range(6)]
    assert all(torch.equal(b[i][0], first[i]) for i in (4, 0, 5))
    a.set_epoch(1)
    assert not all(torch.equal(a[i][0], first[i]) for i in range(6))


# --- samplers ----------------------------------------------------------------------------------
people = st.lists(st.integers(-2, 12), min_size=1, max_size=80).filter(lambda x: max(x) > 0)


def pk(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return S.PKSampler(*args, **kwargs)


@QUIET
@given(people, st.integers(1, 6), st.integers(1, 5), st.sampled_from(['exhaustive', 'one-pass']),
       st.integers(0, 5), st.integers(0, 3))
def test_each_batch_is_p_people_with_k_crops(pids, p, k, mode, seed, epoch):
    pids = np.array(pids)
    s = pk(pids, p, k, mode=mode, seed=seed)
    s.set_epoch(epoch)
    n_ids, batches = len(np.unique(pids[pids > 0])), list(s)
    assert len(batches) == len(s) >= 1
    for b in batches:
        ids, counts = np.unique(pids[b], return_counts=True)
        assert len(ids) == min(p, n_ids) and (counts == k).all() and (ids > 0).all()
        assert (np.reshape(pids[b], (-1, k)) == np.reshape(pids[b], (-1, k))[:, :1]).all()
        for i in ids:  # no repeats unless the person has too few crops, and then all of them
            rows = np.array(b)[pids[b] == i]
            assert len(set(rows)) == min(k, (pids == i).sum())
    used = np.concatenate(batches)
    enough = np.isin(used, np.flatnonzero(np.isin(pids, [i for i in range(1, 13) if (pids == i).sum() >= k])))
    assert len(set(used[enough])) == enough.sum()  # a pass repeats no crop of a person with enough
    assert list(s.shard(0, 1)) == batches


@QUIET
@given(people, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_shards_partition_each_batch(pids, p, k, world, epoch_size, labels):
    s = pk(pids, p*world, k, epoch_size=epoch_size, first=0 if labels else 1)
    size = s.p*k
    if size % world:
        with pytest.raises(ValueError, match='processes'): list(s.shard(0, world))
        return
    parts = [list(s.shard(r, world)) for r in range(world)]
    assert len(s) == epoch_size
    for b, *pieces in zip(s, *parts):
        assert [i for x in pieces for i in x] == b and {len(x) for x in pieces} == {size//world}
        if s.p % world == 0:
            ids = [set(np.array(pids)[x]) for x in pieces]
            assert sum(map(len, ids)) == len(set.union(*ids))


@QUIET
@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(1, 4), st.integers(0, 4))
def test_shuffled_epochs_cover_the_crops(n, b, drop_last, world, epoch):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        s = S.ShuffleSampler(n, b*world, drop_last=drop_last)
    s.set_epoch(epoch)
    if s.batch_size % world:
        return
    parts = [list(s.shard(r, world)) for r in range(world)]
    seen = [i for batches in zip(*parts) for piece in batches for i in piece]
    assert len({len(x) for x in zip(*[map(len, p) for p in parts])} | {0}) <= 2
    assert all(len(set(map(len, step))) == 1 for step in zip(*parts)) and seen
    assert set(seen) <= set(range(n))
    if drop_last: assert len(seen) == len(set(seen)) == n//s.batch_size*s.batch_size
    else: assert set(seen) == set(range(n)) and len(seen) < n+world


def test_epochs_differ_and_do_not_touch_the_global_state():
    s = pk(np.repeat(np.arange(1, 30), 5), 4, 2)
    torch.manual_seed(0); np.random.seed(0)
    a, b = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    epochs = []
    for e in range(3): s.set_epoch(e); epochs.append(list(s))
    assert epochs[0] != epochs[1] != epochs[2]
    assert torch.equal(a, torch.random.get_rng_state()) and (b == np.random.get_state()[1]).all()


@pytest.mark.parametrize('seed', [0, 7])
def test_a_loader_with_workers_gives_the_same_batches(seed):
    crops, s = toy_crops(6, n_cams=2), pk(toy_crops(6, n_cams=2).pids, 3, 2, seed=seed)
    def rows(workers):
        data = CropDataset(crops, R.train_transform(32, 16), seed=1)
        loader = torch.utils.data.DataLoader(data, batch_sampler=s, num_workers=workers)
        return [(i.tolist(), x.sum().item()) for x, i in loader]
    assert rows(0) == rows(2)


# --- weights -----------------------------------------------------------------------------------
@pytest.mark.parametrize('cut', [0, 1, 100, .3, .9, -1])
@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_damaged_files_are_named(tmp_path, cut, kind):
    state, path = B.SmallNet((4, 8, 8, 8)).state_dict(), tmp_path/f'w.{kind}'
    torch.save(state, path) if kind == 'pth' else save_file(state, path)
    data = path.read_bytes()
    path.write_bytes(data[:int(cut*len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(ValueError, match=rf'w\.{kind}: no readable weights'): W.read_weights(path)


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save({'state_dict': {'a': torch.ones(1)}, 'x': Evil()}, tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='could run code'): W.read_weights(tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()


def test_old_torch_file_format(tmp_path):
    torch.save({'a': torch.arange(3.)}, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    assert torch.equal(W.read_weights(tmp_path/'old.pth')['a'], torch.arange(3.))


@QUIET
@given(st.lists(st.sampled_from(['module.', 'model.', 'backbone.', 'encoder.', '_orig_mod.']), max_size=4))
def test_wrappers_do_not_matter(prefixes):
    a, b = B.SmallNet((4, 8, 8, 8)), B.SmallNet((4, 8, 8, 8))
    report = W.load_weights(b, {''.join(prefixes)+k: v for k, v in a.state_dict().items()})
    assert report.complete and not report.unexpected
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_an_encoder_goes_back_into_a_trunk_and_a_trunk_into_an_encoder(tmp_path):
    enc = B.Encoder(B.make_backbone('small'))
    torch.save({'model': {f'module.encoder.{k}': v for k, v in enc.state_dict().items()}}, tmp_path/'e.pth')
    net = B.make_backbone('small', weights=tmp_path/'e.pth')
    assert torch.equal(net.layer4[0].conv2.weight, enc.backbone.layer4[0].conv2.weight)
    assert all('neck' in k for k in net.report.unexpected)
    report = W.load_weights(B.Encoder(B.make_backbone('small')), net.state_dict())
    assert all(k.startswith('neck') for k in report.missing)


# --- backbones ---------------------------------------------------------------------------------
@pytest.mark.parametrize('name,channels', [
    ('resnet18', 512), ('resnet34', 512), ('resnet50', 2048), ('mobilenet_v2', 1280),
    ('efficientnet_b0', 1280), ('small', 192)])
def test_map_shapes(name, channels):
    x = torch.zeros(1, 3, 256, 128)
    for last_stride, shape in ((1, (16, 8)), (2, (8, 4))):
        net = B.make_backbone(name, last_stride=last_stride).eval()
        with torch.inference_mode(): y = net(x)
        assert y.shape == (1, channels, *shape) and net.channels == channels and net.stride == 256//shape[0]


@pytest.mark.parametrize('name', ['resnet101', 'resnet152', 'efficientnet_b1'])
def test_big_networks_build(name):
    net = B.make_backbone(name, cut_at='layer3').eval()
    with torch.inference_mode(): y = net(torch.zeros(1, 3, 64, 32))
    assert y.shape == (1, net.channels, 4, 2) and net.stride == 16


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'small'])
def test_every_cut_agrees_with_its_description(name):
    for cut in ('stem', 'layer1', 'layer2', 'layer3', 'layer4'):
        net = B.make_backbone(name, cut_at=cut).eval()
        with torch.inference_mode(): y = net(torch.zeros(1, 3, 64, 32))
        assert y.shape == (1, net.channels, 64//net.stride, 32//net.stride)


def test_resnet50_equals_torchvision_in_every_bit():
    whole = torchvision.models.resnet50(weights=None).eval()
    x = torch.randn(2, 3, 128, 64)
    net = B.make_backbone('resnet50', last_stride=2, weights=whole.state_dict()).eval()
    assert net.report.complete and net.report.unexpected == ['fc.weight', 'fc.bias']
    with torch.inference_mode(): assert torch.equal(net(x), nn.Sequential(*list(whole.children())[:-2])(x))
    assert B.make_backbone('resnet50', cut_at='layer3').channels == 1024


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'small'])
@pytest.mark.parametrize('frozen', [0, 1, 3, 5])
def test_frozen_stages_keep_every_number(name, frozen):
    enc = B.Encoder(B.make_backbone(name, frozen_stages=frozen)).train()
    before = copy.deepcopy(enc.backbone.state_dict())
    trained = [p for p in enc.parameters() if p.requires_grad]
    f, neck = enc(torch.randn(4, 3, 64, 32))
    (f.square().mean()+neck.mean()+f.mean()).backward()
    torch.optim.SGD(trained, lr=.1, weight_decay=.1).step()
    frozen_keys = tuple(k+'.' for s in enc.backbone.stages[:frozen] for k in s)
    for k, v in enc.backbone.state_dict().items():
        same = torch.equal(v, before[k])
        assert same if k.startswith(frozen_keys) else not same, k
    enc.eval().train()
    assert [m.training for m in enc.backbone.modules_of(0)] == [frozen == 0]*len(enc.backbone.modules_of(0))


def test_copies_and_saved_states_are_the_same_encoder():
    enc = B.Encoder(B.make_backbone('small', frozen_stages=2), pooling='gem').eval()
    x = torch.randn(2, 3, 64, 32)
    other = B.Encoder(B.make_backbone('small'), pooling='gem').eval()
    other.load_state_dict(enc.state_dict())
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(enc).embed(x), enc.embed(x))
        assert torch.equal(other.embed(x), enc.embed(x))


@QUIET
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_pools_are_ordered(b, c, h, w, seed):
    x = torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed))+.01
    gap, gem, gmp = (B.GlobalPool(k)(x) for k in ('gap', 'gem', 'gmp'))
    assert (gap <= gem+1e-5).all() and (gem <= gmp+1e-5).all()
    assert torch.allclose(B.GlobalPool('gem', p=1)(x), gap, atol=1e-5)


def test_a_feature_does_not_depend_on_its_batch():
    enc, x = B.Encoder(B.make_backbone('resnet18')).eval(), torch.randn(5, 3, 64, 32)
    with torch.inference_mode():
        assert torch.allclose(torch.cat([enc.embed(x[i:i+1]) for i in range(5)]), enc.embed(x), atol=1e-5)
        assert torch.allclose(enc.embed(x).norm(dim=1), torch.ones(5), atol=1e-6)


# --- extraction --------------------------------------------------------------------------------
def test_workers_batches_and_modes_do_not_change_features():
    enc, crops = B.Encoder(B.make_backbone('small', frozen_stages=2)).train(), toy_crops(5, n_cams=2)
    modes = [m.training for m in enc.modules()]
    f = X.extract(enc, crops, height=64, width=32)
    assert torch.allclose(f, X.extract(enc, crops, height=64, width=32, workers=2, batch_size=3), atol=1e-5)
    assert modes == [m.training for m in enc.modules()]
    (f*nn.Parameter(torch.ones(192))).sum().backward()  # an ordinary tensor, not one of inference mode


def test_modes_come_back_after_an_error(tmp_path):
    enc, crops = B.Encoder(B.make_backbone('small')).train(), toy_crops(2)
    broken = crops.replace(images=[crops.images[0], b'no image', *crops.images[2:]])
    with pytest.raises(ValueError, match='#1'): X.extract(enc, broken, height=64, width=32)
    assert enc.training and enc.neck.training


def test_weights_that_are_not_numbers_name_the_first_image():
    enc, crops = B.Encoder(B.make_backbone('small')), toy_crops(2)
    with torch.no_grad(): enc.neck.weight[0] = float('nan')
    with pytest.raises(ValueError, match=r'image #0 \(row 0\) is not finite, as are 8 of 8'):
        X.extract(enc, crops, height=64, width=32)


@pytest.mark.cuda
def test_features_on_a_gpu_equal_those_on_the_cpu():
    enc, crops = B.Encoder(B.make_backbone('resnet18')), toy_crops(4)
    cpu, gpu = (X.extract(enc, crops, height=64, width=32, device=d) for d in ('cpu', 'cuda'))
    assert gpu.device.type == 'cpu' and torch.allclose(cpu, gpu, atol=2e-2)
