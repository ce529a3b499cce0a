"Contrastive losses: any batch is finite, equals a loop over the printed equation, and ignores order."
import math
import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidnb.losses import contrastive as C

torch.set_num_threads(1)
os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler is silent
pytestmark = pytest.mark.filterwarnings('ignore:no negatives in the batch')   # tested on purpose below
QUIET = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**31)


def gen(seed): return torch.Generator().manual_seed(seed)
def randn(g, *shape): return torch.randn(shape, generator=g, dtype=torch.float64)
def ints(g, high, *shape, low=0): return torch.randint(low, high, shape, generator=g)
def cosine(a, b): return torch.cosine_similarity(a, b, dim=0)


def equal(a, b): torch.testing.assert_close(a.detach(), torch.as_tensor(b, dtype=a.dtype).detach(), rtol=1e-8, atol=1e-9)


def sound(loss, *leaves):
    "A finite scalar, and a finite gradient of every leaf it reaches"
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    for x in leaves: assert x.grad is None or x.grad.isfinite().all()


# --- InfoNCE -----------------------------------------------------------------------------------
@QUIET
@given(st.integers(0, 6), st.integers(0, 9), st.integers(1, 5), st.floats(.05, 2), SEEDS)
def test_info_nce_is_its_equation(b, k, d, t, seed):
    g = gen(seed)
    q, p, n = randn(g, b, d).requires_grad_(), randn(g, b, d), randn(g, k, d)
    mask = torch.rand(b, k, generator=g) > .5
    slow = 0
    for i in range(b):
        x = [q[i]@p[i]/t] + [q[i]@n[j]/t for j in range(k) if mask[i, j]]
        slow = slow + torch.stack(x).logsumexp(0) - x[0]
    loss = C.info_nce(q, p, n, t, mask)
    equal(loss, slow/max(b, 1))
    sound(loss, q)


def test_info_nce_gradients_reach_all_inputs():
    q, p, n = (torch.randn(3, 2, requires_grad=True) for _ in range(3))
    C.info_nce(q, p, n, 1.).backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, p, n))


# --- ECN ---------------------------------------------------------------------------------------
@QUIET
@given(st.integers(1, 7), st.integers(1, 12), st.integers(1, 15), *[st.booleans()]*4, SEEDS)
def test_invariance_is_equation_8(b, n, k, e, c, nb, fakes, seed):
    g = gen(seed)
    z, index = 4*randn(g, b, n), ints(g, n, b, low=-1)
    fake = torch.rand(b, generator=g) > .5 if fakes else None
    terms = []
    for i in range(b):
        if index[i] < 0: continue
        logp, near = z[i]-z[i].logsumexp(0), set(z[i].argsort(descending=True)[:k].tolist())
        own = c if fakes and fake[i] else e
        w = {j: nb/min(k, n) for j in near} | {int(index[i]): float(own)}
        terms.append(-sum(w[j]*logp[j] for j in w))
    x = z.clone().requires_grad_()
    loss = C.invariance_loss(x, index, k=k, fake=fake, e=e, c=c, n=nb)
    equal(loss, sum(terms)/max(len(terms), 1))
    p = torch.randperm(b, generator=g)
    equal(C.invariance_loss(z[p], index[p], k=k, fake=None if fake is None else fake[p], e=e, c=c, n=nb), loss)
    sound(loss, x)


@QUIET
@given(st.integers(1, 7), st.integers(1, 12), st.integers(1, 15), SEEDS)
def test_neighbour_weights_sum_as_the_code_says(b, n, k, seed):
    g = gen(seed)
    z, index = randn(g, b, n), ints(g, n, b)
    cols, w = C.neighbour_targets(z, index, k)
    k = min(k, n)
    inside = (z.topk(k, 1).indices == index[:, None]).any(1)
    torch.testing.assert_close(w.sum(1), torch.where(inside, 1+(k-1)/k, 2.).double())
    dense = torch.zeros(b, n, dtype=w.dtype).scatter_add_(1, cols, w)
    assert (dense.gather(1, index[:, None]) == 1).all() and ((dense > 0).sum(1) == torch.where(inside, k, k+1)).all()


