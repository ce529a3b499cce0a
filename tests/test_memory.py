"Memories and teachers: equal to literal loops for any batch, the same in every process, whole after a checkpoint."
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from children import finish, same, start_world
from reidnb.networks.memory import (
    CameraProxyMemory, ClassMapMemory, ClusterProxyMemory, ExemplarMemory, HybridMemory,
    keep_schedule)
from reidnb.networks.teacher import ema_rate, EMATeacher

CHILD = Path(__file__).parent / 'memory_child.py'
fuzz = settings(max_examples=40, deadline=None)


def slow_update(rows, f, index, keep, unit=True):
    "One sample after the other"
    rows = rows.double().clone()
    for i, x in zip(index.tolist(), f.double()):
        if i < 0 or keep == 1: continue
        v = keep * rows[i] + (1 - keep) * x
        rows[i] = v / max(v.norm().item(), 1e-12) if unit else v
    return rows.float()


def close(a, b, tol=2e-5): torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@st.composite
def batches(draw, rows=st.integers(1, 6)):
    "Number of rows, dimension, indices with -1 and repetitions, features with equal and zero rows"
    n, d, b = draw(rows), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    index = torch.tensor(draw(st.lists(st.integers(-1, n - 1), min_size=b, max_size=b)), dtype=torch.long)
    f = torch.randn(b, d, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if b and draw(st.booleans()): f[-1] = 0
    if b > 1 and draw(st.booleans()): f[1] = f[0]
    return n, d, index, f


@st.composite
def clusterings(draw):
    "Features, gapless labels with outliers, cameras"
    k = draw(st.integers(1, 4))
    y = draw(st.permutations([*range(k), *draw(st.lists(st.integers(-1, k - 1), max_size=14))]))
    d, g = draw(st.integers(1, 5)), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    cams = torch.randint(0, draw(st.integers(1, 4)), (len(y),), generator=g)
    return torch.randn(len(y), d, generator=g), torch.tensor(y), cams


keeps = st.sampled_from([0., .01, .2, .5, .59, .9, 1.])


@fuzz
@given(batches(), keeps, st.booleans(), st.integers(0, 99))
def test_exemplar_is_the_loop(case, keep, unit, seed):
    n, d, index, f = case
    mem = ExemplarMemory(n, d, unit)
    mem.fill(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    before = mem.rows.clone()
    mem.update(f, index, keep=keep)
    # where old and new cancel, the direction of the sum is rounding: compare only rows that stay away from zero
    want = slow_update(before, f, index, keep, unit)
    assert mem.rows.isfinite().all()
    close(mem.rows, want, 1e-3)
    untouched = torch.tensor([i not in index.tolist() for i in range(n)])
    assert torch.equal(mem.rows[untouched], before[untouched])
    if keep == 1: assert torch.equal(mem.rows, before)


@fuzz
@given(batches(), st.permutations(range(12)))
def test_order_matters_only_within_a_row(case, order):
    "Moving samples of different rows past each other changes nothing"
    n, d, index, f = case
    order = torch.tensor(sorted(range(len(index)), key=lambda i: (order[index[i]], i)), dtype=torch.long)
    a, b = ExemplarMemory(n, d), ExemplarMemory(n, d)
    a.update(f, index, keep=.5)
    b.update(f[order], index[order], keep=.5)
    assert torch.equal(a.rows, b.rows)


@fuzz
@given(batches(), keeps)
def test_class_maps(case, keep):
    n, d, y, f = case
    f = f.view(-1, 1, d).expand(-1, 2, d)
    mem, maps, seen = ClassMapMemory(n, (2, d), keep), torch.zeros(n, 2, d), torch.zeros(n, dtype=torch.bool)
    for half in (slice(0, len(y) // 2), slice(len(y) // 2, None)):
        mem.update(f[half], y[half])
        for i, x in zip(y[half].tolist(), f[half]):
            if i < 0: continue
            maps[i] = keep * maps[i] + (1 - keep) * x if seen[i] else x
            seen[i] = True
    close(mem.maps, maps)
    assert torch.equal(mem.seen, seen)


@fuzz
@given(clusterings(), st.sampled_from([.05, .5]))
def test_hybrid_is_the_mean_of_similarities(case, tau):
    features, y, _ = case
    mem = HybridMemory(len(y), features.shape[1])
    mem.rebuild(features, y)
    n = int(y.max()) + 1
    assert torch.equal(mem.labels[y >= 0], y[y >= 0])
    assert mem.labels[y < 0].tolist() == list(range(n, n + int((y < 0).sum())))
    f = features[:3]
    sims = F.normalize(features, dim=1) @ f.T / tau
    want = torch.stack([sims[mem.labels == c].mean(0) for c in range(int(mem.labels.max()) + 1)]).T
    close(mem.class_logits(f, tau), want, 1e-4)
    close(f @ mem.centroids().T / tau, want, 1e-4)
    x = f.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mem.class_logits(x, tau), x)
    mem.to(torch.float16)
    assert torch.equal(mem.labels[mem.order], mem.labels.sort().values) and torch.equal(mem.counts, mem.labels.bincount())


def test_a_refused_rebuild_changes_nothing():
    mem = HybridMemory(4, 2)
    mem.rebuild(torch.randn(4, 2), torch.tensor([0, 0, -1, 1]))
    before = copy.deepcopy(mem.state_dict())
    for f, y in ((4, [0, 0, 2, 2]), (4, [-2, 0, 0, 0]), (3, [0, 0, 0, 0]), (4, [0, 0, 0])):
        with pytest.raises(ValueError): mem.rebuild(torch.randn(f, 2), torch.tensor(y))
    with pytest.raises(ValueError, match='not finite'): mem.rebuild(torch.full((4, 2), float('nan')), torch.zeros(4).long())
    assert same(mem.state_dict(), before)


def test_features_come_first_and_keep_has_a_name():
    f, y = torch.randn(2, 4), torch.tensor([0, 1])
    for k, mem in every_memory().items():
        ids = (y, y) if k == 'camera' else (y,)
        with pytest.raises(ValueError): mem.update(*ids, f)
        with pytest.raises(TypeError): mem.update(f, *ids, .2)
    assert EMATeacher(nn.Linear(1, 1), keep=.5).keep == ema_rate(0, keep=.5, rampup=False) == .5


@fuzz
@given(clusterings(), st.booleans(), st.sampled_from([0., .2, .9]), st.integers(0, 99))
def test_proxies(case, normalise, keep, seed):
    f, y, cams = case
    unit = (lambda v: v / max(v.norm().item(), 1e-12)) if normalise else (lambda v: v)
    cluster, camera = ClusterProxyMemory(f.shape[1], normalise), CameraProxyMemory(f.shape[1], normalise)
    cluster.rebuild(f, y)
    camera.rebuild(f, y, cams)
    for a in range(int(y.max()) + 1): close(cluster.proxies[a], unit(f[y == a].mean(0)))
    pairs = sorted({(int(a), int(b)) for a, b in zip(y, cams) if a >= 0})
    assert list(zip(camera.labels.tolist(), camera.cams.tolist())) == pairs
    for p, (a, b) in zip(camera.proxies, pairs): close(p, unit(f[(y == a) & (cams == b)].mean(0)))
    rows = [pairs.index((int(a), int(b))) if a >= 0 else -1 for a, b in zip(y, cams)]
    assert camera.index(y, cams).tolist() == rows
    absent = [(a, b) for a in range(-1, 7) for b in range(-1, 7) if (a, b) not in pairs]
    assert (camera.index(*torch.tensor(absent).T) == -1).all()
    p = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    other = CameraProxyMemory(f.shape[1], normalise)
    other.rebuild(f[p], y[p].numpy(), cams[p].tolist())   # arrays and lists are welcome
    close(other.proxies, camera.proxies)
    want = [slow_update(m.proxies, f, i, keep, normalise) for m, i in ((cluster, y), (camera, torch.tensor(rows)))]
    cluster.update(f, y, keep=keep)
    camera.update(f, y, cams, keep=keep)
    close(cluster.proxies, want[0], 1e-3)
    close(camera.proxies, want[1], 1e-3)


def every_memory():
    f, y, c = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, -1, 2]), torch.tensor([0, 0, 1, 1, 0, 1])
    m = nn.ModuleDict(dict(maps=ClassMapMemory(3, (4,)), exemplar=ExemplarMemory(6, 4), hybrid=HybridMemory(6, 4),
                           cluster=ClusterProxyMemory(4), camera=CameraProxyMemory(4)))
    m['maps'].update(f, y)
    m['exemplar'].fill(f)
    m['hybrid'].rebuild(f, y)
    m['cluster'].rebuild(f, y)
    m['camera'].rebuild(f, y, c)
    return m


def test_rules():
    "No parameter, no gradient, float32 through every conversion, copied and loaded whole into other sizes"
    m = every_memory()
    before = copy.deepcopy(m.state_dict())
    assert not list(m.parameters()) and not any(b.requires_grad for b in m.buffers())
    for change in (m.half, m.bfloat16, m.double, m.float, lambda: m.to(torch.float16), lambda: m.to('cpu', torch.half)):
        change()
        assert same(m.state_dict(), before)
    small = nn.ModuleDict(dict(maps=ClassMapMemory(1, (4,)), exemplar=ExemplarMemory(1, 4), hybrid=HybridMemory(1, 4),
                               cluster=ClusterProxyMemory(4), camera=CameraProxyMemory(4)))
    small.load_state_dict(m.state_dict())
    assert same(small.state_dict(), before)
    f, y, c = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, -1, 2]), torch.tensor([0, 0, 1, 1, 0, 1])
    for k, args in dict(maps=(f, y), exemplar=(f, y), hybrid=(f, y), cluster=(f, y), camera=(f, y, c)).items():
        for mem in (m[k], small[k]): mem.update(*(a.half() if a.is_floating_point() else a for a in args))
    assert same(small.state_dict(), m.state_dict()) and not same(m.state_dict(), before)
    assert m['cluster'].proxies.dtype == torch.float32
    assert same(copy.deepcopy(m).state_dict(), m.state_dict())
    m['cluster'].rebuild(torch.randn(9, 4), torch.arange(9))
    small.load_state_dict(m.state_dict())
    assert len(small['cluster'].proxies) == 9
    assert not m.to('meta')['exemplar'].rows.requires_grad


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_doors(bad):
    m, f, y = every_memory(), torch.randn(2, 4), torch.tensor([0, 1])
    before = copy.deepcopy(m.state_dict())
    f[1, 2] = bad
    calls = [lambda: m['maps'].update(f, y), lambda: m['exemplar'].update(f, y), lambda: m['exemplar'].fill(f),
             lambda: m['hybrid'].update(f, y), lambda: m['cluster'].update(f, y), lambda: m['cluster'].rebuild(f, y),
             lambda: m['camera'].update(f, y, y), lambda: m['camera'].rebuild(f, y, y)]
    for call in calls:
        with pytest.raises(ValueError, match='1 of 2 features are not finite, the first in row 1'): call()
    f = torch.randn(2, 4)
    for what, y2, call in [
            ('class 9', [0, 9], lambda y: m['maps'].update(f, y)),
            ('image 6', [6, 0], lambda y: m['hybrid'].update(f, y)),
            ('cluster 3', [0, 3], lambda y: m['cluster'].update(f, y)),
            ('cluster -2', [0, -2], lambda y: m['camera'].update(f, y, y)),
            ('label -2', [-2, 0], lambda y: m['cluster'].rebuild(f, y)),
            ('2 labels are -1', [-1, -1], lambda y: m['camera'].rebuild(f, y, y)),
            ('label 0 of 0..1', [1, 1], lambda y: m['cluster'].rebuild(f, y)),
            ('features for labels', [1], lambda y: m['cluster'].update(f, y))]:
        with pytest.raises(ValueError, match=what): call(torch.tensor(y2))
    for call in (lambda: m['exemplar'].update(f[:, :3], y), lambda: m['cluster'].rebuild(f[0], y[0]),
                 lambda: m['maps'].update(f[None], y)):
        with pytest.raises(ValueError, match='do not fit rows of shape'): call()
    with pytest.raises(ValueError, match='not integers'): m['cluster'].update(f, y.float())
    for build in (lambda: ClassMapMemory(0, (4,)), lambda: ExemplarMemory(0, 4),
                  lambda: m['cluster'].rebuild(f[:0], y[:0])):
        with pytest.raises(ValueError, match='0 classes|0 images|no cluster'): build()
    for call in (lambda: ClusterProxyMemory(4).update(f, y), lambda: CameraProxyMemory(4).update(f, y, y)):
        with pytest.raises(ValueError, match='memory is empty'): call()
    assert same(m.state_dict(), before), 'a refused call changes nothing'


