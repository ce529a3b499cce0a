"ICE, SpCL and CAP: one iteration against a literal transcription, every switch, bad epochs, resume, several processes."
import math
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import ice_child
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from children import agree, finish, plain, same, start, start_world
from reidnb.data.toys import toy_crops
from reidnb.practice.experiments import run_experiment
from reidnb.practice.opening import open_data
from reidnb.networks.memory import CameraProxyMemory, ClusterProxyMemory
from reidnb.methods.ice import ICE, ice_terms, ice_views, ICESettings
from reidnb.methods.proxies import CAP, CAPSettings, SpCL, SpCLSettings
from reidnb.core.checkpoints import load_checkpoint
from reidnb.core.checkpoints import seed_everything
from reidnb.training.loop import fit
from reidnb.training.settings import schedule
from reidnb.training.models import load_model, save_model
from reidnb.data.transforms import Views, method_transform

CHILD = Path(ice_child.__file__)
CLOCK = 'seconds', 'share'
SMALL = ice_child.SMALL | dict(keep=.9, eps=.5, epochs=2)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def small(crops=None, **changes):
    seed_everything(0)
    return ICE(ICESettings(**{**SMALL, **changes}), toy_crops(8, 2, 3) if crops is None else crops)


def unit(v): return v / v.norm().clamp(min=1e-12)


# ------------------------------------------------------------------------------ one iteration, METHODS 14.8

def transcribed(f, m, mw, y, cams, centers, camp, camp_y, camp_c):
    "The iteration of METHODS 14.8 with loops over images, clusters and proxies"
    B, K = len(f), len(centers)
    l1 = 0.
    for i in range(B):
        logits = torch.stack([f[i] @ centers[k] / .5 for k in range(K)])
        target = torch.full((K,), .1 / K)
        target[y[i]] += .9
        l1 += -(target * logits.log_softmax(0)).sum() / B
    l2 = 0.
    for c in cams.unique():
        rows, part = (cams == c).nonzero()[:, 0], 0.
        for i in rows:
            s = torch.stack([unit(f[i]) @ unit(p) / .07 for p in camp])
            pos = [j for j in range(len(camp)) if camp_y[j] == y[i]]
            neg = sorted((j for j in range(len(camp)) if camp_y[j] != y[i]), key=lambda j: -s[j].item())[:50]
            whole = s[pos + neg].logsumexp(0)
            part += sum(whole - s[j] for j in pos) / len(pos)
        l2 += .5 * part / len(rows)
    l3 = 0.
    for i in range(B):
        s = torch.stack([unit(f[i]) @ unit(m[j]) / .1 for j in range(B)])
        hardest = min((j for j in range(B) if y[j] == y[i]), key=lambda j: s[j].item())
        keep = [hardest] + [j for j in range(B) if y[j] != y[i]]
        l3 += (s[keep].logsumexp(0) - s[hardest]) / B
    l4 = 0.
    for i in range(B):
        p = torch.stack([unit(f[i]) @ unit(m[j]) / .4 for j in range(B)]).log_softmax(0)
        q = torch.stack([unit(mw[i]) @ unit(mw[j]) / .4 for j in range(B)]).softmax(0)
        l4 += 10 * (q * (q.log() - p)).sum() / B
    return dict(agnostic=l1, cross=l2, hard=l3, soft=l4)


def test_one_iteration_is_the_literal_transcription():
    method = small(k=3)
    batch = next(iter(method.epoch(0)))
    method.train()
    reference = small(k=3)
    reference.load_state_dict(method.state_dict(), strict=False)
    for name in ('agnostic', 'aware'): getattr(reference, name).load_state_dict(getattr(method, name).state_dict())
    reference.train()
    one, two, plain = batch.images
    f = reference.encoder(one)[1]
    with torch.no_grad(): m, mw = reference.momentum.net(two)[1], reference.momentum.net(plain)[1]
    y, cams = method.labels[batch.index], method.cams[batch.index]
    want = transcribed(f, m, mw, y, cams, method.agnostic.proxies, method.aware.proxies, method.aware.labels,
                       method.aware.cams)
    got = method(batch)
    assert got.keys() == want.keys()
    a, b = ({k: v.item() for k, v in terms.items()} for terms in (got, want))
    for k in a: assert abs(a[k] - b[k]) < 2e-4 * (1 + abs(b[k])), (k, a[k], b[k])
    sum(got.values()).backward(), sum(want.values()).backward()
    for (k, a), (_, b) in zip(method.encoder.named_parameters(), reference.encoder.named_parameters()):
        if a.grad is not None: assert torch.allclose(a.grad, b.grad, atol=1e-3 * (1 + float(b.grad.abs().max()))), k
    assert all(p.grad is None for p in method.momentum.parameters())
    old = {k: v.clone() for k, v in method.momentum.net.named_parameters()}
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], .1).step()
    method.after_step()
    for k, v in method.momentum.net.named_parameters():
        new = dict(method.encoder.named_parameters())[k]
        assert torch.allclose(v, .9 * old[k] + .1 * new, atol=1e-6), k


