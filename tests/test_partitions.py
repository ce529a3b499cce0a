"Properties and faults of partitions, branches, heads, centroids, tracklets."
import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reidnb.networks import partitions as P
from reidnb.networks import frames as T
from reidnb.networks.backbones import make_backbone
from reidnb.data.crops import Crops

torch.set_num_threads(1)
QUIET = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)


# --- pooling of parts --------------------------------------------------------------------------
@QUIET
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), seeds)
def test_stripes_equal_adaptive_pooling_for_any_height(H, n, W, C, seed):
    x = torch.randn(2, C, H, W, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(P.Stripes(n, 'gmp')(x), F.adaptive_max_pool2d(x, (n, 1))[..., 0].mT)
    torch.testing.assert_close(P.Stripes(n, 'gap')(x), F.adaptive_avg_pool2d(x, (n, 1))[..., 0].mT)
    rows = P.Stripes(n).rows(H)
    assert rows[0][0] == 0 and rows[-1][1] == H and all(a < b for a, b in rows)
    if H % n == 0: assert [a for a, _ in rows[1:]] == [b for _, b in rows[:-1]]


@QUIET
@given(st.integers(1, 3000), st.integers(1, 12))
def test_channel_groups_are_even_and_cover(C, n):
    if n > C:
        with pytest.raises(ValueError, match=f'{C} channels'): P.ChannelGroups(n).sizes(C)
        return
    sizes = P.ChannelGroups(n).sizes(C)
    assert sum(sizes) == C and len(sizes) == n and sizes == sorted(sizes, reverse=True) and sizes[0]-sizes[-1] <= 1
    assert P.ChannelGroups(sizes).sizes(C) == sizes


@pytest.mark.parametrize('bad', [0, (), (3, 0), (-1, 4)])
def test_empty_groups_are_refused(bad):
    with pytest.raises(ValueError, match='at least one'): P.ChannelGroups(bad)


@QUIET
@given(st.sampled_from(['gap', 'gmp', 'gem']), st.integers(2, 5), seeds)
def test_a_channel_group_is_a_cut_of_the_pooled_vector(kind, n, seed):
    x = torch.randn(2, 13, 6, 3, generator=torch.Generator().manual_seed(seed))
    pool, groups = P.Stripes(3, kind), P.ChannelGroups(n)
    for i, part in enumerate(groups(x)):
        a = sum(groups.sizes(13)[:i])
        torch.testing.assert_close(pool(part), pool(x)[..., a:a+part.shape[1]])


# --- networks from random descriptions ---------------------------------------------------------
heads = st.tuples(st.sampled_from(['gap', 'gmp', 'gem']), st.sampled_from([None, 1, 2, 3, 5]),
                  st.sampled_from([None, 2, 3, (100, 92)]), st.sampled_from(['conv', 'neck', 'fc', None]), st.booleans())


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(heads, min_size=1, max_size=4), min_size=1, max_size=3),
       st.sampled_from([None, 'layer2', 'layer3', 'layer3.0', 'layer4']), st.sampled_from(['reduced', 'pooled']), seeds)
