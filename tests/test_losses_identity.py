"""Properties of the classification losses, ArcFace, the center loss and the class memory against literal loops."""
import math

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from measure import value_and_gradient
from reidnb.losses import identity as I

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:no negatives in the batch')   # tested on purpose below
QUIET = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)
labels = st.one_of(st.lists(st.integers(-1, 3), max_size=10), st.integers(0, 6).map(lambda n: [2]*n),
                   st.integers(0, 6).map(lambda n: [-1]*n), st.permutations(range(4)))


def long(y): return torch.tensor(y, dtype=torch.long)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_ce(z, y, e=0.):
    "One term for each labelled row"
    terms = []
    for i in range(len(y)):
        if y[i] < 0: continue
        row = z[i].tolist()
        total, K = math.log(sum(math.exp(v-max(row)) for v in row))+max(row), len(row)
        terms.append(-sum(((1-e)*(j == y[i])+e/K)*(row[j]-total) for j in range(K)))
    return terms


def mean(terms): return sum(terms)/max(len(terms), 1)


@QUIET
@given(labels, st.sampled_from([0., .1, 1.]), st.sampled_from([1., 90.]), seeds)
def test_cross_entropy_equals_loop(y, smoothing, scale, seed):
    z = scale*normal(len(y), 4, seed=seed)
    value, grad = value_and_gradient(lambda x: I.cross_entropy(x, long(y), smoothing=smoothing), z)
    assert value == pytest.approx(mean(slow_ce(z, y, smoothing)), rel=1e-9, abs=1e-9)
    assert not grad[long(y) < 0].any()
    if y and min(y) >= 0:
        assert value == pytest.approx(F.cross_entropy(z, long(y), label_smoothing=smoothing).item(), rel=1e-9)
    single, _ = value_and_gradient(lambda x: I.cross_entropy(x, long(y), smoothing=smoothing), z.float())
    assert single == pytest.approx(value, rel=1e-4, abs=1e-4)


@QUIET
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3)), max_size=12), st.sampled_from(['mean', 'sum']), seeds)
def test_cameras_split_or_mixed(rows, reduction, seed):
    cams, y = long([c for c, _ in rows]), long([t for _, t in rows])
    zs = [normal(len(rows), 4+c, seed=seed+c) for c in range(3)]
    mixed, _ = value_and_gradient(lambda x: I.camera_cross_entropy([x, *zs[1:]], y, cams, reduction=reduction), zs[0])
    parts = [slow_ce(z[cams == c], y[cams == c].tolist()) for c, z in enumerate(zs)]
    assert mixed == pytest.approx(sum(map(sum if reduction == 'sum' else mean, parts)), abs=1e-9)
    split = I.camera_cross_entropy([z[cams == c] for c, z in enumerate(zs)],
                                   [y[cams == c] for c in range(3)], reduction=reduction)
    assert split.item() == pytest.approx(mixed, abs=1e-9)


def test_one_camera_is_plain_cross_entropy():
    z, y = normal(6, 4), long([0, 1, 1, 3, -1, 2])
    assert I.camera_cross_entropy([z], [y]) == I.cross_entropy(z, y)
    assert I.camera_cross_entropy([z, z], y, torch.zeros(6).long()) == I.cross_entropy(z, y)
    assert I.camera_cross_entropy([z], y, torch.full((6,), -1)) == 0   # unknown cameras


def slow_triplet(f, y, margin):
    terms = []
    for i in range(len(y)):
        d = [math.dist(f[i].tolist(), g) for g in f.tolist()]
        pos, neg = [d[j] for j in range(len(y)) if y[j] == y[i]], [d[j] for j in range(len(y)) if -1 < y[j] != y[i]]
        if y[i] < 0 or not neg: continue
        x = max(pos)-min(neg)
        terms.append(math.log1p(math.exp(x)) if margin is None else max(0., x+margin))
    return terms