# ------------------------------------------------------------------------------ switches

@pytest.fixture(scope='module')
def fixed():
    "Features of a batch with several cameras, and proxies of more clusters than the batch holds"
    g = torch.Generator().manual_seed(0)
    N, D = 80, 12
    feats, labels, cams = F.normalize(torch.randn(N, D, generator=g), dim=1), torch.arange(N) % 10, torch.arange(N) // 10 % 4
    agnostic, aware = ClusterProxyMemory(D), CameraProxyMemory(D)
    agnostic.rebuild(feats, labels), aware.rebuild(feats, labels, cams)
    rows = torch.tensor([0, 10, 20, 30, 1, 11, 21, 1, 5, 15, 5, 5])
    f, m, third = (torch.randn(len(rows), D, generator=g) for _ in range(3))
    return dict(f=f, m=m, third=third, y=labels[rows], cams=cams[rows], agnostic=agnostic, aware=aware)


SWITCHES = [(dict(unit=True), {'agnostic'}), (dict(tau_a=1.), {'agnostic'}), (dict(smoothing=0.), {'agnostic'}),
            (dict(cross=1.), {'cross'}), (dict(tau_c=.1), {'cross'}), (dict(negatives=5), {'cross'}),
            (dict(own_camera=False), {'cross'}), (dict(joint=False), {'cross'}), (dict(sum_over_cameras=False), {'cross'}),
            (dict(hard=2.), {'hard'}), (dict(tau_h=.2), {'hard'}), (dict(hard_negatives='hardest'), {'hard'}),
            (dict(soft=5.), {'soft'}), (dict(tau_s=1.), {'soft'}), (dict(consistency='kl_pq'), {'soft'}),
            (dict(consistency='mse'), {'soft'})]


@pytest.mark.parametrize('change,terms', SWITCHES, ids=lambda x: '-'.join(x) if isinstance(x, dict) else '')
def test_a_switch_changes_its_term_and_no_other(fixed, change, terms):
    s = ICESettings()
    a, b = ice_terms(**fixed, s=s), ice_terms(**fixed, s=replace(s, **change))
    assert a.keys() == b.keys() == {'agnostic', 'cross', 'hard', 'soft'}
    assert {k for k in a if not torch.equal(a[k], b[k])} == terms


@pytest.mark.parametrize('change,gone', [(dict(hard=0.), 'hard'), (dict(soft=0.), 'soft'), (dict(cross=0.), 'cross')])
def test_a_weight_of_zero_drops_the_term(fixed, change, gone):
    a, b = ice_terms(**fixed, s=ICESettings()), ice_terms(**fixed, s=ICESettings(**change))
    assert a.keys() - b.keys() == {gone} and all(torch.equal(a[k], b[k]) for k in b)


def test_weights_scale_their_terms(fixed):
    a = ice_terms(**fixed, s=ICESettings())
    b = ice_terms(**fixed, s=ICESettings(cross=1.5, hard=3., soft=30.))
    for k in ('cross', 'hard', 'soft'): assert torch.allclose(b[k], 3 * a[k])