def test_logits_are_stable():
    "Similarities of 90 through the softmax; the memory gets no gradient; half precision features meet float32 rows"
    mem = ExemplarMemory(4, 2, unit=False)
    mem.fill(torch.tensor([[90., 0], [-90, 0], [0, 90], [0, -90]]))
    f = torch.tensor([[1., 0]], requires_grad=True)
    F.cross_entropy(mem.logits(f, 1.), torch.tensor([1])).backward()
    assert f.grad.isfinite().all() and mem.rows.grad is None
    want = mem.logits(f, .05)
    with torch.autocast('cpu', torch.bfloat16): got = mem.logits(f.half(), .05)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_keep_schedules():
    assert [keep_schedule(e) for e in (0, 1, 10, 100, 200)] == [0, .01, .1, 1., 1.]   # from 0: the code of ECN
    assert keep_schedule(90, most=.8) == .8 and keep_schedule(30, .5 / 60) == .25


def test_two_processes_equal_one(tmp_path):
    "Half batches in two processes: the same rows to the bit; a bad value in one of them stops both"
    pair = start_world(CHILD, tmp_path)
    sys.path.insert(0, str(CHILD.parent))
    import memory_child
    one = memory_child.run()
    finish(pair)
    two = [torch.load(tmp_path / f'{r}.pt') for r in range(2)]
    for r in two:
        assert same(r['memories'], one['memories'])
        assert r['error'] == one['error'] == two[0]['error'] and 'not finite, the first in row 11' in r['error']
        for part in ('teachers', 'student'):
            assert same(r[part], two[0][part])
            for k, v in one[part].items(): close(r[part][k], v, 1e-4)
    assert int(two[0]['teachers']['own.t']) == 5