def test_any_description_builds_what_it_says(spec, cut, test_feature, seed):
    torch.manual_seed(seed)
    branches, k = [], 0
    for b, hs in enumerate(spec):
        made = []
        for pool, rows, groups, reduce, on in hs:
            n = len(groups) if isinstance(groups, tuple) else groups
            made.append(P.HeadSpec(f'h{k}', rows and (k % rows, rows), groups and (k % n, groups), pool, reduce,
                                   classifier=on, is_global=not on)); k += 1
        branches.append(P.BranchSpec(f'b{b}', tuple(made), extra_blocks=b % 2))
    a = P.Architecture('any', tuple(branches), cut, test_feature)
    net = P.MultiBranch(make_backbone('small'), a, 4).eval()
    x = torch.randn(3, 3, 64, 32)
    with torch.no_grad(): out, maps, f = net(x), net.maps(x), net.embed(x)
    assert list(out.pooled) == list(out.reduced) == [h.name for h in a.heads]
    assert list(out.logits) == [h.name for h in a.heads if h.classifier]
    assert list(net.for_triplet(out)) == [h.name for h in a.heads if h.is_global]
    for b in a.branches:
        for h in b.heads:      # rows, then channels, then pooling: not the order of the code
            m, (i, n) = maps[b.name], h.rows or (0, 1)
            H = m.shape[2]
            m = m[:, :, i*H//n:-(-(i+1)*H//n)]
            if h.channels: m = P.ChannelGroups(h.channels[1])(m)[h.channels[0]]
            v = {'gap': lambda: m.mean((2, 3)), 'gmp': lambda: m.amax((2, 3)),
                 'gem': lambda: m.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1/3)}[h.pool]()
            torch.testing.assert_close(out.pooled[h.name], v)
            assert (v.shape[1], out.reduced[h.name].shape[1]) == h.widths(192)
    torch.testing.assert_close(f, F.normalize(torch.cat(list(getattr(out, test_feature).values()), 1), dim=1))
    assert f.shape == (3, net.dim)
    again = P.MultiBranch(make_backbone('small'), a, 4).eval()
    again.load_state_dict(net.state_dict())
    with torch.no_grad(): assert again.embed(x).equal(f)
    assert all(h.name in a.table(192) for h in a.heads) and len(P._diagram(a, 192, ['k'])[0]) > 0


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'mobilenet_v2', 'efficientnet_b0'])
@pytest.mark.parametrize('preset', [P.pcb, P.scr])
def test_other_networks(name, preset):
    net = P.MultiBranch(make_backbone(name), preset(), 3).eval()
    with torch.inference_mode(): out = net(torch.randn(1, 3, 96, 48))
    c = net.channels
    assert {v.shape[1] for v in out.reduced.values()} == {c//8}
    assert all(v.isfinite().all() for part in out for v in part.values())


def test_basic_blocks_make_basic_extra_blocks():
    a, m, t = P.MultiBranch(make_backbone('resnet18'), P.asymmetric(third_branch=True)).branches.values()
    assert (len(a), len(m), len(t)) == (1, 2, 3) and type(m[1]).__name__ == 'BasicBlock'
    assert m[1].conv1.weight.shape == (512, 512, 3, 3) and m[1].downsample is None


def test_frozen_stages_stay_frozen_in_every_branch():
    net = P.MultiBranch(make_backbone('small', frozen_stages=4), P.scr(), 3).train()
    assert not any(p.requires_grad for p in net.shared.parameters())
    y, x = torch.arange(4) % 3, torch.randn(4, 3, 64, 32)
    before = copy.deepcopy(net.state_dict())
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .1)
    sum(F.cross_entropy(z, y) for z in net(x).logits.values()).backward(); opt.step()
    for k, v in net.state_dict().items():
        if k.startswith('shared'): assert v.equal(before[k]), k
    assert not net.branches['p2'][0].layer4[0].conv1.weight.equal(before['branches.p2.0.layer4.0.conv1.weight'])


def test_branches_learn_apart_and_every_head_learns():
    torch.manual_seed(0)
    net, x, y = P.MultiBranch(make_backbone('small'), P.scr(), 3).train(), torch.randn(6, 3, 64, 32), torch.arange(6) % 3
    for name, b in [(h.name, b.name) for b in P.scr().branches for h in b.heads]:
        net.zero_grad(set_to_none=True)
        F.cross_entropy(net(x).logits[name], y).backward()
        for k, p in net.named_parameters():
            own = k.startswith(('shared.', f'branches.{b}.', f'heads.{name}.'))
            assert (p.grad is not None) == own, (name, k)