def test_switches_of_the_method():
    method = small(sampler='plain', target='strong')
    one, two, third = next(iter(method.epoch(0))).images
    plain = next(iter(small(sampler='plain').epoch(0))).images
    assert torch.equal(one, plain[0]) and torch.equal(two, plain[1]) and not torch.equal(third, plain[2])
    assert small(memory='agnostic').aware is None and small().aware is not None
    ibn = small(norm='ibn-a')
    assert any(type(m).__name__ == 'IBNa' for m in ibn.momentum.modules())
    assert not any(type(m).__name__ == 'IBNa' for m in small().momentum.modules())
    late = small(cross_from=1)
    batch = next(iter(late.epoch(0)))
    assert 'cross' not in late.train()(batch)
    assert 'cross' in late.train()(next(iter(late.epoch(1))))


@pytest.mark.parametrize('target,third', [('plain', 'ice-plain'), ('strong', 'ice')])
def test_views_are_those_of_the_recipe(target, third):
    "At the paper's settings the views are the pipelines of METHODS 0.3, draw for draw"
    image = toy_crops(1, 1, 1).image(0)
    for seed in range(5):
        torch.manual_seed(seed)
        ours = ice_views(ICESettings(target=target))(image)
        torch.manual_seed(seed)
        assert all(map(torch.equal, ours, Views(*map(method_transform, ('ice', 'ice', third)))(image)))


def test_recipe_of_the_paper():
    "METHODS 9.4"
    s = ICESettings()
    want = dict(height=256, width=128, p=8, k=4, optimizer='adam', weight_decay=5e-4, lr=3.5e-4, warmup=10, decay='none',
                epochs=40, iterations=400, keep=.999, k1=30, k2=6, eps=.55, min_samples=4, tau_a=.5, tau_c=.07, tau_h=.1,
                tau_s=.4, hard=1., soft=10., cross=.5, cross_from=0, negatives=50, smoothing=.1, pad=10, blur=.5,
                blur_radius=2., erase=.6, own_camera=True, joint=True, sum_over_cameras=True, consistency='kl_qp',
                statistics='own', unused_forwards=False, hard_negatives='all', target='plain', select='last', unit=False)
    assert {k: getattr(s, k) for k in want} == want
    assert schedule(0, s) == pytest.approx(.1) and schedule(10, s) == schedule(39, s) == 1


def test_ibn_weights_come_from_a_file_or_by_conversion(tmp_path):
    trained = small(norm='ibn-a').encoder.backbone
    safetensors.torch.save_file(trained.state_dict(), tmp_path / 'ibn.safetensors')
    again = small(norm='ibn-a', weights=str(tmp_path / 'ibn.safetensors'))
    for k, v in trained.state_dict().items(): assert torch.equal(v, again.encoder.backbone.state_dict()[k]), k
    converted, plain = (small(norm=n, weights='small').encoder.backbone for n in ('ibn-a', 'bn'))
    assert torch.equal(converted.conv1.weight, plain.conv1.weight)


def test_unused_forwards_touch_statistics_and_nothing_else():
    a, b = small(), small(unused_forwards=True)
    batch = next(iter(a.epoch(0)))
    next(iter(b.epoch(0)))
    x, y = a.train()(batch), b.train()(batch)
    assert all(torch.equal(x[k], y[k]) for k in x)
    bn = lambda m: m.momentum.net.neck.running_mean, lambda m: m.encoder.neck.running_mean
    assert all(not torch.equal(get(a), get(b)) for get in bn)


def test_samplers():
    crops = toy_crops(8, 3, 3)
    method = small(crops, k=3, truth=True)
    for batch in method.epoch(0):
        for y in method.labels[batch.index].unique():
            assert len(method.cams[batch.index][method.labels[batch.index] == y].unique()) == 3
    blind = small(crops.replace(cams=None), memory='agnostic', truth=True)   # strictly camera-free
    seen = small(crops, memory='agnostic', truth=True)
    rows = [[b.index.tolist() for b in m.epoch(0)] for m in (blind, seen)]
    assert rows[0] == rows[1], 'an agnostic run does not look at cameras'


class NoCameras:
    "Crops whose cameras nobody may read"
    def __init__(self, crops): self.__dict__['crops'] = crops
    def __len__(self): return len(self.crops)
    def __getattr__(self, name):
        if name in ('cams', 'n_cams', 'has_cams'): raise AssertionError(f'{name} was read')
        return getattr(self.crops, name)


