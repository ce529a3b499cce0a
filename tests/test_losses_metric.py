"""Properties of the triplet losses and the focal loss against literal loops."""
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from measure import value_and_gradient
from reidnb.losses import metric as M

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:no negatives in the batch')   # tested on purpose below
QUIET = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)
labels = st.one_of(st.lists(st.integers(-1, 3), max_size=12),   # any multiplicities, with outliers
                   st.integers(0, 8).map(lambda n: [2]*n),      # one person
                   st.integers(0, 8).map(lambda n: [-1]*n),     # outliers alone
                   st.integers(0, 8).map(lambda n: list(range(n))))   # one image a person
margins = st.one_of(st.none(), st.floats(0, 3))


def long(y): return torch.tensor(y, dtype=torch.long)


def features(n, seed, duplicates=False, dim=3):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, dim, generator=g, dtype=torch.float64)
    return f[torch.randint(n, (n,), generator=g)] if duplicates and n else f


def hinge(x, margin): return math.log1p(math.exp(x)) if margin is None else max(0., x+margin)


def slow(s, y, keys, margin, skip_self):
    "One term for each row with a positive and a negative, None for the others"
    terms = []
    for i in range(len(y)):
        pos = [s[i][j] for j in range(len(keys)) if keys[j] == y[i] and not (skip_self and i == j)]
        neg = [s[i][j] for j in range(len(keys)) if keys[j] != y[i] and keys[j] >= 0]
        terms.append(hinge(max(pos)-min(neg), margin) if y[i] >= 0 and pos and neg else None)
    return terms


def mean(terms):
    terms = [t for t in terms if t is not None]
    return sum(terms)/len(terms) if terms else 0.


def distances(f): return [[math.dist(a, b) for b in f.tolist()] for a in f.tolist()]


@QUIET
@given(labels, margins, st.booleans(), st.booleans(), seeds)
def test_batch_hard_equals_loop(y, margin, exclude, duplicates, seed):
    f = features(len(y), seed, duplicates)
    value, _ = value_and_gradient(lambda x: M.batch_hard_triplet(x, long(y), margin, exclude_self=exclude), f)
    terms = slow(distances(f), y, y, margin, exclude)
    assert value == pytest.approx(mean(terms), abs=1e-5)
    each = M.batch_hard_triplet(f, long(y), margin, exclude_self=exclude, reduction='none')
    assert each.tolist() == pytest.approx([t or 0. for t in terms], abs=1e-5)
    total = M.batch_hard_triplet(f, long(y), margin, exclude_self=exclude, reduction='sum')
    assert total.item() == pytest.approx(sum(t or 0. for t in terms), abs=1e-4)


@QUIET
@given(labels, labels, margins, st.booleans(), st.sampled_from([1., 90.]), seeds)
def test_hard_triplet_on_rectangles(y, keys, margin, similarity, scale, seed):
    z = scale*features(len(y), seed, dim=max(len(keys), 1))[:, :len(keys)]
    value, _ = value_and_gradient(lambda x: M.hard_triplet(x, long(y), margin, key_y=long(keys), similarity=similarity), z)
    s = (-z if similarity else z).tolist()
    assert value == pytest.approx(mean(slow(s, y, keys, margin, False)), rel=1e-9, abs=1e-7)


@QUIET
@given(labels, margins, seeds)
def test_logits_never_use_the_diagonal(y, margin, seed):
    z = features(len(y), seed, dim=max(len(y), 1))[:, :len(y)]
    value, g = value_and_gradient(lambda x: M.hard_triplet(x, long(y), margin, similarity=True), z)
    assert value == pytest.approx(mean(slow((-z).tolist(), y, y, margin, True)), abs=1e-7)
    assert not g.diagonal().any()
    changed = z+torch.diag(torch.randn(len(y), dtype=z.dtype)*100)
    assert M.hard_triplet(changed, long(y), margin, similarity=True).item() == value


@QUIET
@given(labels, margins, seeds)
def test_triplets_do_not_see_order_or_outliers(y, margin, seed):
    f, y = features(len(y), seed), long(y)
    p = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    one = M.batch_hard_triplet(f, y, margin).item()
    assert M.batch_hard_triplet(f[p], y[p], margin).item() == pytest.approx(one, abs=1e-9)
    assert M.batch_hard_triplet(f[y >= 0], y[y >= 0], margin).item() == pytest.approx(one, abs=1e-9)