def small_net(d, k): return nn.Sequential(nn.Linear(d, 4), nn.BatchNorm1d(4), nn.Linear(4, k, bias=False))


@fuzz
@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([0., .5, .999, 1.]), st.booleans(),
       st.sampled_from(['own', 'copy', 'ema']), st.integers(0, 99))
def test_teacher_is_the_loop(d, steps, keep, rampup, buffers, seed):
    torch.manual_seed(seed)
    student = small_net(d, 3)
    teacher = EMATeacher(student, keep=keep, rampup=rampup, buffers=buffers)
    want = {k: v.clone().double() for k, v in student.state_dict().items()}
    for t in range(steps):
        with torch.no_grad():
            for p in student.parameters(): p.add_(torch.randn_like(p))
            student(torch.randn(5, d))
        a = min(1 - 1 / (t + 1), keep) if rampup else keep
        assert teacher.update(student) == ema_rate(t, keep, rampup) == a
        for k, v in student.state_dict().items():
            if not k.startswith('1.') or k in ('1.weight', '1.bias') or buffers == 'ema' and v.is_floating_point():
                want[k] = a * want[k] + (1 - a) * v
            elif buffers != 'own': want[k] = v
    for k, v in teacher.net.state_dict().items(): close(v.double(), want[k].double())
    assert int(teacher.t) == steps and all(p.grad is None for p in teacher.parameters())
    if rampup and keep >= .5 and steps == 1: assert teacher.distance(student) == 0