@pytest.mark.parametrize('reads', [True, False])
def test_a_camera_free_run_never_reads_a_camera(reads):
    "Not in the sampler, not in the loss; camera-first sampling does, so the trap works"
    method = small(memory='agnostic', sampler='camera-first' if reads else 'auto')
    assert (method.cams == -1).all()
    method.labels.copy_(torch.from_numpy(method.crops.labels()))
    method.crops = NoCameras(method.crops)
    if reads:
        with pytest.raises(AssertionError, match='cams was read'): method.plan()
        return
    batches = method.plan().batches()
    assert all(len(b) == SMALL['p'] * SMALL['k'] for b in batches)
    ICE(ICESettings(**{**SMALL, 'memory': 'agnostic'}), NoCameras(toy_crops(8, 2, 3)))


def test_spoiled_cameras_change_no_agnostic_number(tmp_path):
    "Shuffled or absent: the loss of an agnostic run is the same to the last bit"
    toy = toy_crops(8, 2, 3)
    logs = []
    for n, cams in enumerate((toy.cams, np.random.default_rng(0).permutation(toy.cams), np.full(len(toy), -1))):
        log = fit(small(toy.replace(cams=cams), memory='agnostic'), tmp_path / str(n), progress=False)
        logs.append([r['loss'] for r in log if 'loss' in r])
    assert logs[0] == logs[1] == logs[2]


def test_wrong_cameras_change_proxies_and_no_label(tmp_path):
    "Clusters never look at cameras; a run with wrong ones goes on with other proxies"
    toy = toy_crops(8, 2, 3)
    wrong = toy.replace(cams=np.random.default_rng(0).permutation(toy.cams))
    a, b = small(toy), small(wrong)
    next(iter(a.epoch(0))), next(iter(b.epoch(0)))
    assert torch.equal(a.labels, b.labels) and torch.equal(a.agnostic.proxies, b.agnostic.proxies)
    assert a.aware.proxies.shape != b.aware.proxies.shape or not torch.equal(a.aware.proxies, b.aware.proxies)
    assert all(math.isfinite(r['loss']) for r in fit(small(wrong), tmp_path, progress=False) if 'loss' in r)


def test_truth_trains_on_people(tmp_path):
    toy = toy_crops(8, 2, 3)
    order = np.random.default_rng(0).permutation(len(toy))
    method = small(toy[order], truth=True)
    log = fit(method, tmp_path, progress=False)
    assert np.array_equal(method.labels.numpy(), toy[order].labels()) and len(method.agnostic.proxies) == 8
    facts = [r for r in log if 'images' in r]
    assert all(r['clusters'] == 8 and r['outliers'] == 0 and r['purity'] == 1 and 'eps' not in r for r in facts)
    for n in range(8):
        mean = method.label().features[method.labels == n].mean(0)
        assert mean.norm() <= 1 + 1e-5, 'a proxy is a mean of unit rows, not a unit row'


# ------------------------------------------------------------------------------ METHODS 13

def test_exact_checks(fixed):
    D = fixed['f'].shape[1]
    s = ICESettings()
    same = ice_terms(**{**fixed, 'm': fixed['f'], 'third': fixed['f']}, s=s)
    assert abs(float(same['soft'])) < 1e-5, 'P equals Q'
    flat = torch.ones(12, D)
    y = torch.arange(3).repeat_interleave(4)
    got = ice_terms(**{**fixed, 'f': flat, 'm': flat, 'third': flat, 'y': y}, s=s)
    assert abs(float(got['hard']) - math.log(8 + 1)) < 1e-4
    one_camera = CameraProxyMemory(D)
    one_camera.rebuild(torch.randn(20, D), torch.arange(20) % 5, torch.zeros(20, dtype=torch.long))
    y, cams = torch.arange(12) % 5, torch.zeros(12, dtype=torch.long)
    got = ice_terms(**{**fixed, 'y': y, 'cams': cams, 'aware': one_camera}, s=replace(s, own_camera=False))
    assert float(got['cross']) == 0
    for p in (*fixed['agnostic'].buffers(), *fixed['aware'].buffers()): assert not p.requires_grad
    f, m, third = (fixed[k].clone().requires_grad_() for k in ('f', 'm', 'third'))
    sum(ice_terms(**{**fixed, 'f': f, 'm': m, 'third': third}, s=s).values()).backward()
    assert f.grad.abs().sum() > 0 and m.grad is None and third.grad is None