def test_invariance_never_builds_a_dense_target():
    "Beyond one log-softmax forward, the loss allocates no second (B,N) matrix"
    z, index = torch.randn(64, 20000), torch.arange(64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        C.invariance_loss(z, index)
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    assert sum(s >= 64*20000 for s in sizes) == 1


# --- ICE ---------------------------------------------------------------------------------------
@QUIET
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0., .1, .5]), SEEDS)
def test_agnostic_is_equation_6_5(b, k, d, smoothing, seed):
    g = gen(seed)
    f, p, y = randn(g, b, d), randn(g, k, d), ints(g, k, b, low=-1)
    terms = []
    for i in range(b):
        if y[i] < 0: continue
        logp = torch.stack([f[i]@p[j]/.5 for j in range(k)]).log_softmax(0)
        terms.append(-(1-smoothing)*logp[y[i]] - smoothing*logp.mean())
    x, proxies = f.clone().requires_grad_(), p.clone().requires_grad_()
    loss = C.agnostic_proxy_loss(x, proxies, y, smoothing=smoothing)
    equal(loss, sum(terms)/max(len(terms), 1))
    o = torch.randperm(b, generator=g)
    equal(C.agnostic_proxy_loss(f[o], p, y[o], smoothing=smoothing), loss)
    sound(loss, x)
    assert proxies.grad is None


def slow_cross(f, P, pl, pc, y, cam, t, n, own, joint, per_camera):
    groups = {}
    for b in range(len(f)):
        if y[b] < 0 or not (pl == y[b]).any(): continue    # no proxy at all: not in the mean
        s = [cosine(f[b], p)/t for p in P]
        pos = [s[j] for j in range(len(P)) if pl[j] == y[b] and (own or pc[j] != cam[b])]
        neg = sorted((s[j] for j in range(len(P)) if pl[j] != y[b]), key=float)[::-1][:n]
        loss = torch.zeros((), dtype=f.dtype)
        for p in pos: loss = loss + (torch.stack([*(pos if joint else [p]), *neg]).logsumexp(0)-p)/len(pos)
        groups.setdefault(int(cam[b]) if per_camera else 0, []).append(loss)
    return sum(sum(g)/len(g) for g in groups.values())


@QUIET
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 60), *[st.booleans()]*3, SEEDS)
def test_cross_camera_is_equation_6_7(b, ids, n_cams, n, own, joint, per_camera, seed):
    g = gen(seed)
    pairs = [(a, c) for a in range(ids) for c in range(n_cams) if torch.rand((), generator=g) < .7] or [(0, 0)]
    pl, pc = torch.tensor(pairs).T
    P, f = randn(g, len(pairs), 4), randn(g, b, 4)
    y, cam = ints(g, ids, b, low=-1), ints(g, n_cams, b)
    s = dict(n_negatives=n, own_camera=own, joint=joint, sum_over_cameras=per_camera)
    x, proxies = f.clone().requires_grad_(), P.clone().requires_grad_()
    loss = C.camera_proxy_loss(x, proxies, pl, pc, y, cam, **s)
    equal(loss, slow_cross(f, P, pl, pc, y, cam, .07, n, own, joint, per_camera) or f.new_zeros(()))
    o, q = torch.randperm(b, generator=g), torch.randperm(len(pairs), generator=g)
    equal(C.camera_proxy_loss(f[o], P[q], pl[q], pc[q], y[o], cam[o], **s), loss)
    sound(loss, x)
    assert proxies.grad is None


def test_cross_camera_without_proxies_or_other_cameras_is_zero():
    f, zero = torch.randn(4, 3, requires_grad=True), torch.zeros(4).long()
    for P in (torch.randn(0, 3), torch.randn(2, 3)):
        k = torch.arange(len(P))
        loss = C.camera_proxy_loss(f, P, k, 0*k, zero, zero, own_camera=False)
        assert loss == 0
        sound(loss, f)


def test_cross_camera_weight_grows_with_the_cameras_of_the_batch():
    "The same image under every camera: the sum over cameras is that many times the batch mean"
    f, P = torch.randn(1, 4).expand(6, 4), torch.randn(5, 4)
    s = [C.camera_proxy_loss(f, P, torch.arange(5), torch.zeros(5).long(), torch.zeros(6).long(), torch.arange(6),
                             sum_over_cameras=x) for x in (True, False)]
    torch.testing.assert_close(s[0], 6*s[1])