@pytest.mark.parametrize('margin', [5., None])
def test_gradients(margin):
    f, y = features(9, 0), long([0, 0, 0, 1, 1, 2, 3, -1, -1])
    check = torch.autograd.gradcheck
    assert check(lambda x: M.batch_hard_triplet(x, y, margin), f.requires_grad_())
    z = features(9, 1, dim=9).requires_grad_()
    assert check(lambda x: M.hard_triplet(x, y, margin, similarity=True), z)
    assert check(lambda a: M.triplet(a, f[3:6], f[6:], margin), features(3, 2).requires_grad_())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    f, y = (20*features(8, 0, dim=2048)).to(dtype), long([0, 0, 1, 1, 2, 2, 3, -1])
    full = M.batch_hard_triplet(f.float(), y, None)
    with torch.autocast('cpu', dtype=torch.bfloat16): half = M.batch_hard_triplet(f, y, None)
    assert half.dtype == torch.float32 and half.item() == full.item()
    z, t = f[:, :5], long([0, 1, 2, 3, 4, 0, 1, -1])
    with torch.autocast('cpu', dtype=torch.bfloat16): half = M.focal_bce(z, t)
    assert half.dtype == torch.float32 and half.item() == M.focal_bce(z.float(), t).item()


def test_an_image_alone_is_at_distance_zero_of_itself():
    "float32 rounding of a large feature's distance to itself exceeds 0.5"
    f, y = 100+features(5, 0, dim=2048).float(), torch.arange(5)
    exact = mean(slow(distances(f), y.tolist(), y.tolist(), 99., False))
    assert M.batch_hard_triplet(f, y, 99.).item() == pytest.approx(exact, abs=.1)
    assert M.pairwise_distance(f, f).diagonal().max() > .5   # why the loss needs a zero here


def test_triplet_of_equal_points_and_none():
    x = torch.ones(3, 2)
    value, _ = value_and_gradient(lambda a: M.triplet(a, x, x, .3), x)
    assert value == pytest.approx(.3)
    assert value_and_gradient(lambda a: M.triplet(a, a, a), x[:0])[0] == 0


def slow_focal(z, y, gamma, valid):
    total, rows = 0., [i for i, t in enumerate(y) if t >= 0]
    for i in rows:
        for j in range(z.shape[1]):
            if not valid[i][j]: continue
            p = 1/(1+math.exp(-z[i, j].item()))
            hat, wrong = (p, 1-p) if y[i] == j else (1-p, p)
            total -= wrong**gamma*math.log(hat)
    return total/max(len(rows), 1)


@QUIET
@given(st.lists(st.integers(-1, 4), max_size=8), st.sampled_from([0, .3, 1, 2, 5.]), st.integers(0, 2), seeds)
def test_focal_equals_loop(y, gamma, mask, seed):
    g = torch.Generator().manual_seed(seed)
    z = 3*torch.randn(len(y), 5, generator=g, dtype=torch.float64)
    valid = [None, torch.rand(5, generator=g) < .6, torch.rand(len(y), 5, generator=g) < .6][mask]
    table = (torch.ones(len(y), 5) if valid is None else valid.expand(len(y), 5)).tolist()
    value, grad = value_and_gradient(lambda x: M.focal_bce(x, long(y), gamma, valid), z)
    assert value == pytest.approx(slow_focal(z, y, gamma, table), abs=1e-9)
    if valid is not None: assert not grad[~valid.expand(len(y), 5)].any()
    assert not grad[long(y) < 0].any()
    p = torch.randperm(5, generator=g)   # the order of the classes
    moved = torch.where(long(y) >= 0, p.argsort()[long(y).clamp(min=0)], -1)
    v = valid if valid is None else valid[..., p]
    assert M.focal_bce(z[:, p], moved, gamma, v).item() == pytest.approx(value, abs=1e-9)