# ------------------------------------------------------------------------------ bad epochs and bad data

def test_cameras_unknown():
    crops = toy_crops(8, 2, 3)
    with pytest.raises(ValueError, match="48 of 48 crops of 'toy' have no camera.*memory='agnostic'"):
        small(crops.replace(cams=None), memory='aware')
    with pytest.warns(UserWarning, match='goes on without camera proxies'): method = small(crops.replace(cams=None))
    assert method.aware is None
    terms = method.train()(next(iter(method.epoch(0))))
    assert terms.keys() == {'agnostic', 'hard', 'soft'} and all(v.isfinite() for v in terms.values())
    cams = crops.cams.copy()
    cams[3] = -1
    with pytest.warns(UserWarning, match='1 of 48'): small(crops.replace(cams=cams))


def test_no_labels_needed_and_truth_needs_them():
    crops = toy_crops(8, 2, 3)
    method = small(crops.replace(pids=None))
    assert method.train()(next(iter(method.epoch(0)))) and 'purity' not in method.facts and 'people' not in method.facts
    with pytest.raises(ValueError, match='truth=True needs'): small(crops.replace(pids=None), truth=True)
    with pytest.raises(ValueError, match='no crops'): small(crops[:0])


def test_hidden_people_change_no_label():
    "The statistics may look at people, the labels may not"
    crops = toy_crops(8, 2, 3)
    a, b = small(crops), small(crops.replace(pids=np.random.default_rng(0).permutation(crops.pids)))
    assert torch.equal(a.label().labels, b.label().labels)


@pytest.mark.parametrize('case', ['noise', 'one cluster', 'few clusters', 'one camera', 'one image', 'tiny'])
def test_bad_epochs_are_handled(case, tmp_path):
    toy = toy_crops(8, 2, 3)
    crops, changes = {
        'noise': (toy, dict(eps=1e-6)), 'one cluster': (toy[toy.pids == 1], dict(min_samples=2)),
        'few clusters': (toy, dict(p=16)), 'one camera': (toy.replace(cams=np.zeros(len(toy))), {}),
        'one image': (toy_crops(24, 1, 1), dict(min_samples=2)),
        'tiny': (toy[:5], dict(k1=30, min_samples=2))}[case]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        method = small(crops, **changes)
        log = fit(method, tmp_path, progress=False)
    assert all(math.isfinite(r['loss']) for r in log if 'loss' in r) and [r for r in log if 'loss' in r]
    if case != 'one camera': assert any('clusters' in str(w.message) or 'people' in str(w.message) for w in said), case


def test_labels_are_kept_when_an_epoch_fails():
    method = small()
    list(method.epoch(0))
    first = method.labels.clone()
    method.settings = replace(method.settings, eps=1e-6)
    with pytest.warns(UserWarning, match='earlier labels kept'): next(iter(method.epoch(1)))
    assert torch.equal(method.labels, first) and method.facts['kept'] == 1 and method.facts['eps'] == .5


def test_nothing_near_anything_is_said():
    with pytest.raises(ValueError, match='lower min_samples or give more crops'): next(iter(small(min_samples=49).epoch(0)))


# ------------------------------------------------------------------------------ runs

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A function that gives the folder of a run of three epochs that nobody stopped"
    out = tmp_path_factory.mktemp('runs')
    def folder(name):
        if not (out / name).exists(): finish(start(CHILD, name, out / name, 3))
        return out / name
    return folder


SLOW = pytest.mark.slow   # every child process imports torch: the rest is for --slow


@pytest.mark.parametrize('name', ['ice', 'spcl', pytest.param('cap', marks=SLOW)])
def test_killed_and_resumed_equals_never_stopped(whole, tmp_path, name):
    out = tmp_path / 'killed'
    finish(start(CHILD, name, out, 3, 6), -signal.SIGKILL)
    assert (out / 'checkpoint.pt').exists() and not (out / 'model.safetensors').exists()
    finish(start(CHILD, name, out, 3))
    assert plain(out, CLOCK) == plain(whole(name), CLOCK)
    a, b = (safetensors.torch.load_file(d / 'model.safetensors') for d in (whole(name), out))
    assert same(a, b)
    a, b = (load_checkpoint(d / 'checkpoint.pt') for d in (whole(name), out))
    for key in ('optimizers', 'method', 'rng', 'epoch', 'step'): assert same(a[key], b[key]), key