def test_heads_survive_accelerate_pickle_and_autocast():
    from accelerate.utils import convert_outputs_to_fp32
    net = P.MultiBranch(make_backbone('small'), P.scr(), 3).eval()
    x = torch.randn(2, 3, 64, 32)
    with torch.autocast('cpu', torch.bfloat16): out = net(x)
    assert all(v.dtype == torch.float32 for v in out.pooled.values()) and net.embed(x).dtype == torch.float32
    full = convert_outputs_to_fp32(lambda: out)()
    assert isinstance(full, P.Heads) and {v.dtype for part in full for v in part.values()} == {torch.float32}
    same = pickle.loads(pickle.dumps(net))
    assert same.embed(x).equal(net.embed(x)) and same.architecture == net.architecture


# --- centroids and classifiers -----------------------------------------------------------------
@QUIET
@given(st.lists(st.integers(-1, 5), min_size=0, max_size=40), seeds)
def test_centroids_equal_a_loop(labels, seed):
    _, y = np.unique([k for k in labels if k >= 0], return_inverse=True)
    new, it = [], iter(y)
    for k in labels: new.append(int(next(it)) if k >= 0 else -1)
    y = torch.tensor(new, dtype=torch.int64)
    f = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    c = P.class_centroids(f, y)
    assert c.shape == (len(set(new)-{-1}), 3) and not c.requires_grad
    for k, row in enumerate(c): torch.testing.assert_close(row, torch.stack([v for v, l in zip(f, new) if l == k]).mean(0).detach())
    p = torch.randperm(len(y))
    torch.testing.assert_close(P.class_centroids(f[p], y[p]), c)
    if len(c):
        w = P.set_classifier(P.Classifier(3, 2), c).weight
        torch.testing.assert_close(w, F.normalize(c, dim=1), check_stride=False)
    else:
        with pytest.raises(ValueError, match='at least one cluster'): P.set_classifier(P.Classifier(3, 2), c)


def test_set_classifier_keeps_device_gradient_rule_and_offset():
    c = P.Classifier(4, 9, bias=True); old = c.weight
    P.set_classifier(c.requires_grad_(False), 3*torch.eye(4)[:2], unit=False)
    assert c.weight is not old and not c.weight.requires_grad and not c.bias.requires_grad
    assert c.out_features == 2 and c(torch.eye(4)).equal(3*torch.eye(4)[:, :2]) and 'out_features=2' in repr(c)
    with pytest.raises(ValueError, match='4 channels'): P.set_classifier(c, torch.ones(3, 5))


def test_a_checkpoint_brings_its_number_of_classes():
    def make(): return P.MultiBranch(make_backbone('small'), P.asymmetric())
    net = make(); net.set_classifiers(torch.randn(7, net.dim))
    file = io.BytesIO(); torch.save(net.state_dict(), file); file.seek(0)
    other = make(); other.set_classifiers(torch.randn(3, net.dim))
    for m in (make(), other):
        file.seek(0); m.load_state_dict(torch.load(file))
        assert m.heads['m'].classifier.weight.equal(net.heads['m'].classifier.weight)
    net.load_state_dict(make().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match='Missing key'): net.load_state_dict(make().state_dict())


# --- embedding ---------------------------------------------------------------------------------
@QUIET
@given(st.sampled_from(['code', 'relu_drop_norm']), st.floats(0, .9), st.booleans(), seeds)
def test_embedding_paths(order, p, training, seed):
    torch.manual_seed(seed)
    m = P.EmbeddingFC(5, 16, dropout=p, target_head=order).train(training)
    e = m(torch.randn(8, 5)); t = m.target(e)
    assert t.isfinite().all() and m.source(e).min() >= 0
    if order == 'relu_drop_norm': assert (t.norm(dim=1) < 1+1e-5).all()
    elif not training: torch.testing.assert_close(t.norm(dim=1), torch.ones(8))
    t.sum().backward(); assert m.fc.weight.grad.isfinite().all()