@QUIET
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(['all', 'hardest']), st.booleans(), SEEDS)
def test_hard_instance_is_equation_6_9(b, ids, negatives, duplicates, seed):
    g = gen(seed)
    f, keys, y = randn(g, b, 4), randn(g, b, 4), ints(g, ids, b, low=-1)
    if duplicates: keys = keys[:1].expand(b, 4).clone()
    terms = []
    for i in range(b):
        if y[i] < 0: continue
        s = [cosine(f[i], m)/.1 for m in keys]
        pos = min((s[j] for j in range(b) if y[j] == y[i]), key=float)
        neg = sorted((s[j] for j in range(b) if y[j] != y[i] and y[j] >= 0), key=float)
        terms.append(torch.stack([pos, *(neg if negatives == 'all' else neg[-1:])]).logsumexp(0)-pos)
    x, k = f.clone().requires_grad_(), keys.clone().requires_grad_()
    loss = C.hard_instance_loss(x, k, y, negatives=negatives)
    equal(loss, sum(terms)/max(len(terms), 1))
    o = torch.randperm(b, generator=g)
    equal(C.hard_instance_loss(f[o], keys[o], y[o], negatives=negatives), loss)
    sound(loss, x)
    assert k.grad is None


@pytest.mark.parametrize('people,images', [(2, 1), (3, 4), (8, 4)])
def test_hard_instance_with_equal_similarities(people, images):
    f = torch.ones(people*images, 3)
    loss = C.hard_instance_loss(f, f, torch.arange(people).repeat_interleave(images))
    assert abs(loss.item()-math.log((people-1)*images+1)) < 1e-5


# --- GCL ---------------------------------------------------------------------------------------
@QUIET
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), st.sampled_from(['memory', 'online']), SEEDS)
def test_views_are_equations_5_6_to_5_8(b, n, ids, prime, seed):
    g = gen(seed)
    f, new, M = randn(g, b, 4), randn(g, b, 4), randn(g, n, 4)
    labels, index, weights = ints(g, ids, n, low=-1), ints(g, n, b), torch.rand(3, generator=g).tolist()
    chosen, t = torch.stack([index, ints(g, n, b)], 1), .04
    x, v, m = (a.clone().requires_grad_() for a in (f, new, M))
    total = [[], [], []]
    for i in range(b):
        y = labels[index[i]]
        if y < 0: continue
        neg = [cosine(v[i], M[j])/t for j in range(n) if labels[j] != y]
        own = M[index[i]] if prime == 'memory' else x[i]
        for k, p in enumerate((cosine(x[i], M[chosen[i, 0]]), cosine(v[i], own), cosine(v[i], M[chosen[i, 1]]))):
            total[k].append(torch.stack([p/t, *neg]).logsumexp(0)-p/t)
    slow = sum(w*sum(z)/max(len(z), 1) for w, z in zip(weights, total))
    def loss(x, v, m, o):
        return C.view_invariance_loss(x[o], v[o], m, labels, index[o], terms=weights, prime=prime, positives=chosen[o])
    out = loss(x, v, m, slice(None))
    equal(out, slow)
    if torch.is_tensor(slow):
        fast, loop = (torch.autograd.grad(z, (x, v), retain_graph=True) for z in (out, slow))
        for p, q in zip(fast, loop): equal(p, q)
    equal(loss(f, new, M, torch.randperm(b, generator=g)), out)
    sound(out, x, v)
    assert m.grad is None


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 25), SEEDS)
def test_drawn_negatives_are_the_asked_number_of_strangers(n, ids, k, seed):
    "At zero similarity a term is log(1+K), so the loss tells how many negatives an image has"
    g = gen(seed)
    labels, index = ints(g, ids, n, low=-1), torch.arange(n)
    e = torch.eye(3, dtype=torch.float64)
    loss = C.view_invariance_loss(e[:1].expand(n, 3), e[:1].expand(n, 3), e[1:2].expand(n, 3), labels, index,
                                  n_negatives=k, generator=g)
    terms = [math.log(1+min(k, int((labels != y).sum()))) for y in labels if y >= 0]
    equal(loss, 3*sum(terms)/max(len(terms), 1))


def test_drawn_negatives_are_uniform():
    "Each of the six strangers is drawn as often as the others"
    labels, g, hits = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1]), gen(0), torch.zeros(8)
    q, M = torch.zeros(1, 8), torch.eye(8)
    for _ in range(600):
        x = q.clone().requires_grad_()
        C._negative_lse(x, M, labels, torch.tensor([0]), torch.tensor([2]), 2, g).sum().backward()
        hits += x.grad[0] > 0
    assert hits.sum() == 1200 and (hits[:2] == 0).all()
    assert (hits[2:]-200).abs().max() < 5*math.sqrt(600*(1/3)*(2/3))