@pytest.mark.parametrize('name', ['ice', pytest.param('spcl', marks=SLOW), pytest.param('cap', marks=SLOW)])
def test_two_processes_equal_one(tmp_path, name):
    "The same labels, the gradient and every term of every step; `cap` sees its second epoch, where cameras meet"
    one, two, epochs = tmp_path / 'one', tmp_path / 'two', 2 if name == 'cap' else 1
    finish([start(CHILD, name, one, epochs, 'still'), *start_world(CHILD, name, two, epochs, 'still')])
    agree(one, two, 4 * epochs)
    for a, b in zip(plain(one, CLOCK), plain(two, CLOCK)):
        if 'images' in a:
            alone, pair = ({k: v for k, v in r.items() if k not in ('kl', 'teacher_distance')} for r in (a, b))
            assert alone == pair, 'labels'


def test_bf16_is_finite(tmp_path):
    for name in ice_child.METHODS:
        method = ice_child.build(name, 1, precision='bf16', iterations=2, inter_from=0) if name == 'cap' else \
            ice_child.build(name, 1, precision='bf16', iterations=2)
        log = fit(method, tmp_path / name, progress=False)
        assert all(math.isfinite(v) for r in log for v in r.values() if isinstance(v, float))


def test_the_model_file_holds_the_momentum_encoder_alone(tmp_path):
    method = small()
    batch = next(iter(method.epoch(0)))
    sum(method.train()(batch).values()).backward()
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], .1).step()
    method.after_step()
    path = save_model(method, tmp_path / 'm.safetensors')
    names = safetensors.torch.load_file(path).keys()
    assert names and all(k.startswith('momentum.') for k in names)
    again, x = load_model(path), batch.images[2]
    assert torch.equal(again.embed(x), method.eval().embed(x))
    assert torch.allclose(again.embed(x).norm(dim=1), torch.ones(len(x)))
    online = F.normalize(method.encoder(x)[1], dim=1)
    assert not torch.allclose(again.embed(x), online, atol=1e-3), 'the test feature is not the online one'


@pytest.mark.parametrize('cameras', [True, False])
def test_unlabelled_crops_of_a_folder_or_a_table(tmp_path, cameras):
    "What `reidnb train ice --data ...` opens: a flat folder, or a table of paths and cameras"
    toy = toy_crops(8, 2, 3)
    for i, image in enumerate(toy.images): (tmp_path / f'{i:03d}.jpg').write_bytes(image)
    source = tmp_path
    if cameras:
        source = tmp_path / 'crops.csv'
        source.write_text('path,cam\n' + ''.join(f'{i:03d}.jpg,{c}\n' for i, c in enumerate(toy.cams)))
    data = open_data(source)
    assert not data.train.labelled and data.train.has_cams == cameras
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        result = run_experiment('ice', data, tmp_path / 'run', ICESettings(**SMALL))
    assert any('without camera proxies' in str(w.message) for w in said) != cameras
    assert result.metrics is None and (tmp_path / 'run' / 'model.safetensors').exists()
    assert ('cross' in result.log[0]) == cameras
    rows = [r for r in result.log if 'images' in r]
    assert all({'clusters', 'outliers', 'eps', 'kl', 'teacher_distance', 'seconds_features', 'share_labelling'} <= r.keys() for r in rows)
    assert not any('purity' in r for r in rows)


# ------------------------------------------------------------------------------ SpCL and CAP

def test_spcl_memory_and_outliers():
    method = ice_child.build('spcl', 2, eps=.3)
    batches = list(method.epoch(0))
    outliers = int((method.labels < 0).sum())
    assert outliers and method.memory.labels.max() + 1 == method.labels.max() + 1 + outliers
    assert any((method.labels[b.index] < 0).any() for b in batches), 'outliers are trained on'
    for b in batches: assert all(n == 2 for n in torch.unique(method.memory.labels[b.index], return_counts=True)[1])
    rows, batch = method.memory.rows.clone(), batches[0]
    terms = method.train()(batch)
    assert 0 < float(terms['hybrid'].detach()) < 20
    assert torch.equal(rows, method.memory.rows), 'the memory changes after the step'
    method.after_batch(batch)
    moved = (rows != method.memory.rows).any(1)
    assert set(moved.nonzero()[:, 0].tolist()) == set(batch.index.tolist())
    assert torch.allclose(method.memory.rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)


