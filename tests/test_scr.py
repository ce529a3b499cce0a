"SCR: heads and widths, the loss against equations 3.1-3.3, batches of frames, tracklets, and real runs of `fit`."
import math
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from children import STILL, agree, finish, keep_gradient, plain, same, smooth, start, start_world
from reidnb.data.crops import Crops, ReIDData
from reidnb.data.toys import toy_crops
from reidnb.datasets.catalogue import load
from reidnb.ranking.evaluation import cosine_distance, evaluate
from reidnb.methods.registry import recipe
from reidnb.practice.experiments import run_experiment
from reidnb.practice.opening import open_data
from reidnb.networks.extraction import extract
from reidnb.losses.identity import scr_loss
from reidnb.methods.scr import (
    fit_projection, head_cam, Projected, SCR, scr_architecture, SCRSettings, TrackletPK)
from reidnb.ranking.reranking import rerank_distances
from reidnb.core.checkpoints import load_checkpoint
from reidnb.data.video import tracklets
from reidnb.networks.frames import sample_frames
from reidnb.data.video import by_tracklet, tracklet_data, tracklet_table
from reidnb.datasets.videos import write_mars
from reidnb.training.scoring import compare_pooling, embed_tracklets, rank, score
from reidnb.core.checkpoints import seed_everything
from reidnb.training.loop import fit
from reidnb.training.models import load_model, save_model
from reidnb.world.sites import make_site

QUICK = dict(backbone='small', weights='none', height=48, width=24, p=4, k=2, epochs=4, steps=(3,), lr=1e-3)


def small(**k): return SCRSettings(**{**QUICK, **k})
def toy(n=8): return toy_crops(n_ids=n, n_cams=2, n_each=2)


def build(crops=None, **k):
    seed_everything(0)
    return SCR(small(**k), toy() if crops is None else crops)


# --- what METHODS section 13 asks for


@pytest.fixture(scope='module')
def full():
    "ResNet-50, random weights, in its full width, on a small picture"
    torch.manual_seed(0)
    method = SCR(SCRSettings(weights='none', p=4), toy(4))
    with torch.no_grad(): out = method.eval().network(torch.randn(1, 3, 96, 48))
    return method, out


def test_13_logits_3328_channels(full):
    method, out = full
    assert len(out.logits) == 13 and all(z.shape == (1, 4) for z in out.logits.values())
    assert all(v.shape == (1, 256) for v in out.reduced.values()) and method.network.dim == 3328
    names = 'g1 g2 s2_1 s2_2 c2_1 c2_2 g3 s3_1 s3_2 s3_3 c3_1 c3_2 c3_3'.split()
    assert list(out.logits) == names and list(method.network.for_triplet(out)) == ['g1', 'g2', 'g3']


def test_channel_groups_of_683_683_682(full):
    widths = {k: v.shape[1] for k, v in full[1].pooled.items()}
    assert [widths[f'c3_{i}'] for i in (1, 2, 3)] == [683, 683, 682] and widths['c2_1'] == widths['c2_2'] == 1024
    assert all(widths[k] == 2048 for k in widths if k[0] != 'c')
    for b in (2, 3):   # a channel group is a piece of the pooled vector of its branch
        parts = torch.cat([full[1].pooled[f'c{b}_{i}'] for i in range(1, b + 1)], 1)
        assert torch.equal(parts, full[1].pooled[f'g{b}'])


def test_stripes_cover_the_map_once(full):
    "The maximum over the stripes is the maximum over the map"
    for b in (2, 3):
        parts = torch.stack([full[1].pooled[f's{b}_{i}'] for i in range(1, b + 1)])
        assert torch.equal(parts.amax(0), full[1].pooled[f'g{b}'])


