"""Properties of the distillation losses against slow transcriptions."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from measure import value_and_gradient
from reidnb.losses.distillation import (
    consistency_loss, cross_branch, hardest_pairs, soft_cross_entropy, soft_triplet,
    target_loss, target_terms, triplet_log_share)
from reidnb.losses.metric import batch_hard_triplet

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:no negatives in the batch')   # tested on purpose below
QUIET = settings(max_examples=60, deadline=None)
SEED = st.integers(0, 2**31)
KINDS = ('kl_qp', 'kl_pq', 'mse')


def log_softmax(v):
    top = max(v)
    total = top+math.log(sum(math.exp(x-top) for x in v))
    return [x-total for x in v]


def slow_soft_ce(z, t, valid=None):
    "Thesis eqs. 4.4, 4.5, a loop over images and classes"
    terms = []
    for i in range(len(z)):
        if valid is not None and not valid[i]: continue
        p, q = log_softmax(t[i].tolist()), log_softmax(z[i].tolist())
        terms.append(-sum(math.exp(a)*b for a, b in zip(p, q)))
    return sum(terms)/len(terms) if terms else 0.


def slow_soft_triplet(f, t, y, mine='student', positive_only=False):
    "Thesis eqs. 4.6, 4.7, loops over anchors and candidates, in float64"
    f, t = f.double(), t.double()
    miner, terms = f if mine == 'student' else t, []
    for i in range(len(f)):
        P = [j for j in range(len(f)) if y[j] == y[i]]
        N = [j for j in range(len(f)) if y[j] != y[i] and y[j] >= 0]
        if y[i] < 0 or not N: continue
        far = lambda j: float((miner[i]-miner[j]).norm())
        p, n = max(P, key=far), min(N, key=far)
        share = lambda x: log_softmax([float((x[i]-x[p]).norm()), float((x[i]-x[n]).norm())])
        T, S = share(t), share(f)
        terms.append(-sum(math.exp(T[c])*S[c] for c in range(1 if positive_only else 2)))
    return sum(terms)/len(terms) if terms else 0.


def slow_consistency(f, keys, plain, index, kind, tau):
    "Thesis eqs. 6.10-6.12, a loop over anchors and keys"
    cos, total = lambda a, b: float(F.cosine_similarity(a.double(), b.double(), dim=0)), 0.
    for a, r in enumerate(index):
        p = log_softmax([cos(f[a], k)/tau for k in keys])
        q = log_softmax([cos(plain[r], k)/tau for k in plain])
        for x, z in zip(p, q):
            total += {'kl_qp': math.exp(z)*(z-x), 'kl_pq': math.exp(x)*(x-z),
                      'mse': (math.exp(x)-math.exp(z))**2}[kind]
    return total if kind == 'mse' else total/len(f)


def near(a, b, tol=1e-4): assert abs(a-b) <= tol*max(1, abs(b)), (a, b)


@QUIET
@given(st.integers(1, 8), st.integers(1, 6), st.sampled_from([1., 10., 90.]), st.booleans(), SEED)
def test_soft_cross_entropy_equals_the_loops(b, c, scale, some, seed):
    g = torch.Generator().manual_seed(seed)
    z, t = (scale*(2*torch.rand(b, c, generator=g)-1) for _ in range(2))
    valid = torch.rand(b, generator=g) < .5 if some else None
    v, grad = value_and_gradient(lambda x: soft_cross_entropy(x, t, valid), z)
    near(v, slow_soft_ce(z, t, valid))
    mask = torch.ones(b, dtype=torch.bool) if valid is None else valid
    torch.testing.assert_close(grad, (z.softmax(1)-t.softmax(1))*mask[:, None]/max(int(mask.sum()), 1), rtol=1e-4, atol=1e-6)
    p, q = torch.randperm(b, generator=g), torch.randperm(c, generator=g)
    near(soft_cross_entropy(z[p][:, q], t[p][:, q], None if valid is None else valid[p]).item(), v)
    assert v >= soft_cross_entropy(t, t, valid).item()-1e-4


@st.composite
def batches(draw):
    b, d, e = draw(st.integers(1, 12)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    g = torch.Generator().manual_seed(draw(SEED))
    y = torch.randint(-1, draw(st.integers(0, 6)), (b,), generator=g)       # may hold only outliers, or one person
    f = draw(st.sampled_from([.1, 1., 20.]))*torch.randn(b, d, generator=g)
    return f, draw(st.sampled_from([.1, 1., 20.]))*torch.randn(b, e, generator=g), y, g


@QUIET
@given(batches(), st.sampled_from(['student', 'teacher']), st.booleans())
def test_soft_triplet_equals_the_loops(case, mine, only):
    f, t, y, g = case
    loss = lambda x, i=slice(None): soft_triplet(x, t[i], y[i], mine=mine, positive_only=only)
    v, grad = value_and_gradient(loss, f)
    near(v, slow_soft_triplet(f, t, y, mine, only), 1e-3)
    assert grad[y < 0].eq(0).all()
    p = torch.randperm(len(f), generator=g)
    near(loss(f[p], p).item(), v)


@QUIET
@given(st.integers(1, 10), st.integers(0, 3), st.sampled_from([0., 1., 60.]), SEED)
def test_duplicates_and_large_norms_stay_finite(b, people, norm, seed):
    g = torch.Generator().manual_seed(seed)
    f = norm*F.normalize(torch.randn(1, 2048, generator=g), dim=1).expand(b, -1)
    f = torch.where(torch.rand(b, 1, generator=g) < .5, f, norm*F.normalize(torch.randn(b, 2048, generator=g), dim=1))
    y = torch.randint(-1, people+1, (b,), generator=g)
    value_and_gradient(lambda x: soft_triplet(x, 3*f.flip(0), y), f)
    with torch.autocast('cpu', torch.bfloat16): value_and_gradient(lambda x: soft_triplet(x, f[:, :7], y), f)
    if len(set(y[y >= 0].tolist())) < 2: assert soft_triplet(f, f, y).item() == 0


def test_equal_distances_give_log_two_for_any_teacher_scale():
    f, y = torch.eye(6), torch.tensor([0, 0, 1, 1, 2, 2])
    for scale in (.01, 1, 60): near(soft_triplet(f, scale*f, y).item(), math.log(2), 1e-6)
    assert triplet_log_share(f, torch.arange(6), torch.arange(6)).exp().eq(.5).all()


def test_a_sure_teacher_is_the_hard_soft_margin_triplet():
    g = torch.Generator().manual_seed(0)
    f, y = 5*torch.randn(12, 6, generator=g), torch.arange(12) % 4
    near(soft_triplet(f, 1000.*F.one_hot(y).float(), y).item(), batch_hard_triplet(f, y, None).item())


def test_gradients_in_double_precision():
    g = torch.Generator().manual_seed(1)
    f, t, y = torch.randn(8, 4, generator=g).double(), torch.randn(8, 4, generator=g), torch.tensor([0, 0, 0, 1, 1, 2, -1, 2])
    check = lambda loss: torch.autograd.gradcheck(loss, f.clone().requires_grad_())
    assert check(lambda x: soft_cross_entropy(x, t, y >= 0))
    for only in (False, True):
        for mine in ('student', 'teacher'): assert check(lambda x: soft_triplet(x, t, y, mine=mine, positive_only=only))
    for kind in KINDS: assert check(lambda x: consistency_loss(x, t, t.flip(1), kind=kind))
    assert check(lambda x: target_loss(target_terms([x, 2*x], [t, t], [x, x], [t, t.flip(1)], y.clamp(max=3)), 2))


def test_teachers_carry_no_gradient():
    f, t, m = (torch.randn(6, 4, requires_grad=True) for _ in range(3))
    y = torch.arange(6) // 2
    terms = target_terms([f], [t], [f], [m], y, cross=False)
    (target_loss(terms, 1)+consistency_loss(f, t, m)).backward()
    assert t.grad is None and m.grad is None and f.grad.ne(0).any()


@QUIET
@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5), st.sampled_from(KINDS), st.sampled_from([.05, .4, 1.]),
       st.booleans(), SEED)
def test_consistency_equals_the_loops(b, more, d, kind, tau, by_row, seed):
    g = torch.Generator().manual_seed(seed)
    f, keys, plain = (torch.randn(n, d, generator=g) for n in (b, b+more, b+more))
    start = int(torch.randint(0, more+1, (), generator=g))
    rows = torch.randperm(b+more, generator=g)[:b] if by_row else torch.arange(start, start+b)
    loss = lambda x, k=keys, m=plain, i=rows if by_row else start: consistency_loss(x, k, m, index=i, temperature=tau, kind=kind)
    v, _ = value_and_gradient(loss, f)
    near(v, slow_consistency(f, keys, plain, rows.tolist(), kind, tau))
    assert v >= -1e-5
    p, q = torch.randperm(b, generator=g), torch.randperm(b+more, generator=g)
    near(loss(3*f[p], keys[q], 2*plain[q], q.argsort()[rows[p]]).item(), v)
    near(consistency_loss(plain[rows], plain, plain, index=rows, temperature=tau, kind=kind).item(), 0, 1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_consistency_at_similarities_of_ninety(kind):
    g = torch.Generator().manual_seed(3)
    f, keys, plain = torch.randn(3, 6, 3, generator=g)
    v, _ = value_and_gradient(lambda x: consistency_loss(x, keys, plain, temperature=1/90, kind=kind), f)
    near(v, slow_consistency(f, keys, plain, range(6), kind, 1/90), 1e-3)
    with torch.autocast('cpu', torch.bfloat16):
        near(consistency_loss(f, keys, plain, temperature=1/90, kind=kind).item(), v, 1e-5)
    value_and_gradient(lambda x: consistency_loss(x, torch.ones(6, 3), torch.ones(6, 3), kind=kind), torch.ones(6, 3))


def test_shares_of_processes_have_the_mean_of_the_whole():
    f, keys, plain = torch.randn(3, 8, 5)
    for kind, join in (('kl_qp', lambda v: sum(v)/2), ('kl_pq', lambda v: sum(v)/2), ('mse', sum)):
        parts = [consistency_loss(f[i:i+4], keys, plain, index=i, kind=kind).item() for i in (0, 4)]
        near(join(parts), consistency_loss(f, keys, plain, kind=kind).item())


@QUIET
@given(st.integers(1, 4), st.booleans(), SEED)
def test_target_terms_are_the_sums_over_pairs(branches, cross, seed):
    if cross and branches == 1: return
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(-1, 3, (7,), generator=g)
    P, Q = torch.randn(2, branches, 7, 3, generator=g)
    S, T = ([torch.randn(7, 2+k, generator=g) for k in range(branches)] for _ in range(2))
    terms = target_terms(list(P), list(Q), S, T, y, cross=cross)
    pairs = cross_branch(branches, cross)
    assert sorted(s for _, s in pairs) == list(range(branches)) and all((t != s) == cross for t, s in pairs)
    near(terms['sce'].item(), sum(slow_soft_ce(P[s], Q[t], y >= 0) for t, s in pairs))
    near(terms['stri'].item(), sum(slow_soft_triplet(S[s], T[t], y) for t, s in pairs), 1e-3)
    hard = lambda z: F.cross_entropy(z, y, ignore_index=-1, label_smoothing=.1).nan_to_num().item()
    near(terms['ce'].item(), sum(map(hard, P)))
    near(target_loss(terms, branches).item()*branches, target_loss(terms, branches, scale=1).item())


def test_hardest_pairs_ignore_outliers():
    f, y = torch.tensor([[0.], [2.], [2.5], [9.], [.1]]), torch.tensor([0, 0, 1, 1, -1])
    p, n, valid = hardest_pairs(f, y)
    assert p[:4].tolist() == [1, 0, 3, 2] and n[:4].tolist() == [2, 2, 1, 1] and valid.tolist() == [True]*4+[False]


@pytest.mark.parametrize('call, words', [
    (lambda x: soft_cross_entropy(x, x[:, :2]), r'\(4, 2\)'),
    (lambda x: soft_triplet(x, x[:3], torch.arange(4)), '3 teacher'),
    (lambda x: soft_triplet(x, x, torch.arange(3)), '4 features for 3 labels'),
    (lambda x: soft_triplet(x, x, torch.arange(4), mine='hard'), 'hard'),
    (lambda x: consistency_loss(x, x, x, kind='js'), 'js'),
    (lambda x: consistency_loss(x, x, x, index=1), 'row 1 of 4'),
    (lambda x: consistency_loss(x, x, x, index=torch.arange(3)), '3 rows'),
    (lambda x: consistency_loss(x, x, x[:3]), '3 plain'),
    (lambda x: target_terms([x], [x], [x], [x], torch.arange(4)), 'cross=False'),
    (lambda x: target_terms([x, x], [x], [x], [x], torch.arange(4)), 'numbers of branches'),
    (lambda x: target_loss({'ce': x.sum()}), 'terms'),
    (lambda x: target_loss(dict.fromkeys(('ce', 'sce', 'stri'), x.sum())), 'give n'),
    (lambda x: hardest_pairs(x, torch.arange(4)-2), 'label -2: -1 is the only'),
    (lambda x: target_terms([x], [x], [x], [x], torch.arange(4)+1, cross=False), r'class 4 is outside 0\.\.3'),
])
def test_faults_are_named(call, words):
    with pytest.raises(ValueError, match=words): call(torch.randn(4, 4))


@pytest.mark.parametrize('gap', [0., 1e-7, 1e-4])
def test_the_positive_is_a_copy_and_never_the_image_itself(gap):
    "The floor of the distance and float32 rounding put an image at more than 0 from itself"
    g = torch.Generator().manual_seed(0)
    for norm in (1., 40.):
        f = norm*F.normalize(torch.randn(6, 512, generator=g), dim=1)
        f[1], f[3] = f[0]*(1+gap), f[2]*(1+gap)
        positive = hardest_pairs(f, torch.tensor([0, 0, 1, 1, 2, -1]))[0]
        assert positive[:5].tolist() == [1, 0, 3, 2, 4]


def test_one_cluster_warns_at_the_callers_line():
    f, y = torch.randn(4, 3), torch.tensor([0, 0, 0, -1])
    with pytest.warns(UserWarning, match='no negatives in the batch') as caught: assert soft_triplet(f, f, y) == 0
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        soft_triplet(f, f, y*0-1), soft_triplet(f, f, torch.arange(4))


@pytest.mark.parametrize('n', [1, 2, 3])
def test_equal_branches_have_the_loss_of_one(n):
    x, t, y = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) // 2
    one = target_loss(target_terms([x], [t], [x], [t], y, cross=False), 1)
    terms = target_terms([x]*n, [t]*n, [x]*n, [t]*n, y, cross=n > 1)
    near(target_loss(terms, n).item(), one.item())
    near(target_loss(terms, scale=1).item(), n*one.item())