def test_teacher_and_wrapped_students():
    "A forward that a trainer put on the instance still belongs to the student; wrappers are looked through"
    student = small_net(3, 2)
    inner = student.forward
    student.forward = lambda x: inner(x) + 0
    teacher = EMATeacher(student, keep=.5, rampup=False)
    x = torch.randn(4, 3)
    old = teacher(x)
    with torch.no_grad(): student[2].weight.zero_()
    torch.testing.assert_close(teacher(x), old)
    assert student(x).abs().sum() == 0
    compiled = nn.Module()   # as torch.compile wraps, without its seconds of import
    compiled._orig_mod = student
    teacher.update(compiled)
    assert set(EMATeacher(compiled).net.state_dict()) == set(student.state_dict())


def test_teacher_modes_and_conversion():
    student = small_net(3, 2).eval()
    teacher = EMATeacher(student)
    assert not teacher.training and not teacher.net.training
    teacher.train()
    x = torch.randn(8, 3)
    teacher(x)
    assert int(teacher.net[1].num_batches_tracked) == 1 and int(student[1].num_batches_tracked) == 0
    student[2] = nn.Linear(4, 7, bias=False)
    with pytest.raises(ValueError, match='2.weight is .2, 4. in the teacher, .7, 4. in'): teacher.update(student)
    assert int(teacher.t) == 0, 'a refused update does not count'
    assert teacher.resync(student) == ['2.weight'] and teacher.net.training and teacher.net[1].training
    assert int(teacher.net[1].num_batches_tracked) == 1 and teacher(x).shape == (8, 7)
    student.add_module('extra', nn.Linear(7, 2))
    with pytest.raises(ValueError, match='extra.weight is missing in the teacher'): teacher.update(student)
    assert teacher.resync(student) == ['extra.weight', 'extra.bias']
    del student.extra
    with pytest.raises(ValueError, match='missing in the student'): teacher.update(student)
    assert teacher.resync(student) == [] and teacher(x).shape == (8, 7)
    student[2] = nn.Linear(4, 7, bias=False)   # of the same size: only its name tells
    assert teacher.resync(student, '2') == ['2.weight'] and torch.equal(teacher.net[2].weight, student[2].weight)
    teacher.update(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="no module 'head'"): teacher.resync(student, 'head')


def test_no_numpy_labels_are_lost():
    "Labels as scikit-learn gives them"
    mem = HybridMemory(4, 2)
    mem.rebuild(np.eye(4)[:, :2], np.array([0, 0, -1, 1]))
    assert mem.labels.tolist() == [0, 0, 2, 1] and mem.rows.dtype == torch.float32


def test_rows_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try: m = every_memory()
    finally: torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in m.buffers() if t.is_floating_point()} == {torch.float32}