def test_15_identical_frames_give_the_vector_three_times():
    crops = toy_crops(2, n_cams=2, n_each=1)
    same = Crops([crops.images[0]] * 15, np.ones(15, int), np.zeros(15, int), np.arange(15.), np.zeros(15, int))
    method = build()
    f, pids, cams = embed_tracklets(method, same, pooling='tpp')
    one = extract(method, same[[0]], height=48, width=24)[0]
    assert f.shape == (1, 3 * method.network.dim) and torch.allclose(f[0], one.repeat(3), atol=1e-6)


# --- every switch


@pytest.mark.parametrize('k,heads,triplets,dim', [
    (dict(), 13, 3, 3328), (dict(partition='s'), 8, 3, 2048), (dict(partition='c'), 8, 3, 2048),
    (dict(partition='none'), 3, 3, 768), (dict(branches='p1'), 1, 1, 256), (dict(branches='p2'), 5, 1, 1280),
    (dict(branches='p3'), 7, 1, 1792), (dict(branches='p1+p2'), 6, 2, 1536), (dict(branches='p1+p2+p3+p4'), 22, 4, 5632),
    (dict(architecture='pcb'), 6, 0, 1536), (dict(architecture='se'), 1, 1, 256), (dict(architecture='ra'), 1, 1, 256),
    (dict(dim=64), 13, 3, 832)])
def test_architectures(k, heads, triplets, dim):
    a = scr_architecture(SCRSettings(**k))
    assert (len(a.heads), a.n_global, sum(h.widths(2048)[1] for h in a.heads)) == (heads, triplets, dim)


@pytest.mark.parametrize('k', [dict(partition='x'), dict(architecture='x'), dict(branches='q1'), dict(epoch_of='x')])
def test_unknown_switch_is_named(k):
    with pytest.raises(ValueError, match=list(k.values())[0]): build(**k)


def literal(logits, vectors, y, weight, margin):
    "Equations 3.1-3.3 as written: sums over the batch"
    def ce(x):
        return sum(-math.log(math.exp(x[i][y[i]]) / sum(math.exp(v) for v in x[i])) for i in range(len(y)))
    def norm(a, b): return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b)))
    def triplet(f):
        total = 0.
        for a in range(len(y)):
            far = max(norm(f[a], f[p]) for p in range(len(y)) if y[p] == y[a])
            near = min(norm(f[a], f[n]) for n in range(len(y)) if y[n] != y[a])
            total += max(far - near + margin, 0)
        return total
    first = weight * sum(map(ce, logits)) / len(logits)
    return first, sum(map(triplet, vectors)) / len(vectors) if vectors else 0.


@pytest.mark.parametrize('k', [dict(), dict(partition='c', weight=1.), dict(branches='p1+p2', margin=.3),
                               dict(triplet=False), dict(triplet_on='pooled'), dict(architecture='pcb', weight=6.)])
def test_loss_is_equations_3_1_to_3_3(k):
    method = build(**k)
    batch = next(iter(method.epoch(0)))
    terms, out = method(batch), method.network(batch.images)
    y, s = method.labels[batch.index].tolist(), method.settings
    vectors = [v.tolist() for v in method.network.for_triplet(out).values()] if s.triplet else []
    ce, tri = literal([z.tolist() for z in out.logits.values()], vectors, y, s.weight, s.margin)
    assert terms['identity'].item() == pytest.approx(ce / len(y), rel=1e-4)
    assert float(terms.get('triplet', torch.zeros(())).detach()) == pytest.approx(tri / len(y), rel=1e-4, abs=1e-6)
    if 'triplet' in terms:
        whole = scr_loss(list(out.logits.values()), list(method.network.for_triplet(out).values()),
                         method.labels[batch.index], weight=s.weight, margin=s.margin)
        assert sum(terms.values()).item() == pytest.approx(whole.item(), rel=1e-5)


def test_pooled_triplet_reaches_no_reduction():
    method = build(triplet_on='pooled')
    method(next(iter(method.epoch(0))))['triplet'].backward()
    assert method.network.heads['g1'].reduce.conv.weight.grad is None
    method = build()
    method(next(iter(method.epoch(0))))['triplet'].backward()
    assert method.network.heads['g1'].reduce.conv.weight.grad.abs().sum() > 0
    assert method.network.heads['s2_1'].reduce.conv.weight.grad is None, 'parts have no triplet'


