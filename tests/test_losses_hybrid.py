"""Properties of the hybrid and the intra-camera loss against slow transcriptions."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from measure import value_and_gradient
from reidnb.losses.hybrid import hybrid_loss, intra_camera_loss
from reidnb.networks.memory import HybridMemory

torch.set_num_threads(1)
QUIET = settings(max_examples=60, deadline=None)
SEED = st.integers(0, 2**31)


def slow_hybrid(f, memory, labels, index, tau, eps=0.):
    "Loops over images, classes and rows, in float64"
    f, memory = f.double(), memory.double()
    groups = {}
    for j, k in enumerate(labels.tolist()): groups.setdefault((0, k) if k >= 0 else (1, j), []).append(j)
    terms = []
    for i, r in enumerate(index.tolist()):
        if r < 0: continue
        z = {c: sum(float(f[i]@memory[j]/f[i].norm()) for j in rows)/len(rows)/tau for c, rows in groups.items()}
        own = next(c for c, rows in groups.items() if r in rows)
        terms.append(-math.log(math.exp(z[own])/(sum(math.exp(v) for v in z.values())+eps)+eps))
    return sum(terms)/len(terms) if terms else 0.


def slow_intra(f, proxies, pl, pc, y, cams, tau, sum_over_cameras=True):
    "Loops over cameras, images and proxies, in float64"
    f, proxies = f.double(), proxies.double()
    cos = lambda a, b: float(a@b/(a.norm()*b.norm()))
    groups = []
    for b in sorted(set(cams.tolist())):
        terms = []
        for i in range(len(f)):
            own = [k for k in range(len(proxies)) if pl[k] == y[i] and y[i] >= 0 and pc[k] == b]
            if cams[i] != b or not own: continue
            z = [cos(f[i], proxies[k])/tau for k in range(len(proxies)) if pc[k] == b]
            terms.append(math.log(sum(map(math.exp, z)))-cos(f[i], proxies[own[0]])/tau)
        if terms: groups.append(terms)
    if sum_over_cameras: return sum(sum(t)/len(t) for t in groups)
    return sum(map(sum, groups))/sum(map(len, groups)) if groups else 0.


def memory_of(rows, labels):
    "A memory of the rows with the classes of the labels; gaps in the numbers are closed"
    mem = HybridMemory(*rows.shape)
    known = labels[labels >= 0].unique()
    mem.rebuild(rows, torch.where(labels < 0, labels, torch.searchsorted(known, labels)))
    return mem


def near(a, b, tol=1e-4): assert abs(a-b) <= tol*max(1, abs(b)), (a, b)


@st.composite
def memories(draw):
    n, b, d = draw(st.integers(1, 20)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(SEED))
    most = draw(st.integers(-1, 6))                     # -1: only noise; 0: one cluster and noise
    labels = torch.randint(-1, most+1, (n,), generator=g)
    index = torch.randint(-1 if draw(st.booleans()) else 0, n, (b,), generator=g)
    f, memory = torch.randn(b, d, generator=g), F.normalize(torch.randn(n, d, generator=g), dim=1)
    if draw(st.booleans()): memory = memory[:1].expand(n, d).clone()     # duplicates
    return f, memory, labels, index, g


@QUIET
@given(memories(), st.sampled_from([.05, .2, 1.]), st.sampled_from([0., 1e-6]))
def test_hybrid_equals_the_loops(case, tau, eps):
    "SpCL's equation to 1e-6 in float64, and in float32 as far as that goes"
    f, memory, labels, index, g = case
    mem = memory_of(memory, labels)
    want = slow_hybrid(f, mem.rows, labels, index, tau, eps)
    near(hybrid_loss(f.double(), mem, index, temperature=tau, eps=eps).item(), want, 1e-6)
    v, grad = value_and_gradient(lambda x: hybrid_loss(x, mem, index, temperature=tau, eps=eps), f)
    near(v, want)
    assert grad[index < 0].eq(0).all()


@QUIET
@given(memories(), st.sampled_from([0., .2, 1.]))
def test_hybrid_follows_the_rows_of_the_memory(case, keep):
    "Steps move rows and no class; a loaded memory goes on with the classes of its checkpoint"
    f, memory, labels, index, g = case
    mem = memory_of(memory, labels)
    for _ in range(2): mem.update(F.normalize(f, dim=1), index, keep=keep)
    again = HybridMemory(1, memory.shape[1])
    again.load_state_dict(mem.state_dict())
    for m in (mem, again):
        near(hybrid_loss(f.double(), m, index).item(), slow_hybrid(f, mem.rows, labels, index, .05), 1e-6)


@QUIET
@given(memories())
def test_hybrid_does_not_know_the_order(case):
    f, memory, labels, index, g = case
    v = hybrid_loss(f, memory_of(memory, labels), index).item()
    p, q = torch.randperm(len(f), generator=g), torch.randperm(len(memory), generator=g)
    where = q.argsort()
    moved = torch.where(index >= 0, where[index.clamp(min=0)], index)
    near(hybrid_loss(f[p], memory_of(memory[q], labels[q]), moved[p]).item(), v)
    near(hybrid_loss(3*f, memory_of(memory, torch.where(labels < 0, labels, labels.max()-labels)), index).item(), v)


def test_hybrid_gradient_of_both_ways_and_the_guard():
    "Three classes of nine rows: averaged rows; six: averaged logits"
    g = torch.Generator().manual_seed(0)
    f, memory = torch.randn(5, 4, generator=g), torch.randn(9, 4, generator=g)
    index = torch.tensor([0, 3, 5, -1, 8])
    for labels in ([0, 0, 1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, -1, -1, -1, -1]):
        mem = memory_of(memory, torch.tensor(labels))
        for eps in (0., 1e-6):
            loss = lambda x: hybrid_loss(x, mem, index, temperature=.3, eps=eps)
            assert torch.autograd.gradcheck(loss, f.double().requires_grad_())


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_similarities_of_ninety(dtype):
    g = torch.Generator().manual_seed(1)
    f, memory = torch.randn(6, 3, generator=g), F.normalize(torch.randn(8, 3, generator=g), dim=1)
    labels, index = torch.tensor([0, 0, 1, -1, -1, 2, 2, 2]), torch.tensor([0, 1, 2, 3, 4, 5])
    with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
        v, _ = value_and_gradient(lambda x: hybrid_loss(x, memory_of(memory, labels), index, temperature=1/90), f)
        w, _ = value_and_gradient(lambda x: intra_camera_loss(x, memory[:3], torch.arange(3), torch.zeros(3).long(),
                                                              index % 3, index*0, temperature=1/90), f)
    near(v, slow_hybrid(f, memory, labels, index, 1/90))
    near(w, slow_intra(f, memory[:3], torch.arange(3), torch.zeros(3), index % 3, index*0, 1/90))


def test_faults_are_named():
    f, memory = torch.randn(2, 3), torch.randn(4, 3)
    mem = memory_of(memory, torch.zeros(4).long())
    with pytest.raises(ValueError, match='1 row'): hybrid_loss(f, mem, torch.zeros(1).long())
    for i in (4, -2):
        with pytest.raises(ValueError, match=fr'memory row {i} is outside 0\.\.3'): hybrid_loss(f, mem, torch.tensor([0, i]))
    mem.fill(torch.randn(5, 3))
    with pytest.raises(ValueError, match='5 rows, 4 labels: call rebuild'): hybrid_loss(f, mem, torch.tensor([0, 1]))
    low = torch.tensor([0, -2, 0, 0])
    with pytest.raises(ValueError, match='label -2: -1 is the only'): intra_camera_loss(f, memory, low, low, low[:2], low[:2])
    none = torch.zeros(4).long()
    with pytest.raises(ValueError, match='two proxies'): intra_camera_loss(f, memory, none, none, none[:2], none[:2])
    with pytest.raises(ValueError, match='3 cameras'): intra_camera_loss(f, memory, none, none, none[:2], none[:3])


def test_memory_and_proxies_carry_no_gradient():
    f, memory = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    k, mem = torch.arange(4), HybridMemory(4, 3)
    mem.rebuild(memory, k//2)
    (hybrid_loss(f, mem, k)+intra_camera_loss(f, memory, k//2, k % 2, k//2, k % 2)).backward()
    assert memory.grad is None and mem.rows.grad is None and f.grad.ne(0).any()


@st.composite
def cameras(draw):
    b, d, people, cams = (draw(st.integers(1, n)) for n in (9, 5, 4, 3))
    g = torch.Generator().manual_seed(draw(SEED))
    pairs = [(a, c) for a in range(people) for c in range(cams)]
    keep = torch.randperm(len(pairs), generator=g)[:draw(st.integers(0, len(pairs)))].tolist()
    pl, pc = torch.tensor([pairs[i] for i in keep]).long().reshape(-1, 2).T
    y, seen = torch.randint(-1, people, (b,), generator=g), torch.randint(0, cams, (b,), generator=g)
    f, proxies = torch.randn(b, d, generator=g), torch.randn(len(keep), d, generator=g)
    if draw(st.booleans()): f = f[:1].expand(b, d).clone()
    return f, proxies, pl, pc, y, seen, g


@QUIET
@given(cameras(), st.booleans(), st.sampled_from([.07, .5]))
def test_intra_camera_equals_the_loops(case, total, tau):
    *args, g = case
    f, proxies, pl, pc, y, seen = args
    kw = dict(temperature=tau, sum_over_cameras=total)
    v, grad = value_and_gradient(lambda x: intra_camera_loss(x, *args[1:], **kw), f)
    near(v, slow_intra(*args, tau, total))
    assert grad[y < 0].eq(0).all()
    p, q = torch.randperm(len(f), generator=g), torch.randperm(len(proxies), generator=g)
    near(intra_camera_loss(5*f[p], 2*proxies[q], pl[q], pc[q], y[p], seen[p]+7-7, **kw).item(), v)
    near(intra_camera_loss(f, proxies, pl, 9-pc, y, 9-seen, **kw).item(), v)


def test_intra_camera_gradient():
    g = torch.Generator().manual_seed(2)
    f, proxies = torch.randn(6, 4, generator=g).double(), torch.randn(5, 4, generator=g).double()
    pl, pc = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 1, 1])
    y, cams = torch.tensor([0, 1, 2, 0, 1, -1]), torch.tensor([0, 0, 0, 1, 1, 1])
    for total in (True, False):
        loss = lambda x: intra_camera_loss(x, proxies, pl, pc, y, cams, temperature=.4, sum_over_cameras=total)
        assert torch.autograd.gradcheck(loss, f.clone().requires_grad_())
