"Guarantees of the samplers as properties: P x K, cameras, shards, coverage, determinism."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from reidnb.data import samplers as S
from reidnb.data.items import CropDataset
from reidnb.data.toys import toy_crops
from reidnb.data.transforms import test_transform as plain

torch.set_num_threads(1)
MANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
rows = st.lists(st.tuples(st.integers(-2, 9), st.integers(0, 4)), min_size=1, max_size=70).filter(lambda x: max(p for p, _ in x) > 0)


def quiet(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make(*args, **kwargs)


def make(kind, pids, cams, p, k, **kw):
    if kind == 'camera-diverse': return quiet(S.CameraDiversePK, pids, cams, p, k, **kw)
    if kind == 'more-camera': return quiet(S.MoreCameraPK, pids, cams, p, k, **kw)
    return quiet(S.PKSampler, pids, p, k, mode=kind, **kw)


KINDS = ['exhaustive', 'one-pass', 'complete', 'camera-diverse', 'more-camera']


@MANY
@given(rows, st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_p_times_k_is_always_exact(table, kind, p, k, seed, epoch, labels):
    pids, cams = map(np.array, zip(*table))
    first = 0 if labels else 1
    if labels: pids = np.where(pids > 0, pids-1, -1)  # -1: outlier
    s = make(kind, pids, cams, p, k, seed=seed, first=first)
    s.set_epoch(epoch)
    n_ids, batches = len(np.unique(pids[pids >= first])), list(s)
    assert len(s) == len(batches) >= 1
    for b in batches:
        ids, count = np.unique(pids[b], return_counts=True)
        assert len(b) == min(p, n_ids)*k and len(ids) == min(p, n_ids) and (count == k).all() and (ids >= first).all()
        assert (np.reshape(pids[b], (-1, k)) == pids[b[::k]][:, None]).all()  # K in a row, so a reshape would hold too
    s.set_epoch(epoch+1)
    s.set_epoch(epoch)
    again = make(kind, pids, cams, p, k, seed=seed, first=first)
    again.set_epoch(epoch)
    assert list(s) == batches == list(again.shard(0, 1))


@MANY
@given(rows, st.integers(1, 4), st.integers(1, 6), st.integers(0, 5))
def test_more_camera_covers_min_of_cameras_and_k_and_repeats_only_when_needed(table, p, k, seed):
    pids, cams = map(np.array, zip(*table))
    for b in make('more-camera', pids, cams, p, k, seed=seed, epoch_size=6):
        b = np.array(b)
        for y in np.unique(pids[b]):
            mine, own = b[pids[b] == y], pids == y
            assert len(np.unique(cams[mine])) == min(k, len(np.unique(cams[own])))
            assert len(np.unique(mine)) == min(k, own.sum())


@MANY
@given(rows, st.integers(1, 4), st.integers(1, 6), st.integers(0, 5))
def test_camera_diverse_draws_the_others_elsewhere(table, p, k, seed):
    pids, cams = map(np.array, zip(*table))
    for b in make('camera-diverse', pids, cams, p, k, seed=seed, epoch_size=6):
        for anchor, *others in np.reshape(b, (-1, k)):
            own = np.flatnonzero(pids == pids[anchor])
            away = own[cams[own] != cams[anchor]]
            pool = away if len(away) else np.setdiff1d(own, anchor) if len(own) > 1 else own
            assert set(others) <= set(pool)
            if len(pool) >= k-1: assert len(set(others)) == k-1
            if k > 1: assert len(np.unique(cams[[anchor, *others]])) >= min(2, len(np.unique(cams[own])))


@MANY
@given(rows, st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_coverage_of_an_epoch(table, p, k, seed):
    pids, cams = map(np.array, zip(*table))
    real = np.flatnonzero(pids > 0)
    size = {y: (pids == y).sum() for y in np.unique(pids[real])}
    seen = np.unique(np.concatenate(list(make('complete', pids, cams, p, k, seed=seed))))
    assert (seen == real).all()
    s = make('exhaustive', pids, cams, p, k, seed=seed)
    used = np.concatenate(list(s))
    for y, n in size.items():  # no crop twice in an epoch, unless the person has fewer than K
        drawn, count = np.unique(used[pids[used] == y], return_counts=True)
        if n >= k: assert (count == 1).all() or not len(count)
    chunks = {y: max(1, n//k) for y, n in size.items()}
    taken = {y: (pids[used] == y).sum()//k for y in size}
    assert all(taken[y] <= chunks[y] for y in size)
    assert sum(taken[y] < chunks[y] for y in size) < s.p  # it ends only when fewer than P have chunks left
    one = np.concatenate(list(make('one-pass', pids, cams, p, k, seed=seed)))
    assert len(np.unique(pids[one])) == len(size)//s.p*s.p == len(one)//k


def test_every_crop_is_seen_after_some_epochs():
    pids = np.repeat(np.arange(1, 23), np.arange(1, 23) % 8+1)
    cams = np.random.default_rng(0).integers(0, 4, len(pids))
    for kind in KINDS:
        s, seen = make(kind, pids, cams, 6, 3), set()
        for e in range(60):
            s.set_epoch(e)
            for b in s: seen |= set(b)
        assert len(seen) == len(pids), kind


def test_complete_fills_the_last_chunk():
    "Five crops in chunks of two: three chunks, every crop, and one of them twice"
    for seed in range(20):
        b = list(make('complete', np.array([1]*5), None, 1, 2, seed=seed))
        assert len(b) == 3 and set(sum(b, [])) == set(range(5)) and all(len(set(x)) == 2 for x in b)


def test_one_image_people_and_fewer_people_than_p():
    for kind in KINDS:
        with pytest.warns(UserWarning, match='3 people for P=16'):
            s = {'camera-diverse': S.CameraDiversePK, 'more-camera': S.MoreCameraPK}.get(kind)
            s = s([5, 7, 9, -1], [0, 1, 0, 2], 16, 4) if s else S.PKSampler([5, 7, 9, -1], 16, 4, mode=kind)
        assert [sorted(b) for b in s] == [[0]*4+[1]*4+[2]*4]
    for kind in KINDS:
        with pytest.raises(ValueError, match='no person'): make(kind, [-1, 0], [0, 0], 2, 2)


def test_draws_are_uniform():
    "Every crop of a person, every person of a set, and every camera to trim is equally likely"
    pids, cams = np.repeat([1, 2, 3, 4, 5], 6), np.tile([0, 0, 1, 2, 3, 4], 5)
    count = np.zeros((3, 30))
    for k, s in enumerate([make('exhaustive', pids, cams, 2, 2), make('camera-diverse', pids, cams, 2, 2), make('more-camera', pids, cams, 2, 3)]):
        for e in range(400):
            s.set_epoch(e)
            np.add.at(count[k], next(iter(s)), 1)
    for c in count: assert stats.chisquare(c.reshape(5, 6).sum(1)).pvalue > 1e-3
    assert stats.chisquare(count[0]).pvalue > 1e-3
    per = count[2].reshape(5, 6).sum(0)  # 5 cameras, 3 drawn; crops 0 and 1 share one camera
    assert stats.chisquare([per[0]+per[1], *per[2:]]).pvalue > 1e-3 and stats.binomtest(int(per[0]), int(per[0]+per[1])).pvalue > 1e-3


@MANY
@given(rows, st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_processes_see_disjoint_parts(table, kind, p, k, world, length):
    pids, cams = map(np.array, zip(*table))
    s = S.FixedLength(make(kind, pids, cams, p*world, k), length)
    if len(next(iter(s))) % world:
        with pytest.raises(ValueError, match='processes'): list(s.shard(0, world))
        return
    parts = [list(s.shard(r, world)) for r in range(world)]
    assert all(len(x) == length for x in parts)
    for b, *pieces in zip(s, *parts):
        assert sum(pieces, []) == b and len({len(x) for x in pieces}) == 1
        ids = [set(pids[x]) for x in pieces]
        if len(set(pids[b])) % world == 0: assert sum(map(len, ids)) == len(set(pids[b]))


@MANY
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80).filter(lambda c: max(c) >= 0), st.integers(1, 5), st.integers(1, 3),
       st.sampled_from(['shortest', 'longest']), st.integers(0, 3), st.booleans())
def test_every_camera_gives_the_same_number(cams, each, world, stop, epoch, outliers):
    cams, b = np.array(cams), each*world
    labels = np.where(np.arange(len(cams)) % 4 == 1, -1, 0) if outliers else None
    keep = (cams >= 0) & (True if labels is None else labels >= 0)
    if not keep.any():
        with pytest.raises(ValueError, match='no row'): quiet(S.PerCameraParallel, cams, b, labels=labels)
        return
    s = quiet(S.PerCameraParallel, cams, b, labels=labels, stop=stop)
    s.set_epoch(epoch)
    c, sizes = np.unique(cams[keep], return_counts=True)
    parts = [list(s.shard(r, world)) for r in range(world)]
    want = max(1, (min if stop == 'shortest' else max)(n//b for n in sizes))
    assert len(list(s)) == want
    for batch, *pieces in zip(s, *parts):
        assert sorted(sum(pieces, [])) == sorted(batch) and keep[batch].all()
        for x in (batch, *pieces):
            got, n = np.unique(cams[x], return_counts=True)
            assert (got == c).all() and (n == len(x)//len(c)).all()
    used = np.array(sum(s, []))
    for cam, n in zip(c, sizes):
        mine, count = np.unique(used[cams[used] == cam], return_counts=True)
        if n >= b and stop == 'shortest': assert (count == 1).all()  # zipped loaders never repeat
        if n == max(sizes) and stop == 'longest': assert len(mine) >= n//b*b or n < b


@MANY
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_fixed_length_is_passes_end_to_end(n, b, length, epoch):
    inner = quiet(S.ShuffleSampler, n, b)
    s = S.FixedLength(inner, length)
    s.set_epoch(epoch)
    inner.set_epoch(epoch)
    batches, one = list(s), list(inner)
    assert len(s) == len(batches) == length and batches[:len(one)] == one[:length]
    for i in range(0, length, len(one)):  # within a pass no crop comes twice
        flat = sum(batches[i:i+len(one)], [])
        assert len(set(flat)) == len(flat)


def test_seeds_epochs_and_the_global_generators():
    pids, cams = np.repeat(np.arange(1, 30), 5), np.tile(np.arange(5), 29)
    for kind in KINDS:
        a, b = make(kind, pids, cams, 4, 2, seed=0), make(kind, pids, cams, 4, 2, seed=1)
        state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        first = list(a)
        a.set_epoch(1)
        assert list(a) != first != list(b)
        assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()
        torch.manual_seed(5); np.random.seed(5)
        a.set_epoch(0)
        assert list(a) == first


def test_a_loader_takes_each_of_them():
    crops = toy_crops(6, n_cams=3)
    for s in (S.CameraDiversePK(crops.pids, crops.cams, 3, 2), S.MoreCameraPK(crops.pids, crops.cams, 3, 2),
              S.PerCameraParallel(crops.cams, 2), S.FixedLength(S.PKSampler(crops.pids, 3, 2), 3)):
        data = CropDataset(crops, plain(16, 8), seed=0)
        got = [i.tolist() for _, i in torch.utils.data.DataLoader(data, batch_sampler=s, num_workers=0)]
        assert got == list(s)
        s.rank, s.world = 1, 2  # as `Method.batches` sets them
        assert [sorted(set(b)-set(x)) for b, x in zip(got, s)] and all(len(x) == len(b)//2 and set(x) <= set(b) for b, x in zip(got, s))


@pytest.mark.parametrize('call,words', [
    (lambda: S.CameraDiversePK([1, 1], [0], 1, 2), '1 cameras for 2 rows'),
    (lambda: S.MoreCameraPK([1, 1], [0, -1], 1, 2), 'no camera'),
    (lambda: S.PerCameraParallel([0, 0], 0), 'give 1 or more'),
    (lambda: S.PerCameraParallel([0, 0], 1, stop='now'), 'shortest'),
    (lambda: S.FixedLength(S.ShuffleSampler(3, 1), 0), '0 batches'),
    (lambda: S.PKSampler([1], 1, 1, mode='all'), 'complete')])
def test_messages(call, words):
    with pytest.raises(ValueError, match=words): call()