def test_spcl_thresholds_are_set_once():
    method = ice_child.build('spcl', 2)
    next(iter(method.epoch(0)))
    first = method.thresholds.clone()
    assert not first.isnan().any()
    method.memory.rows.copy_(F.normalize(torch.randn_like(method.memory.rows), dim=1))
    next(iter(method.epoch(1)))
    assert torch.equal(method.thresholds, first)


def test_spcl_without_any_cluster_trains_on_single_crops(tmp_path):
    method = ice_child.build('spcl', 1, eps=.021, gap=.02)
    fit(method, tmp_path, progress=False)
    assert method.facts['clusters'] == 0 and method.facts['outliers'] == len(method.crops)


def test_cap_terms_and_updates():
    method = ice_child.build('cap', 2)
    batch = next(iter(method.epoch(0)))
    assert method.train()(batch).keys() == {'intra'}
    batch = next(iter(method.epoch(1)))
    assert method.train()(batch).keys() == {'intra', 'inter'}
    before = method.memory.proxies.clone()
    method.after_batch(batch)
    touched = method.memory.index(method.labels[batch.index], method.cams[batch.index]).unique()
    moved = (before != method.memory.proxies).any(1).nonzero()[:, 0]
    assert set(moved.tolist()) == set(touched.tolist())
    with pytest.raises(ValueError, match='CAP needs it'):
        CAP(CAPSettings(**ice_child.SMALL), toy_crops(4, 2, 2).replace(cams=None))


@pytest.mark.parametrize('name', ['spcl', 'cap'])
@pytest.mark.parametrize('case', ['noise', 'one cluster', 'one camera', 'one image', 'tiny'])
def test_baselines_survive_bad_epochs(name, case, tmp_path):
    "The edge row of METHODS 13: a run ends, and its loss is a number"
    toy = toy_crops(8, 2, 3)
    crops, changes = {
        'noise': (toy, dict(eps=.0201)), 'one cluster': (toy[toy.pids == 1], dict(min_samples=2)),
        'one camera': (toy.replace(cams=np.zeros(len(toy))), {}),
        'one image': (toy_crops(24, 1, 1), dict(min_samples=2)), 'tiny': (toy[:5], dict(k1=30, min_samples=2))}[case]
    cls, settings = (SpCL, SpCLSettings) if name == 'spcl' else (CAP, CAPSettings)
    seed_everything(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        s = settings(**{**ice_child.SMALL, 'epochs': 2, 'iterations': 2, **changes})
        log = fit(cls(s, crops), tmp_path, progress=False)
    losses = [r['loss'] for r in log if 'loss' in r]
    assert losses and all(map(math.isfinite, losses))


@pytest.mark.parametrize('name', ['ice', 'spcl', 'cap'])
def test_every_batch_has_p_classes_of_k(name):
    "The sampler row of METHODS 13, also where the classes do not fill whole batches"
    method = ice_child.build(name, 1, p=3, k=2)
    for batch in method.epoch(0):
        y = method.memory.labels if name == 'spcl' else method.labels
        assert torch.unique(y[batch.index], return_counts=True)[1].tolist() == [2] * 3


def test_proxies_carry_no_gradient():
    for name in ('spcl', 'cap'):
        method = ice_child.build(name, 2, inter_from=0) if name == 'cap' else ice_child.build(name, 2)
        batch = next(iter(method.epoch(0)))
        sum(method.train()(batch).values()).backward()
        assert all(b.grad is None and not b.requires_grad for b in method.memory.buffers())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())


def test_methods_for_use_only_know_no_crops():
    for cls, s in ((ICE, ICESettings), (SpCL, SpCLSettings), (CAP, CAPSettings)):
        method = cls(s(**ice_child.SMALL))
        assert method.eval().embed(torch.randn(2, 3, 64, 32)).shape == (2, 192)
        assert not any(k.startswith(cls.training_only) for k in method.state_dict() if k.startswith(('memory', 'labels')))
