"Post-processing: a method's own distance, time and memory of each step, and what is passed on."
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reidnb.training.models import load_model
from reidnb.data.crops import Crops
from reidnb.ranking.evaluation import cosine_distance, evaluate
from reidnb.ranking.lifting import TLIFT_APPENDIX, tfusion, tlift, unit_scores
from reidnb.networks.extraction import extract
from reidnb.core.costs import _resident, Peak
from reidnb.ranking.postprocessing import postprocess, POSTS
from reidnb.training.scoring import rank
from reidnb.ranking.reranking import rerank_distances
from reidnb.world.sites import make_site

torch.set_num_threads(1)
linux = pytest.mark.skipif(np.isnan(_resident()), reason='the system does not tell the resident memory')


@pytest.fixture(scope='module')
def people():
    r = np.random.default_rng(0)
    pids, cams = np.repeat(np.arange(1, 31), 6), np.tile(np.arange(3).repeat(2), 30)
    f = r.normal(size=(31, 16))[pids] + r.normal(size=(len(pids), 16))
    f = F.normalize(torch.from_numpy(f).float(), dim=1)
    table = Crops([b''] * len(pids), pids, cams, r.uniform(0, 3000, len(pids)))
    q = np.arange(len(pids)) % 6 == 0
    return f[q], f[~q], table[q], table[~q]


def skewed(a, b):
    "A distance with roles: exchanging the sets is not transposing the matrix"
    return (1 - (a * torch.linspace(.5, 1.5, a.shape[1])) @ b.roll(1, 1).T).clamp(0) / 4


def test_every_name_and_its_steps(people):
    made = postprocess(*people, POSTS, memory=True)
    assert set(made.distances) == set(POSTS)
    assert set(made.seconds) == set(made.megabytes) == {'distance', 'rr', 'tlift', 'tfusion'}
    assert all(v >= 0 for v in made.seconds.values())
    plain = postprocess(*people, POSTS)
    assert not plain.megabytes and all(torch.equal(plain.distances[k], made.distances[k]) for k in POSTS)


def test_re_ranking_reads_three_matrices_of_a_method(people):
    "Each asked for once; the two square ones with the same object on both sides, which a matcher uses"
    q, g, *tables = people
    calls = []
    def distance(a, b):
        calls.append((a is b, len(a), len(b)))
        return skewed(a, b)
    got = postprocess(q, g, *tables, ('none', 'rr', 'rr+tlift'), distance=distance).distances
    assert calls == [(False, 30, 150), (True, 30, 30), (True, 150, 150)]
    assert torch.equal(got['none'], skewed(q, g))
    assert torch.equal(got['rr'], rerank_distances(skewed(q, g), skewed(q, q), skewed(g, g)))


@linux
@pytest.mark.parametrize('mb', [64, 300])
def test_peak_sees_what_was_dropped(mb):
    held = torch.ones(mb * 250_000)
    with Peak() as p:
        a = torch.ones(mb * 250_000)
        time.sleep(.1)
        del a
        b = held[:1000] + 1
    assert .97 * mb < p.ram < mb + 30 and len(b) == 1000


@linux
def test_peak_counts_from_what_was_there():
    "Memory that was free but not given back does not hide a step"
    parts = [torch.ones(250_000) for _ in range(100)]   # 1 MB each, below the size that the library returns at once
    del parts
    with Peak() as p:
        parts = [torch.ones(250_000) for _ in range(100)]
        time.sleep(.1)
    assert 90 < p.ram < 140
    del parts


@linux
def test_peak_of_a_block_that_raises():
    with pytest.raises(KeyError):
        with Peak() as p: raise KeyError
    assert not p.thread.is_alive() and p.ram >= 0 and (p.gpu is None or p.gpu >= 0)


def test_no_word_from_the_system(monkeypatch):
    "Elsewhere memory is not a number, and everything else works"
    import reidnb.core.costs as m
    monkeypatch.setattr(m, '_resident', lambda: float('nan'))
    with Peak() as p: time.sleep(.01)
    assert np.isnan(p.ram)


def test_rank_tells_seconds_and_memory():
    site, posts = make_site('campus', n_train=2, n_test=6, seed=1), ('none', 'rr', 'rr+tlift')
    got = rank(load_model('small'), site, posts, memory=True)
    assert list(got.metrics) == list(got.distances) == list(posts)
    assert list(got.seconds) == list(got.megabytes) == ['query features', 'gallery features', 'distance', 'rr', 'tlift', 'score']
    again = rank(load_model('small'), site, posts)
    assert not again.megabytes and all(again.metrics[k].mAP == got.metrics[k].mAP for k in posts)


def test_a_distance_of_cosines_is_the_default(people):
    q, g, *tables = people
    assert torch.equal(postprocess(q, g, *tables, ('none',)).distances['none'], cosine_distance(q, g))


def lifted(people, post='tlift', **kwargs):
    "mAP as it is and post-processed"
    q, g, query, gallery = people
    made = postprocess(q, g, query, gallery, ('none', post), **kwargs)
    return [evaluate(d, query.pids, gallery.pids, query.cams, gallery.cams).mAP for d in made.distances.values()]