@QUIET
@given(st.floats(0, 6), st.lists(st.floats(-90, 90), min_size=1, max_size=6), seeds)
def test_focal_is_stable_in_single_precision(gamma, z, seed):
    y = torch.randint(len(z), (1,), generator=torch.Generator().manual_seed(seed))
    single, g32 = value_and_gradient(lambda x: M.focal_bce(x, y, gamma), torch.tensor([z]))
    double, g64 = value_and_gradient(lambda x: M.focal_bce(x, y, gamma), torch.tensor([z]).double())
    assert single == pytest.approx(double, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(g32.double(), g64, rtol=1e-3, atol=3e-4)


@QUIET
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), seeds)
def test_focal_without_focus_is_bce(y, seed):
    z = 3*torch.randn(len(y), 5, generator=torch.Generator().manual_seed(seed))
    hot = torch.nn.functional.one_hot(long(y), 5)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, hot.float(), reduction='sum')/len(y)
    for target in (long(y), hot, hot.bool(), hot.float()):
        assert M.focal_bce(z, target, 0).item() == pytest.approx(bce.item(), rel=1e-5)


def test_bad_input_is_named():
    z, y = torch.zeros(3, 4), long([0, 1, 2])
    for call, word in ((lambda: M.focal_bce(z, y[:2]), '2 labels'), (lambda: M.focal_bce(z, z+.5), 'soft'),
                       (lambda: M.focal_bce(z, z[:, :2]), r'\(3, 2\)'), (lambda: M.focal_bce(z, y, -1), 'gamma -1'),
                       (lambda: M.focal_bce(z, y, reduction='avg'), 'avg'),
                       (lambda: M.focal_bce(z, y+2), r'class 4 is outside 0\.\.3'),
                       (lambda: M.focal_bce(z, y-2), r'class -2 is outside 0\.\.3'),
                       (lambda: M.batch_hard_triplet(z, y-2), 'label -2: -1 is the only label below 0'),
                       (lambda: M.hard_triplet(z, y, key_y=long([0, 1, -5, 2])), 'label -5: -1 is'),
                       (lambda: M.hard_triplet(z, y), '3 queries and 3 keys'),
                       (lambda: M.hard_triplet(z, y, key_y=long([0, 1, 2, 3]), exclude_self=True), 'exclude_self'),
                       (lambda: M.batch_hard_triplet(z, y[:2]), '3 features for 2'),
                       (lambda: M.triplet(z, z, z[:1]), 'shapes differ')):
        with pytest.raises(ValueError, match=word): call()


@pytest.mark.parametrize('norm, spacing, dim', [(135., 1.3, 2048), (135., 1.3, 16), (1000., .5, 256)])
@pytest.mark.parametrize('margin', [20., None])
def test_close_pairs_have_the_gradient_of_float64(norm, spacing, dim, margin):
    "Long features near each other: the product of features cancels, their difference does not"
    g = torch.Generator().manual_seed(0)
    at, step = torch.nn.functional.normalize(torch.randn(2, dim, generator=g, dtype=torch.float64), dim=1)
    where = torch.tensor([0., 1., 3., 4.5, 7., 8., 12.], dtype=torch.float64)   # no two distances tie
    f, y = (norm*at+spacing*where[:, None]*step).float(), long([0, 0, 0, 1, 1, 2, 2])
    v32, g32 = value_and_gradient(lambda x: M.batch_hard_triplet(x, y, margin), f)
    v64, g64 = value_and_gradient(lambda x: M.batch_hard_triplet(x, y, margin), f.double())
    assert v32 == pytest.approx(v64, rel=1e-5, abs=1e-5)
    assert (g32-g64).abs().max() < 1e-4*g64.abs().max()


def test_a_person_without_strangers_warns_at_the_callers_line():
    f, one, off = torch.randn(4, 3), torch.zeros(4).long(), torch.full((4,), -1)
    for call in (lambda y: M.batch_hard_triplet(f, y), lambda y: M.hard_triplet(f@f.T, y, similarity=True),
                 lambda y: M.hard_triplet(f@f.T, one, key_y=y)):
        with pytest.warns(UserWarning, match='no negatives in the batch') as caught: assert call(one) == 0
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        M.batch_hard_triplet(f, off), M.batch_hard_triplet(f[:0], off[:0])         # nobody is no warning
        M.batch_hard_triplet(f, long([0, 0, 0, 1])), M.hard_triplet(f@f.T, torch.arange(4), similarity=True)