# --- all ---------------------------------------------------------------------------------------
def losses(f):
    "Every loss on eight features of three people, two cameras, with one outlier"
    y, cam, i = torch.tensor([0, 0, 0, 1, 1, 2, -1, 2]), torch.arange(8) % 2, torch.arange(8)
    g = gen(1)
    M, P = torch.randn(8, 4, generator=g), torch.randn(6, 4, generator=g)
    c6 = torch.arange(6)
    return {'info_nce': C.info_nce(f, M, P, .1), 'invariance': C.invariance_loss(f.float()@M.T/.05, i),
            'agnostic': C.agnostic_proxy_loss(f, P[:3], y), 'cross': C.camera_proxy_loss(f, P, c6//2, c6 % 2, y, cam),
            'cross, paper': C.camera_proxy_loss(f, P, c6//2, c6 % 2, y, cam, own_camera=False, joint=False,
                                                sum_over_cameras=False),
            'hard': C.hard_instance_loss(f, M, y), 'hardest': C.hard_instance_loss(f, M, y, negatives='hardest'),
            'views': C.view_invariance_loss(f, f.flip(0), M, y, i, generator=gen(0)),
            'views, drawn': C.view_invariance_loss(f, f.flip(0), M, y, i, n_negatives=2, prime='online', generator=gen(0))}


def test_autocast_changes_nothing():
    f = torch.randn(8, 4, generator=gen(0))
    plain = losses(f)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cast = losses(f)
    for k, v in cast.items():
        assert v.dtype == torch.float32
        if k != 'invariance': torch.testing.assert_close(v, plain[k], rtol=1e-6, atol=1e-6, msg=k)


def test_half_features_give_float32_losses():
    f = torch.randn(8, 4, generator=gen(0)).bfloat16()
    for k, v in losses(f).items(): assert v.dtype == torch.float32 and v.isfinite(), k


@pytest.mark.parametrize('scale', [0., 1e-20, 1e20])
def test_lengths_out_of_the_ordinary(scale):
    "Zero features and very long ones: finite losses; very long logits are the caller's own where nothing is normalised"
    f = (scale*torch.ones(8, 4)).requires_grad_()
    for k, v in losses(f).items():
        if k in ('info_nce', 'invariance', 'agnostic') and scale > 1: continue
        f.grad = None
        sound(v, f)


@pytest.mark.parametrize('sign', [1, -1])
def test_logits_of_ninety(sign):
    f = (sign*torch.tensor([[1., 0.], [-1., 0.], [1., 0.], [-1., 0.]])).requires_grad_()
    P, y, c, i = torch.tensor([[1., 0.], [-1., 0.]]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.arange(4)
    t = 1/90
    out = [C.info_nce(f, f.detach().flip(0), P, t), C.invariance_loss(f@f.detach().T/t, i), C.agnostic_proxy_loss(f, P, y, temperature=t),
           C.camera_proxy_loss(f, P, i[:2], 0*i[:2], y, c, temperature=t), C.hard_instance_loss(f, f.flip(0), y, temperature=t),
           C.camera_proxy_loss(f, P, i[:2], 0*i[:2], y, c, temperature=t, joint=False),
           C.view_invariance_loss(f, f.flip(0), f, y, i, temperature=t, generator=gen(0))]
    for v in out:
        f.grad = None
        sound(v, f)
        assert v > 1


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_only_outliers_and_empty_batches(dtype):
    f, P, z = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.randn(5, 4, dtype=dtype), torch.zeros(5).long()
    for b in (0, 3):
        x, y = f[:b], torch.full((b,), -1)
        for loss in (C.agnostic_proxy_loss(x, P, y), C.camera_proxy_loss(x, P, z, z, y, y), C.hard_instance_loss(x, x, y),
                     C.invariance_loss(x@P.T, y), C.view_invariance_loss(x, x, P, z-1, y), C.info_nce(x[:0], x[:0], P, 1.)):
            assert loss == 0 and loss.requires_grad
            f.grad = None
            sound(loss, f)


# --- ties, labels, batches without strangers ----------------------------------------------------
@QUIET
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 35), st.integers(1, 5), SEEDS)
def test_top_is_a_stable_sort(b, n, k, values, seed):
    x = ints(gen(seed), values, b, n).float()/3
    assert torch.equal(C._top(x, k), x.argsort(dim=1, descending=True, stable=True)[:, :k])