def bent(a, b):
    "Cosines pressed into 0.40 to 0.56, where QAConv's sigma(z/10) lies"
    return 1 - (.40 + .16*torch.sigmoid(3*F.normalize(a) @ F.normalize(b).T))


@pytest.fixture(scope='module')
def rendered():
    "A rendered site as the package's small network sees it"
    site, m = make_site('mall', n_train=2, n_test=40, per_id=8, seed=0), load_model('small')
    f = [extract(m, x, height=m.settings.height, width=m.settings.width) for x in (site.query, site.gallery)]
    return *f, site.query, site.gallery


def test_a_squeezed_score_is_lifted_as_before(rendered):
    "Read as a probability, as it once was, it loses most of the mAP"
    plain, cosine = lifted(rendered)
    assert cosine > plain
    same, squeezed = lifted(rendered, distance=bent)
    assert abs(same - plain) < 1e-4 and abs(squeezed - cosine) < .03 and squeezed > plain - .005
    assert lifted(rendered, distance=bent, scale='probability')[1] < .75*plain


@pytest.mark.parametrize('unit', [1e-3, 1., 1e4])
def test_the_unit_of_a_distance_does_not_matter(people, unit):
    "Nor an offset: Euclidean distances above 1 once gave zeros, and a ranking of ties"
    own = dict(distance=lambda a, b: unit*(torch.cdist(a, b) + 3))
    got = postprocess(*people, ('tlift', 'tfusion'), **own).distances
    want = postprocess(*people, ('tlift', 'tfusion'), distance=torch.cdist).distances
    for k in got: torch.testing.assert_close(got[k], want[k], atol=1e-3, rtol=0)
    assert all(len(row.unique()) > 140 for row in got['tlift'])


def test_a_probability_is_used_as_it_is(people):
    q, g, query, gallery = people
    p = lambda a, b: ((a @ b.T + 1)/2)**4
    got = postprocess(*people, ('tlift',), distance=lambda a, b: 1 - p(a, b), scale='probability').distances['tlift']
    side = query.cams, query.times, gallery.cams, gallery.times
    torch.testing.assert_close(got, 1 - tlift(p(q, g), *side, **TLIFT_APPENDIX), atol=1e-5, rtol=0)
    relative = postprocess(*people, ('tlift',), distance=lambda a, b: 1 - p(a, b)).distances['tlift']
    torch.testing.assert_close(relative, 1 - tlift(unit_scores(p(q, g)), *side, **TLIFT_APPENDIX), atol=1e-5, rtol=0)
    assert (got - relative).abs().max() > .01


def test_re_ranked_distances_stay_as_they_are(people):
    "Jaccard mixtures fill [0,1] whatever the distance was"
    p = lambda a, b: 1 - ((a @ b.T + 1)/2).clamp(0, 1)
    a, b = (postprocess(*people, ('rr+tlift',), distance=p, scale=s).distances['rr+tlift']
            for s in ('relative', 'probability'))
    assert torch.equal(a, b)


@pytest.mark.parametrize('distance, words', [
    (torch.cdist, r'distances run from 0\.\d+ to 1\.\d+'), (lambda a, b: -(a @ b.T).clamp(.01), 'distances run from -'),
    (lambda a, b: torch.full((len(a), len(b)), torch.nan), 'distances run from nan to nan')])
def test_no_probability_is_said_at_once(people, distance, words):
    with pytest.raises(ValueError, match=words): postprocess(*people, ('none',), distance=distance, scale='probability')
    if 'nan' not in words: postprocess(*people, ('tlift',), distance=distance)


def test_a_scale_has_one_of_two_names(people):
    with pytest.raises(ValueError, match="scale 'cosine' is neither 'relative' nor 'probability'"):
        postprocess(*people, ('none',), scale='cosine')


def test_sessions_of_the_tables_reach_tfusion():
    "As when handed on by hand; a table that does not know them has one session"
    site, r = make_site('campus', n_train=2, n_test=10, seed=1), torch.Generator().manual_seed(0)
    q, g = (torch.rand(len(c), 8, generator=r) for c in (site.query, site.gallery))
    side = [x for c in (site.query, site.gallery) for x in (c.cams, c.times)]
    sessions = site.query.extra['session'], site.gallery.extra['session']
    p = unit_scores(-cosine_distance(q, g))
    got = postprocess(q, g, site.query, site.gallery, ('tfusion',)).distances['tfusion']
    torch.testing.assert_close(got, 1 - tfusion(p, *side, sessions=sessions))
    del site.query.extra['session']
    got = postprocess(q, g, site.query, site.gallery, ('tfusion',)).distances['tfusion']
    torch.testing.assert_close(got, 1 - tfusion(p, *side))
    assert len(np.unique(sessions[0])) > 1 and (got - 1 + tfusion(p, *side, sessions=sessions)).abs().max() > 1e-3
