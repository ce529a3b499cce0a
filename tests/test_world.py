"""Property, fault and repeat tests of the world: `reidnb.world.places`, `cameras`, `walks`, `world`."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from reidnb.world.cameras import person_window, view_grid
from reidnb.data.crops import Crops
from reidnb.world.places import GROUNDS, make_plate, Pose, WALLS
from reidnb.world.walks import companions, make_network, on_path, sample_walks
from reidnb.world.plans import plan_site, SITES
from reidnb.world.sites import make_junk, make_site, people_of, projection, render_plan, truth, write_market

KIND = ('train', 'query', 'gallery')


@pytest.fixture(scope='module')
def site():
    return make_site('campus', n_train=6, n_test=6, seed=3, height=64, width=32)


# --- repeatability -----------------------------------------------------------------------------------------
CODE = """
import hashlib
from reidnb.world.sites import make_site
d = make_site('mall', n_train=3, n_test=3, seed=5, height=64, width=32)
h = hashlib.sha256()
for c in (d.train, d.query, d.gallery):
    for b in c.images: h.update(b)
    h.update(c.times.tobytes()); h.update(c.pids.tobytes())
print(h.hexdigest())
"""


def test_same_bytes_in_two_processes():
    runs = [subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) > 60


def test_seeds_and_sites_differ(site):
    other = make_site('campus', n_train=6, n_test=6, seed=4, height=64, width=32)
    assert not set(site.train.images) & set(other.train.images)
    assert site.fingerprint() != other.fingerprint()
    assert not set(site.train.images) & set(make_site('mall', n_train=6, n_test=6, seed=3, height=64, width=32).train.images)


def test_global_seed_is_not_used_nor_changed(site):
    torch.manual_seed(99)
    np.random.seed(99)
    again = make_site('campus', n_train=6, n_test=6, seed=3, height=64, width=32)
    a, b = torch.rand(1), np.random.rand()
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(a, torch.rand(1)) and b == np.random.rand()
    assert again.query.images == site.query.images


@pytest.mark.parametrize('chunk', [1, 5, 32])
def test_crop_does_not_depend_on_its_batch(chunk):
    plan, people, look, _ = plan_site('station', 4, 4, seed=2)
    rows = np.arange(0, len(plan), 3)
    whole = render_plan(plan[rows], people, look, 64, 32)
    assert render_plan(plan[rows], people, look, 64, 32, chunk=chunk) == whole
    assert render_plan(plan[rows[7:9]], people, look, 64, 32) == whole[7:9]


# --- the dataset -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', sorted(SITES))
def test_protocol_holds_at_every_site(name):
    plan, _, _, last = plan_site(name, 20, 20, seed=6)
    part = [plan.part == k for k in range(4)]
    assert not set(plan.pid[part[0]]) & set(plan.pid[part[1]])
    assert set(plan.pid[part[1]]) == set(plan.pid[part[2]]) - {0}
    assert set(plan.pid[part[3]]) == {-1} and (plan.pid[part[2]] == 0).any()
    assert len(set(plan.cam)) == SITES[name].cams
    pairs = list(zip(plan.pid[part[1]], plan.cam[part[1]]))
    assert len(pairs) == len(set(pairs)), 'one query a person and camera'
    for p, c in pairs:
        assert (part[2] & (plan.pid == p) & (plan.cam != c)).any()
    assert (plan.frame > 0).all() and (plan.frame <= last[plan.session - 1]).all()
    closing = {(s, c) for s, c, f in zip(plan.session, plan.cam, plan.frame) if f == last[s - 1]}
    assert len(closing) == len(last)*SITES[name].cams, 'all recorders stop at the same frame'


def test_full_sizes():
    for name in ('campus', 'station'):
        plan, _, _, _ = plan_site(name, full=True)
        ids_train, ids_test, train, query, gallery = SITES[name].full
        part = [plan.part == k for k in range(4)]
        assert len(set(plan.pid[part[0]])) == ids_train and part[0].sum() == train
        assert len(set(plan.pid[part[1]])) == ids_test
        assert abs(part[1].sum() - query) <= .06*query, part[1].sum()
        assert abs(part[2].sum() - gallery) <= .03*gallery, part[2].sum()


def test_columns(site):
    for k in KIND:
        c = getattr(site, k)
        assert all(len(v) == len(c) for v in c.extra.values())
        assert np.array_equal(c.cams, [int(f.split('_c')[1][0]) - 1 for f in c.extra['file']])
        assert list(c.extra['file']) == sorted(c.extra['file'])
        assert np.isfinite(c.times).all() and (np.abs(c.extra['view']) <= np.pi + 1e-6).all()
        for t in np.unique(c.tracks[c.tracks >= 0]):  # a track is one person in one camera within seconds
            m = c.tracks == t
            assert len(set(c.extra['person'][m])) == 1 and len(set(c.cams[m])) == 1 and np.ptp(c.times[m]) < 20
    files = np.concatenate([getattr(site, k).extra['file'] for k in KIND])
    assert len(set(files)) == len(files)


def test_groups_are_in_the_times(site):
    "Members of a group pass a camera closer in time than strangers do"
    plan, _, _, _ = plan_site('campus', 60, 4, seed=8)
    p = plan[plan.part == 0]
    first = {}
    for k in range(len(p)):
        first.setdefault((p.person[k], p.session[k], p.cam[k]), (p.frame[k]/25, p.group[k]))
    by = {}
    for (person, s, c), (t, g) in first.items():
        by.setdefault((s, c), []).append((t, g, person))
    inside, outside = [], []
    for rows in by.values():
        for i, (t, g, a) in enumerate(rows):
            for u, h, b in rows[:i]:
                if a != b: (inside if g == h else outside).append(abs(t - u))
    assert np.median(inside) < 10 < np.median(outside)/5


# --- Market-1501 on disk -----------------------------------------------------------------------------------
def test_market_reads_back_equal(site, tmp_path):
    datasets = pytest.importorskip('reidnb.datasets.catalogue')
    root = write_market(site, tmp_path/'Market-1501-v15.09.15')
    back = datasets.load('market1501', root=root)
    for k in KIND:
        a, b = getattr(site, k), getattr(back, k)
        names = [b.file_name(i) for i in range(len(b))]
        order = np.array([names.index(f) for f in a.extra['file']])
        assert len(a) == len(b)
        assert np.array_equal(a.pids, b.pids[order]) and np.array_equal(a.cams, b.cams[order])
        assert np.array_equal(a.times, b.times[order]), 'the loader reads the network clock'
        for i in range(0, len(a), 7):
            assert np.array_equal(np.asarray(a.image(i)), np.asarray(b.image(int(order[i]))))
    assert back.dropped.get('junk') == site.dropped['junk'] == len(make_junk(site.query))


def test_write_market_refuses(site, tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'mine.txt').write_text('keep me')
    with pytest.raises(ValueError, match='not an empty folder'):
        write_market(site, tmp_path/'a')
    assert (tmp_path/'a'/'mine.txt').read_text() == 'keep me'
    from reidnb.data.crops import ReIDData
    with pytest.raises(ValueError, match='make_site'):
        write_market(ReIDData(train=Crops([b'x'])), tmp_path/'b')
    assert not (tmp_path/'b').exists()


# --- faults ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs, text', [
    (dict(name='statoin'), "did you mean 'station'"), (dict(name='zzz'), 'one of campus'), (dict(n_train=0), 'n_train=0'),
    (dict(n_test=1), 'n_test=1'), (dict(n_train=9000, n_test=9000), '9,999'), (dict(height=8), '8x64'),
    (dict(width=4000), '4000'), (dict(per_id=1.), 'per_id=1')])
def test_bad_input(kwargs, text):
    with pytest.raises(ValueError, match=text):
        make_site(**{'n_train': 2, 'n_test': 2, **kwargs})


def test_truth_of_foreign_tables(site):
    with pytest.raises(ValueError, match='recipe'):
        truth(Crops([b'x'], name='mine'))
    r = truth(site.train, [0, 1])
    assert r.alpha.shape == (2, 64, 32) and 0 <= r.alpha.min() and r.alpha.max() <= 1
    assert projection(site.train, [0, 1], 1.).shape == (2, 1, 64, 32)
    assert len(people_of(site.gallery)) > site.gallery.extra['person'].max()


# --- properties --------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(0, 50), st.integers(1, 40), st.integers(1, 6))
def test_walks(n_cams, seed, n, sessions):
    v = sample_walks(make_network(n_cams, seed), n, seed, sessions)
    assert set(v.person) == set(range(n)) and v.cam.max() < n_cams and v.session.max() <= sessions
    assert (v.seconds > 0).all() and (v.start >= 0).all() and (v.path[:, 1::2] > 2).all()
    assert min(len(set(v.cam[v.person == p])) for p in range(n)) >= 2
    x, z, yaw = on_path(v, v.seconds/2)
    assert np.isfinite(x).all() and (z > 2).all() and (np.abs(yaw) <= np.pi).all()
    mate = companions(v)
    assert (v.person[mate[mate >= 0]] != v.person[mate >= 0]).all()


@settings(max_examples=15, deadline=None)
@given(st.floats(2, 5), st.floats(0, .5), st.floats(.8, 1.6), st.floats(-2, 2), st.floats(4, 12))
def test_window_contains_the_feet(height, pitch, focal, x, z):
    t = lambda v: torch.tensor([v], dtype=torch.float32)
    window, foot, view = person_window(Pose(t(height), t(pitch), t(focal)), t(x), t(z), t(1.75), torch.tensor([[0., 0., 1.1, 1.]]))
    assert (window[:, :2] < foot).all() and (foot < window[:, 2:]).all() and 0 < view < 1
    still = view_grid(window, torch.zeros(1), 16, 8)
    assert (still[..., 0] > window[:, 0]).all() and (still[..., 1] < window[:, 3]).all()


@pytest.mark.parametrize('ground', sorted(GROUNDS))
@pytest.mark.parametrize('wall', sorted(WALLS))
def test_plates_are_pictures(ground, wall):
    pose = Pose(torch.tensor(3.), torch.tensor(.3), torch.tensor(1.1))
    p = make_plate(pose, 3, ground, wall, indoor=wall == 'plaster', height=30, width=40)
    assert p.shape == (3, 30, 40) and torch.isfinite(p).all() and 0 <= p.min() and p.max() <= 1 and p.std() > .01