@QUIET
@given(labels, st.integers(1, 4), st.integers(1, 3), seeds)
def test_totals_equal_loops(y, heads, vectors, seed):
    zs, fs, t = normal(heads, len(y), 4, seed=seed), normal(vectors, len(y), 3, seed=seed+1), long(y)
    ces, each = [slow_ce(z, y) for z in zs], [slow_ce(z, y, .1) for z in zs]
    total, _ = value_and_gradient(lambda z: I.scr_loss(list(z), list(fs), t), zs)
    hard, soft = [slow_triplet(f, y, 1.2) for f in fs], [slow_triplet(f, y, None) for f in fs]
    close = lambda a, b: float(a) == pytest.approx(b, abs=1e-5)
    assert close(total, 2*sum(map(mean, ces))/heads+sum(map(mean, hard))/vectors)
    literal = I.scr_loss(list(zs), list(fs), t, weight=3., reduction='sum')
    assert close(literal, 3*sum(map(sum, ces))/heads+sum(map(sum, hard))/vectors)
    assert close(I.branch_cross_entropy(list(zs), t, smoothing=0., reduction='sum'), sum(map(sum, ces)))
    assert close(I.source_loss(list(zs), list(fs), t), .5*sum(map(mean, each))+.5*sum(map(mean, soft)))
    inter = I.inter_camera_loss(zs[0], fs[0], t, weight=2., margin=1.2)
    assert close(inter, mean(ces[0])+2*mean(hard[0]))


@QUIET
@given(labels, st.floats(0, 1.5), st.booleans(), seeds)
def test_arcface_equals_angles(y, m, easy, seed):
    f, arc = normal(len(y), 3, seed=seed), I.ArcFace(3, 4, s=8., m=m, easy_margin=easy).double()
    terms = []
    for i in range(len(y)):
        if y[i] < 0: continue
        cos = [F.cosine_similarity(f[i], w, dim=0).item() for w in arc.weight.detach()]
        t = math.acos(cos[y[i]])
        if easy: right = math.cos(t+m) if cos[y[i]] > 0 else cos[y[i]]
        else: right = math.cos(t+m) if t+m <= math.pi else cos[y[i]]-m*math.sin(m)
        z = [8*(right if j == y[i] else c) for j, c in enumerate(cos)]
        terms.append(math.log(sum(map(math.exp, z)))-z[y[i]])
    value, grad = value_and_gradient(lambda x: arc(x, long(y)), f)
    assert value == pytest.approx(mean(terms), abs=1e-6)
    assert not grad[long(y) < 0].any()
    assert arc(5*f, long(y)).item() == pytest.approx(value, abs=1e-6)


@QUIET
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, math.pi/2))
def test_arc_margin_falls_with_the_angle(a, b, m):
    low, high = I.arc_margin(torch.tensor(sorted((a, b)), dtype=torch.float64), m)
    assert low <= high+1e-6
    assert I.arc_margin(torch.tensor(a), m) <= a+1e-6


def test_arc_margin_is_smooth_at_the_ends():
    for easy in (False, True):
        _, grad = value_and_gradient(lambda c: I.arc_margin(c, .5, easy).sum(), torch.tensor([-1., 1, 0]))
        assert grad.abs().max() < 1e6
    arc, f = I.ArcFace(3, 4), torch.eye(3)
    assert torch.equal(arc.logits(f, long([-1, 0, -1]))[::2], 30*arc.cosine(f)[::2])   # no margin without a label


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('sign', [1, -1])
def test_arcface_on_the_axis(dtype, sign):
    arc = I.ArcFace(16, 5, s=64.).to(dtype)
    value, grad = value_and_gradient(lambda x: arc(x, torch.arange(5)), sign*arc.weight)
    assert grad.abs().max() < 1e4 and arc.weight.grad.isfinite().all()


def test_autocast_changes_nothing():
    f, y = normal(6, 8, dtype=torch.float32), long([0, 1, 2, 2, 0, -1])
    arc, cm = I.ArcFace(8, 3), I.ClassMemoryLoss(8, 3, auto_update=True).eval()
    cm.memory.update(f[3:], y[:3])
    for loss in (arc, cm, I.CenterLoss(8, 3).eval(), lambda f, y: I.cross_entropy(f, y)):
        plain = loss(f, y)
        with torch.autocast('cpu', dtype=torch.bfloat16): auto = loss(f, y)
        assert auto.dtype == torch.float32 and auto == plain