def test_epoch_is_one_pass_over_people():
    method = build(toy(10), p=3, k=4)
    batches = list(method.epoch(0))
    people = torch.cat([method.labels[b.index].unique() for b in batches])
    assert len(batches) == 3 and len(people) == len(people.unique()) == 9
    assert all((method.labels[b.index].unique(return_counts=True)[1] == 4).all() for b in batches)
    assert len(list(build(toy(10), p=3, k=2, epoch_of='images').epoch(0))) > 3
    assert [len(b) for b in build(toy(10), p=2, k=4, epoch_of='shuffle').epoch(0)] == [8] * 5


def test_optimiser_and_schedule_of_the_recipe():
    s = SCRSettings()
    from reidnb.training.settings import schedule
    assert [s.lr * schedule(e, s) for e in (0, 299, 300, 399, 400, 499)] == pytest.approx([2e-4] * 2 + [2e-5] * 2 + [2e-6] * 2)
    o = build(backbone_lr=.1).optimizer()
    assert isinstance(o, torch.optim.Adam) and all(g['amsgrad'] and g['weight_decay'] == 5e-4 for g in o.param_groups)
    assert [g.get('lr_scale', 1) for g in o.param_groups] == [.1, 1]
    n = sum(len(g['params']) for g in o.param_groups)
    assert n == len(list(build().parameters()))
    assert isinstance(build(optimizer='sgd').optimizer(), torch.optim.SGD)


def test_flip_is_the_only_augmentation():
    method = build(flip=0.)
    a, b = (torch.stack([method.data.dataset[i][0] for i in range(4)]) for _ in range(2))
    method.data.dataset.set_epoch(7)
    assert torch.equal(a, b) and torch.equal(a, torch.stack([method.data.dataset[i][0] for i in range(4)]))


def test_euclidean_ranks_raw_vectors():
    crops, method = toy(), build(metric='euclidean')
    f = extract(method, crops, height=48, width=24)
    assert (f.norm(dim=1) - 1).abs().max() > .1
    assert torch.allclose(method.distance(f, f[:5]), torch.cdist(f, f[:5]), atol=2e-2)
    method.settings = replace(method.settings, metric='cosine')
    assert torch.allclose(method.distance(f, f), cosine_distance(f, f))


def test_people_without_label_are_never_drawn():
    crops = toy()
    mixed = crops.replace(pids=np.where(crops.pids > 5, -2, crops.pids))
    for how in ('people', 'images', 'shuffle'):
        method = build(mixed, epoch_of=how, p=2)
        assert all((method.labels[b.index] >= 0).all() for b in method.epoch(0))
    with pytest.raises(ValueError, match='at least 2'): build(crops[crops.pids == 1])


def test_one_image_of_each_person():
    "Drawn K times: positive distances are 0, the loss stays finite (METHODS section 6.5)"
    crops = toy_crops(n_ids=6, n_cams=1, n_each=1)
    method = build(crops, p=3, k=4, flip=0.)
    batches = list(method.epoch(0))
    assert len(batches) == 2 and all(len(b.index.unique()) == 3 for b in batches)
    terms = method(batches[0])
    assert all(torch.isfinite(t) for t in terms.values()) and float(terms['triplet'].detach()) <= 1.2 + 1e-6


# --- frames of tracklets


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), people=st.integers(2, 6), frames=st.integers(1, 4), k=st.integers(1, 4),
       mode=st.sampled_from(['one-pass', 'exhaustive']))