# --- time --------------------------------------------------------------------------------------
@QUIET
@given(st.lists(st.integers(1, 70), min_size=0, max_size=20), st.integers(1, 20), st.sampled_from(['even', 'random']), seeds)
def test_samples_are_sorted_and_inside(lengths, n, how, seed):
    j = T.sample_frames(np.array(lengths, int), n, how, seed)
    assert j.shape == (len(lengths), n) and j.dtype == np.int64 and (np.diff(j, axis=1) >= 0).all()
    for row, length in zip(j, lengths):
        assert 0 <= row.min() and row.max() < length
        if length >= n: assert len(set(row.tolist())) == n
    if how == 'even':
        for row, length in zip(j, lengths):
            assert row.tolist() == [int((t+.5)*length/n+1e-9) for t in range(n)]
    assert (j == T.sample_frames(np.array(lengths, int), n, how, seed)).all()


@QUIET
@given(st.integers(1, 20), st.integers(1, 20), seeds)
def test_groups_of_time_equal_a_loop(n, groups, seed):
    f = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed))
    if groups > n:
        with pytest.raises(ValueError, match=f'{groups} groups'): T.temporal_pool(f, groups)
        return
    slow = torch.stack([torch.cat([torch.stack(list(c)).mean(0) for c in x.tensor_split(groups)]) for x in f])
    torch.testing.assert_close(T.temporal_pool(f, groups), slow)


@QUIET
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=30),
       st.integers(1, 3), st.sampled_from(['even', 'random']), seeds)
def test_tracklet_features_do_not_depend_on_row_order(keys, groups, how, seed):
    rng, n = np.random.default_rng(seed), len(keys)
    pids, cams, tracks = np.array(keys).T
    images = np.zeros((n, 2, 2, 3), np.uint8)
    crops = Crops(images, pids, cams, rng.permutation(n), tracks)
    f, p = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), rng.permutation(n)
    one = T.tracklet_features(f, crops, frames=5, pooling=groups, sampling=how, seed=seed)
    two = T.tracklet_features(f[p], crops[p], frames=5, pooling=groups, sampling=how, seed=seed)
    assert one[0].equal(two[0]) and (one[1] == two[1]).all() and (one[2] == two[2]).all()
    assert one[0].shape == (len(set(keys)), 4*groups)
    assert list(zip(one[1], one[2])) == [k[:2] for k in sorted(set(keys))]


def test_an_fc_head_is_the_head_of_ecn_by_default():
    def made(**how):
        a = P.Architecture('a', (P.BranchSpec('b', (P.HeadSpec('e', pool='gap', reduce='fc', **how),)),))
        return P.MultiBranch(make_backbone('small'), a, 3)
    e = made().heads['e'].reduce
    assert (e.relu, e.dropout.p, e.target_head, e.bn.bias.requires_grad) == (True, .5, 'code', True)
    bare = made(relu=False, dropout=0., target_head='relu_drop_norm').heads['e'].reduce
    assert (bare.relu, bare.dropout.p, bare.target_head) == (False, 0, 'relu_drop_norm')
    net, x = made().train(), torch.randn(8, 3, 64, 32)
    out = net(x)
    v = net.heads['e'].reduce.target(out.reduced['e'])      # BN, norm, dropout: kept entries of a unit vector, twice
    kept = v != 0
    torch.testing.assert_close(v[kept], 2*F.normalize(out.reduced['e'], dim=1)[kept])
    assert .3 < kept.float().mean() < .7 and v.min() < 0
    head = net.heads['e'].reduce
    assert torch.equal(net.eval().heads['e'].classifier(F.relu(head(out.pooled['e']))), net.heads['e'](out.pooled['e'])[1])


def test_other_heads_have_neither_relu_nor_dropout_by_default():
    for reduce in ('conv', 'neck', None):
        h = P.HeadSpec('h', reduce=reduce)
        assert (h.relu, h.dropout) == (False, 0) and h == P.HeadSpec('h', reduce=reduce, relu=False, dropout=0.)
    assert all(h.relu for h in P.pcb().heads) and P.asymmetric(dropout=.3).heads[0].dropout == .3
    with pytest.raises(ValueError, match="target_head='paper'"): P.HeadSpec('h', reduce='fc', target_head='paper')