@QUIET
@given(st.lists(labels, min_size=1, max_size=3), st.floats(0, 1), st.booleans(), seeds)
def test_center_loss_equals_loop(batches, rate, unit, seed):
    loss, c = I.CenterLoss(3, 4, weight=.5, rate=rate, unit=unit).double(), torch.zeros(4, 3, dtype=torch.float64)
    for b, y in enumerate(batches):
        f = normal(len(y), 3, seed=seed+b)
        value, grad = value_and_gradient(lambda x: loss(x, long(y)), f)
        if unit: f = F.normalize(f, dim=1)
        terms = [((f[i]-c[t])**2).sum().item() for i, t in enumerate(y) if t >= 0]
        assert value == pytest.approx(.5/2*mean(terms), abs=1e-9)
        if not unit and terms:
            expected = .5*torch.stack([f[i]-c[t] if t >= 0 else 0*f[i] for i, t in enumerate(y)])/len(terms)
            torch.testing.assert_close(grad, expected)
        new = c.clone()
        for j in range(4):
            mine = [i for i, t in enumerate(y) if t == j]
            for i in mine: new[j] -= rate*(c[j]-f[i])/(1+len(mine))
        c = new
        torch.testing.assert_close(loss.centres, c)


@QUIET
@given(st.lists(labels, min_size=1, max_size=4), st.booleans(), st.sampled_from([0, 2.]), seeds)
def test_class_memory_equals_loop(batches, mask, gamma, seed):
    loss, memory = I.ClassMemoryLoss(3, 4, gamma=gamma, mask_unseen=mask, auto_update=True), {}
    for b, y in enumerate(batches):
        f = normal(len(y), 3, seed=seed+b, dtype=torch.float32)
        running = loss.bn.running_mean.item(), loss.bn.running_var.item()
        value, _ = value_and_gradient(lambda x: loss(x, long(y)), f)
        rows, cols = [i for i, t in enumerate(y) if t >= 0], [j for j in range(4) if not mask or j in memory]
        cos = {(i, j): F.cosine_similarity(f[i], memory[j], dim=0).item() if j in memory else 0.
               for i in rows for j in cols}
        mu = mean(list(cos.values()))
        var = mean([(v-mu)**2 for v in cos.values()])
        if len(cos) == 1: mu, var = running
        total = 0.
        for (i, j), v in cos.items():
            z = (v-mu)/math.sqrt(var+1e-5)
            z = z if y[i] == j else -z
            total += (1/(1+math.exp(z)))**gamma*math.log1p(math.exp(-z))
        assert value == pytest.approx(total/max(len(rows), 1), abs=2e-3)
        if b == 0 and mask: assert value == 0
        for i in rows: memory[y[i]] = f[i]
        assert loss.memory.seen.tolist() == [j in memory for j in range(4)]
        for j, row in memory.items(): assert torch.equal(loss.memory.maps[j], row)


@QUIET
@given(labels, seeds)
def test_order_of_the_batch_does_not_matter(y, seed):
    f, y = normal(len(y), 4, seed=seed), long(y)
    p = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    arc, center = I.ArcFace(4, 4).double(), I.CenterLoss(4, 4).double().eval()
    center.centres.copy_(normal(4, 4, seed=seed+1))
    memory = I.ClassMemoryLoss(4, 4, auto_update=True).eval()
    memory.memory.update(normal(4, 4, seed=seed+2), torch.arange(4))
    memory = memory.double()
    for loss in (arc, center, memory, I.cross_entropy):
        assert loss(f[p], y[p]).item() == pytest.approx(loss(f, y).item(), abs=1e-9)


def test_gradients_in_double_precision():
    f, y = normal(6, 4), long([0, 1, 2, 2, 0, -1])
    check, arc = torch.autograd.gradcheck, I.ArcFace(4, 3).double()
    functional = lambda f, w: torch.func.functional_call(arc, {'weight': w}, (f, y))
    assert check(functional, (f.clone().requires_grad_(), arc.weight))
    cm = I.ClassMemoryLoss(4, 3, auto_update=False)
    cm.memory.update(normal(3, 4, seed=1), torch.arange(3))
    cm = cm.double()
    functional = lambda f, w, b: torch.func.functional_call(cm, {'bn.weight': w, 'bn.bias': b}, (f, y))
    assert check(functional, (f.clone().requires_grad_(), cm.bn.weight, cm.bn.bias))
    center = I.CenterLoss(4, 3).double().eval()
    assert check(lambda f: center(f, y), f.clone().requires_grad_())