def test_tracklet_batches(seed, people, frames, k, mode):
    rng = np.random.default_rng(seed)
    pids = np.repeat(np.arange(1, people + 1), rng.integers(1, 12, people))
    tracks = rng.integers(0, 4, len(pids))
    crops = Crops([b''] * len(pids), pids, np.zeros(len(pids), int), tracks=tracks)
    sampler, again = (TrackletPK(crops, 2, k, frames, mode=mode, seed=seed) for _ in range(2))
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        batches = sampler.batches()
        assert batches == again.batches()
        for b in batches: assert (np.unique(pids[b], return_counts=True)[1] == k).all() and len(b) == 2 * k
        read = np.unique(np.concatenate(batches)) if batches else np.array([], int)
        _, n = np.unique(np.stack([pids[read], tracks[read]]), axis=1, return_counts=True)
        assert (n <= frames).all(), 'more frames of a tracklet than asked for'
        halves = [sampler.shard(r, 2) for r in range(2)]
        if k % 2 == 0:
            for h in halves: h.set_epoch(epoch)
            assert [a + b for a, b in zip(*(h.batches() for h in halves))] == batches


def test_other_frames_in_other_epochs():
    crops = toy_crops(4, n_cams=1, n_each=12)
    sampler = TrackletPK(crops.replace(tracks=np.repeat(np.arange(4), 12)), p=4, k=1)
    seen = []
    for e in range(30):
        sampler.set_epoch(e)
        seen += sampler.batches()[0]
    assert len(set(seen)) > 30
    with pytest.raises(ValueError, match='have no track'): TrackletPK(crops.replace(tracks=None))


def test_frames_setting_trains_on_tracklets():
    crops = toy()
    method = build(crops, frames=1)
    assert isinstance(method.data.batch_sampler, TrackletPK) and torch.isfinite(sum(method(next(iter(method.epoch(0)))).values()))


# --- video


@pytest.fixture(scope='module')
def walks():
    crops = toy_crops(6, n_cams=3, n_each=5)
    return ReIDData(crops, crops[::5], crops, name='toy walks')


@pytest.mark.parametrize('how,groups', [('even', 1), ('even', 3), ('random', 1), ('random', 3)])
def test_tracklet_scores_against_loops(walks, how, groups):
    method = build()
    crops = walks.gallery
    f = extract(method, crops, height=48, width=24)
    t = tracklets(crops)
    frames = sample_frames(t.lengths, 7, how, 4)
    rows = []
    for k in range(len(t)):
        x = [f[t[k][j]] for j in frames[k]]
        sizes = [7] if groups == 1 else [3, 2, 2]
        at, parts = 0, []
        for n in sizes:
            parts.append(sum(x[at:at + n]) / n)
            at += n
        rows.append(torch.cat(parts))
    want = torch.stack(rows)
    for chunk in (2, 1000):
        got, pids, cams = embed_tracklets(method, crops, frames=7, sampling=how, pooling=groups, seed=4, chunk=chunk)
        assert torch.allclose(got, want, atol=1e-5) and (pids == t.pids).all() and (cams == t.cams).all()
    data = replace(walks, query=crops)
    m = score(method, data, per='tracklet', frames=7, sampling=how, pooling=groups, seed=4)
    assert m.mAP == pytest.approx(evaluate(cosine_distance(want, want), t.pids, t.pids, t.cams, t.cams).mAP, abs=1e-6)


def test_four_rows_of_table_3_5(walks):
    method, data = build(), replace(walks, query=walks.gallery)
    rows = compare_pooling(method, data, frames=7, seeds=(0, 4))
    assert {k: len(v) for k, v in rows.items()} == {'TP(R)': 2, 'TPP(R)': 2, 'TP(E)': 1, 'TPP(E)': 1}
    for (name, how), groups in zip([('TP', 'random'), ('TPP', 'random'), ('TP', 'even'), ('TPP', 'even')], (1, 3, 1, 3)):
        one = score(method, data, per='tracklet', frames=7, sampling=how, pooling=groups, seed=4 if how == 'random' else 0)
        assert rows[f'{name}({how[0].upper()})'][-1].mAP == pytest.approx(one.mAP, abs=1e-6)