def test_ties_take_the_lower_index():
    "An empty memory, and negatives that are copies: which of the equals counts shows in the gradient"
    cols, _ = C.neighbour_targets(torch.zeros(3, 5000), torch.tensor([0, 7, 4999]), 6)
    assert cols[:, :6].tolist() == [list(range(6))]*3
    P = torch.eye(3).repeat(40, 1)                       # cluster 0 in row 0; strangers tie in three groups
    pl, zero = torch.arange(120), torch.zeros(120).long()
    for n in (1, 5, 50):
        _, _, neg = columns = C._positives_and_hardest(P[:1]@P.T, (pl == 0)[None], (pl != 0)[None], n)
        want = sorted(range(1, 120), key=lambda j: (-float(P[0]@P[j]), j))[:n]
        assert columns[0][neg].tolist() == want
    assert C.camera_proxy_loss(P[:2], P, pl, zero, pl[:2], zero[:2]).isfinite()


def test_nan_does_not_break_ties():
    x = torch.zeros(2, 9)
    x[0, 3] = float('nan')
    assert C._top(x, 4).shape == (2, 4) and 3 in C._top(x, 4)[0]


def test_an_image_whose_cluster_has_no_proxy_leaves_the_mean():
    f, P, z = torch.randn(4, 3), torch.randn(3, 3), torch.zeros(4).long()
    pl, pc, y = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0, 5])
    for s in [dict(own_camera=o, joint=j, sum_over_cameras=c) for o in (0, 1) for j in (0, 1) for c in (0, 1)]:
        loss = C.camera_proxy_loss(f, P, pl, pc, y, z, **s)
        torch.testing.assert_close(loss, C.camera_proxy_loss(f[:3], P, pl, pc, y[:3], z[:3], **s))
    # cluster 1 has a proxy in its own camera only: it counts, with 0
    two = C.camera_proxy_loss(f[:2], P, pl, pc, y[:2], z[:2], own_camera=False)
    torch.testing.assert_close(2*two, C.camera_proxy_loss(f[:1], P, pl, pc, y[:1], z[:1], own_camera=False))


@pytest.mark.parametrize('bad', [5, -2])
def test_labels_out_of_range_are_named(bad):
    f, P, y, ok = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, bad]), torch.tensor([0, 1])
    labels = torch.arange(5)
    for what, call in (('class', lambda: C.agnostic_proxy_loss(f, P, y)),
                       ('memory row', lambda: C.invariance_loss(f@P.T, y)),
                       ('memory row', lambda: C.view_invariance_loss(f, f, P, labels, y))):
        with pytest.raises(ValueError, match=fr'{what} {bad} is outside 0\.\.4'): call()
    for call in (lambda: C.camera_proxy_loss(f, P, labels, 0*labels, ok-3, ok), lambda: C.hard_instance_loss(f, f, ok-3),
                 lambda: C.view_invariance_loss(f, f, P, labels-3, ok)):
        with pytest.raises(ValueError, match='label -3: -1 is the only label below 0'): call()


def test_views_draw_8192_negatives_unless_told():
    labels, e = torch.cat([torch.zeros(3).long(), torch.arange(1, 9001)]), torch.eye(3)
    def loss(n, **s):
        i = torch.arange(2)
        return C.view_invariance_loss(e[[0, 0]], e[[0, 0]], e[[1]].expand(n, 3), labels[:n], i, terms=(1, 0, 0), **s)
    for n, s, k in ((9003, {}, 8192), (9003, dict(n_negatives=None), 9000), (103, {}, 100)):
        assert abs(loss(n, **s).item()-math.log(1+k)) < 1e-4


def test_batches_without_strangers_warn_at_the_callers_line():
    f, z = torch.randn(4, 3), torch.zeros(4).long()
    keys, mask = torch.randn(5, 3), torch.zeros(4, 5).bool()
    for call in (lambda: C.hard_instance_loss(f, f, torch.tensor([0, 0, 0, -1])), lambda: C.info_nce(f, f, keys, .1, mask),
                 lambda: C.info_nce(f, f, keys[:0], .1), lambda: C.view_invariance_loss(f, f, f, z, z),
                 lambda: C.view_invariance_loss(f, f, f, z, z, n_negatives=None)):
        with pytest.warns(UserWarning, match='no negatives in the batch') as caught: assert call() == 0
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        C.hard_instance_loss(f, f, z-1), C.info_nce(f, f, keys, .1, ~mask), C.view_invariance_loss(f, f, f, z-1, z)
        C.hard_instance_loss(f, f, torch.tensor([0, 1, 1, -1])), C.view_invariance_loss(f, f, f, torch.arange(4), z)