def test_states_travel_in_the_checkpoint():
    f, y = normal(6, 4, dtype=torch.float32), long([0, 1, 2, 2, 0, -1])
    for make in (lambda: I.CenterLoss(4, 3), lambda: I.ClassMemoryLoss(4, 3, auto_update=True), lambda: I.ArcFace(4, 3)):
        old, new = make(), make()
        old(f, y), old(f, y)
        new.load_state_dict(old.state_dict())
        assert torch.equal(old.eval()(f, y), new.eval()(f, y))


def _two(rank, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    f, y = normal(8, 4, dtype=torch.float32), long([0, 1, 1, -1, 2, 2, 0, 1])
    part = slice(4*rank, 4*rank+4)
    center, cm = I.CenterLoss(4, 3), I.ClassMemoryLoss(4, 3, auto_update=True)
    center(f[part], y[part]), cm(f[part], y[part])
    torch.save((center.centres, cm.memory.maps), f'{results}{rank}')
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_state_of_one(tmp_path):
    mp.spawn(_two, (str(tmp_path/'meet'), str(tmp_path/'result')), nprocs=2)
    f, y = normal(8, 4, dtype=torch.float32), long([0, 1, 1, -1, 2, 2, 0, 1])
    center, cm = I.CenterLoss(4, 3), I.ClassMemoryLoss(4, 3, auto_update=True)
    center(f, y), cm(f, y)
    for rank in range(2):
        centres, maps = torch.load(tmp_path/f'result{rank}')
        torch.testing.assert_close(centres, center.centres)
        assert torch.equal(maps, cm.memory.maps)


def test_bad_input_is_named():
    z, y = torch.zeros(3, 4), long([0, 1, 2])
    for call, word in ((lambda: I.cross_entropy(z, y[:2]), '3 rows'), (lambda: I.mean_cross_entropy([], y), 'no heads'),
                       (lambda: I.arc_margin(z, -.1), 'margin -0.1'),
                       (lambda: I.camera_cross_entropy([z], y, y), 'camera 2'),
                       (lambda: I.camera_cross_entropy([], []), '0 heads'),
                       (lambda: I.ClassMemoryLoss(4, 3, auto_update=True)(z, y[:2]), '3 features'),
                       (lambda: I.ClassMemoryLoss(4, 3, auto_update=True)(z, y+1), 'class 3')):
        with pytest.raises(ValueError, match=word): call()


@pytest.mark.parametrize('bad', [3, 9, -2])
def test_labels_without_a_class_are_named_before_the_loss(bad):
    f, y = torch.randn(3, 4), long([0, bad, -1])
    memory, center = I.ClassMemoryLoss(4, 3, auto_update=True), I.CenterLoss(4, 3)
    memory.update(torch.randn(3, 4), torch.arange(3))
    before = memory.memory.maps.clone()
    for loss in (I.ArcFace(4, 3), memory, I.ClassMemoryLoss(4, 3).eval(), center,
                 lambda f, y: I.cross_entropy(f[:, :3], y), lambda f, y: I.scr_loss([f[:, :3]], [f], y),
                 lambda f, y: I.camera_cross_entropy([f[:, :3]], [y])):
        with pytest.raises(ValueError, match=fr'class {bad} is outside 0\.\.2 \(-1 skips an image\)'): loss(f, y)
    assert torch.equal(memory.memory.maps, before) and not center.centres.any()


def test_scr_without_vectors_is_the_cross_entropy_and_pcb_is_the_sum():
    zs, y = list(normal(6, 5, 4)), long([0, 1, 3, 3, -1])
    for r in ('mean', 'sum'):
        assert I.scr_loss(zs, [], y, reduction=r) == 2*I.mean_cross_entropy(zs, y, reduction=r)
    torch.testing.assert_close(6*I.mean_cross_entropy(zs, y), sum(I.cross_entropy(z, y) for z in zs))