def test_protocol_by_tracklet(walks):
    test = walks.gallery
    stray = test[[0]].replace(pids=np.array([0]), tracks=np.array([-1]))
    from reidnb.data.crops import concat
    data = ReIDData(walks.train, test[::5], concat(test[np.arange(len(test)) % 5 > 0], stray), name='x')
    by_cam, by_person = tracklet_data(data), tracklet_data(data, 'person')
    assert by_cam.dropped['test crops without a track'] == 1
    assert len(tracklets(by_cam.query)) == len(tracklets(by_cam.gallery)) == 18
    assert len(tracklets(by_person.query)) == 6 and len(tracklets(by_person.gallery)) == 12
    assert len(by_person.query) + len(by_person.gallery) == len(test)
    with pytest.raises(ValueError, match='per='): tracklet_data(data, 'day')
    assert by_tracklet(by_person) is by_person and by_tracklet(data).notes == by_cam.notes
    with pytest.raises(ValueError, match='single crops'): by_tracklet(ReIDData(None, *[test.replace(tracks=None)] * 2))


def test_from_a_mars_tree_to_metrics(walks, tmp_path):
    "Written as MARS, read by the loader of MARS, scored: the same numbers as from memory"
    data = ReIDData(walks.train, walks.query, walks.gallery[np.arange(len(walks.gallery)) % 5 > 0], name='x')
    root = write_mars(data, tmp_path / 'mars')
    read = load('mars', root=tmp_path)
    assert read.train.n_ids == 6 and len(tracklets(read.query)) == 6 and len(tracklets(read.gallery)) == 12
    method = build()
    for k in (dict(), dict(pooling='tpp'), dict(sampling='random', pooling='tpp')):
        a, b = (score(method, d, per='tracklet', frames=6, **k) for d in (read, tracklet_data(data, 'person')))
        assert a.mAP == pytest.approx(b.mAP, abs=1e-6) and a.n_valid == b.n_valid == 6
    with pytest.raises(ValueError, match='not an empty folder'): write_mars(data, root)
    method = build(read.train, frames=2)
    assert torch.isfinite(sum(method(next(iter(method.epoch(0)))).values()))


def test_walks_re_ranked(walks):
    "Against `rerank_distances` on pooled features; one row a tracklet, its middle frame"
    g = walks.gallery
    method, data = build(), replace(walks, query=g[g.cams == 0], gallery=g[g.cams > 0])
    k = dict(frames=7, pooling='tpp')
    made = rank(method, data, ('none', 'rr'), 'tracklet', options=dict(reranking=dict(k1=4, k2=2)), **k)
    found = made.metrics
    (y, *asked), (x, *who) = (embed_tracklets(method, c, **k) for c in (data.query, data.gallery))
    d = [method.distance(a, b) for a, b in ((y, x), (y, y), (x, x))]
    want = evaluate(rerank_distances(*d, k1=4, k2=2), *[v for pair in zip(asked, who) for v in pair])
    assert found['rr'].mAP == pytest.approx(want.mAP, abs=1e-6)
    assert found['none'].mAP == pytest.approx(score(method, data, per='tracklet', **k).mAP, abs=1e-6)
    assert {'query features', 'gallery features', 'distance', 'rr', 'score'} <= set(made.seconds)
    t, table = tracklets(data.gallery), tracklet_table(data.gallery)
    assert (table.pids == t.pids).all() and (table.cams == t.cams).all() and table.images[4] == data.gallery.images[t[4][2]]
    assert (made.gallery.pids == table.pids).all() and made.dist.shape == (len(made.query), len(table))
    with pytest.raises(ValueError, match="'x'"): rank(method, data, 'x')


def test_a_mars_folder_trains_and_is_scored_by_tracklet(tmp_path):
    "World -> files of MARS -> `open_data` -> `scr-small` on tracklets -> model file -> TP and TPP, random and even"
    warnings.simplefilter('ignore')   # less than all of MARS, few people
    site = make_site('campus', n_train=4, n_test=4, per_id=30, height=96, width=48, seed=1)
    write_mars(site, tmp_path / 'mars')
    data = open_data('mars', root=tmp_path)
    assert len(data.train) == len(site.train) and len(tracklets(data.query)) == 4
    cls, s = recipe('scr-small', epochs=2, frames=1, p=4, k=2)
    assert cls is SCR and s.frames == 1
    run = run_experiment('scr-small', data, tmp_path / 'run', s, before=False, progress=False)
    assert isinstance(run.method.data.batch_sampler, TrackletPK)
    images = [r['images'] for r in run.log if 'images' in r]
    assert len(images) == 2 and max(images) <= len(tracklets(data.train)) + 4 < len(data.train)
    method = load_model(tmp_path / 'run')
    for how in ('even', 'random'):
        for pooling in ('tp', 'tpp'):
            k = dict(frames=5, sampling=how, pooling=pooling)
            a, b = score(method, data, **k), score(run.method, data, **k)   # walks, seen by themselves
            assert a.mAP == b.mAP and a.n_valid == 4 and a.n_gallery == len(tracklets(data.gallery))
    assert embed_tracklets(method, data.query, frames=5, pooling='tpp')[0].shape == (4, 3 * method.network.dim)
    assert rank(method, data, 'rr', frames=5).scores.n_valid == 4


@pytest.mark.parametrize('name', ['mars', 'dukemtmc-videoreid', 'ilids-vid', 'ls-vid'])
def test_from_the_trees_of_the_loaders_to_metrics(name, tmp_path):
    "Generated trees of the video sets: load, train a batch, score by tracklet"
    sys.path.insert(0, str(Path(__file__).parent))
    from dataset_trees import make
    tree = next(t for t in (make(name, seed) for seed in range(20)) if scorable(t))
    for path, content in tree.files.items():
        (tmp_path / tree.folders[0] / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / tree.folders[0] / path).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # two people a batch of four, few frames
        data = load(name, root=tmp_path)
        method = build(data.train, frames=1, p=2, k=2)
        assert math.isfinite(float(sum(method(next(iter(method.epoch(0)))).values()).detach()))
        rows = compare_pooling(method, data, frames=5, seeds=(0,))
    assert all(0 <= m.mAP <= 1 and m.n_valid > 0 for v in rows.values() for m in v)


def scorable(tree):
    "Some query tracklet has an answer in another camera, and two people can be trained on"
    truth = tree.truth(tree.files)
    answers = {(r[0], r[1]) for r in truth['gallery'] if r[0] > 0}
    return len({r[0] for r in truth['train']}) > 1 and any(q[0] == p and q[1] != c for q in truth['query'] for p, c in answers)


# --- pictures and shorter features


def test_heads_look_where_they_read():
    method, x = build(), torch.randn(2, 3, 96, 48)
    for name in ('g1', 's3_2', 'c2_1'): assert head_cam(method, x, name).shape == (2, 6, 3)
    top, low = head_cam(method, x, 's2_1'), head_cam(method, x, 's2_2')
    assert (top[:, 3:] == 0).all() and (low[:, :3] == 0).all() and top.max() <= 1
    y = torch.tensor([0, 1])
    assert head_cam(method, x, 'c3_3', y).shape == (2, 6, 3)
    with pytest.raises(ValueError, match='g1'): head_cam(method, x, 'g9')
    pcb = build(architecture='pcb')
    assert (head_cam(pcb, x, 's1')[:, 1:] == 0).all()
    bare = SCR(small()).eval()
    assert head_cam(bare, x, 'g2').max() <= 1, 'without classifiers: the length of the vector'


def test_projection_is_pca():
    torch.manual_seed(0)
    f = torch.randn(80, 12, dtype=torch.float64) * torch.linspace(3, .1, 12) + 5
    p = fit_projection(f, 4)
    c = f - f.mean(0)
    u, s, v = torch.linalg.svd(c, full_matrices=False)
    assert torch.allclose((p(f) @ p(f).T).double(), (u[:, :4] * s[:4]) @ (u[:, :4] * s[:4]).T, atol=1e-2)
    assert p.kept == pytest.approx(float((s[:4] ** 2).sum() / (s ** 2).sum()), abs=1e-5)
    white = fit_projection(f, 4, whiten=True)(f)
    assert torch.allclose(white.T @ white / 79, torch.eye(4), atol=1e-3)
    full = fit_projection(f, 12)(f)
    assert torch.allclose(torch.cdist(full.double(), full.double()), torch.cdist(f, f), atol=1e-4), 'all axes: distances stay'
    with pytest.raises(ValueError, match='dim=13'): fit_projection(f, 13)


def test_projected_method_scores(walks):
    method = build()
    f = extract(method, walks.train, height=48, width=24)
    short = Projected(method, fit_projection(f, 16))
    g = extract(short, walks.gallery, height=48, width=24)
    assert g.shape == (len(walks.gallery), 16) and torch.allclose(g.norm(dim=1), torch.ones(len(g)), atol=1e-5)
    assert 0 < score(short, walks).mAP <= 1


# --- runs of `fit`


class Killed(SCR):
    "Dies by signal 9 in the middle of an epoch, as a power cut would"
    kill_at = 0
    def after_batch(self, batch):
        self.done = getattr(self, 'done', 0) + 1
        if self.done == self.kill_at: os.kill(os.getpid(), signal.SIGKILL)


def child(out, how='', kill_at=0):
    torch.set_num_threads(1)
    seed_everything(0)
    method = Killed(small(**(STILL if how == 'still' else {})), toy())
    if how == 'still': keep_gradient(out), smooth(method)
    method.kill_at = int(kill_at)
    fit(method, out, progress=False)
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'whole'
    finish(start(__file__, out))
    return out


def test_killed_and_resumed_equals_never_stopped(whole, tmp_path):
    out = tmp_path / 'killed'
    finish(start(__file__, out, 'adam', 6), -signal.SIGKILL)
    assert not (out / 'model.safetensors').exists()
    finish(start(__file__, out))
    assert plain(out) == plain(whole)
    a, b = (load_checkpoint(d / 'checkpoint.pt') for d in (whole, out))
    for key in ('optimizers', 'method', 'rng', 'epoch', 'step'): assert same(a[key], b[key]), key


def test_two_processes_equal_one(tmp_path):
    finish([*start_world(__file__, tmp_path / 'two', 'still'), start(__file__, tmp_path / 'one', 'still')])
    agree(tmp_path / 'one', tmp_path / 'two', 8)


def test_model_file_holds_no_classifier(whole):
    names = safetensors.torch.load_file(whole / 'model.safetensors').keys()
    assert names and not any('classifier' in k for k in names)
    method = load_model(whole, cls=SCR)
    trained = Killed(small(), toy())
    trained.load_state_dict(load_checkpoint(whole / 'checkpoint.pt')['method'])
    crops = toy()
    assert torch.equal(*(extract(m, crops, height=48, width=24) for m in (method, trained)))


@pytest.mark.parametrize('k', [dict(), dict(architecture='se'), dict(architecture='ra'), dict(architecture='pcb', weight=6.)])
def test_bf16_run_is_finite(k, tmp_path):
    method = build(precision='bf16', epochs=1, **k)
    log = fit(method, tmp_path, progress=False)
    assert all(math.isfinite(r['loss']) for r in log if 'loss' in r)
    assert extract(method, toy(), height=48, width=24).isfinite().all()


@pytest.mark.parametrize('k', [dict(architecture='pcb', optimizer='sgd'), dict(architecture='se'), dict(architecture='ra'), dict(partition='none', dim=16)])
def test_saved_and_read_again(k, tmp_path):
    method = build(**k).eval()
    again = load_model(save_model(method, tmp_path / 'm.safetensors'))
    assert torch.equal(*(extract(m, toy(), height=48, width=24) for m in (method, again)))


if __name__ == '__main__': child(*sys.argv[1:])
