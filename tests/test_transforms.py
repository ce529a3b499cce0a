"Distributions, edge cases and exact orders of the transforms; views and CamStyle draws."
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader

from reidnb.data import transforms as R
from reidnb.generators import camstyle as V
from reidnb.data.crops import Crops
from reidnb.data.items import CropDataset
from reidnb.data.toys import toy_crops
from reidnb.data.samplers import PKSampler

torch.set_num_threads(1)
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEVEL = 1e-3  # of every statistical test; seeds are fixed, so a pass stays a pass


def noise(h, w, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


# --- any image ---------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(1, 50), st.sampled_from(sorted(R.PIPELINES)),
       st.sampled_from([None, 'none', 're', 'cutout', 'ro']), st.integers(0, 2**31))
def test_every_pipeline_takes_any_image(h, w, height, width, name, occlusion, seed):
    image = noise(h, w, seed)
    before = np.array(image)
    torch.manual_seed(seed)
    x = R.method_transform(name, height, width, occlusion=occlusion)(image)
    assert x.shape == (3, height, width) and x.dtype == torch.float32 and x.isfinite().all()
    assert (np.array(image) == before).all()


@QUIET
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**31))
def test_boxes_lie_inside(h, w, seed):
    torch.manual_seed(seed)
    top, left, bh, bw = R.RandomSizedRectCrop().box(h, w)
    assert 0 <= top <= h-bh and 0 <= left <= w-bw and bh > 0 and bw > 0
    box = R.RandomOcclusion().box(h, w)
    if int(.8*min(h, w)) < 2: assert box is None
    else:
        top, left, side = box
        assert 1 <= side < int(.8*min(h, w)) and 0 <= top <= h-side and 0 <= left <= w-side


@pytest.mark.parametrize('name', sorted(R.PIPELINES))
def test_a_pipeline_repeats_with_its_seed_and_survives_pickling(name):
    t, image = R.method_transform(name, 48, 24), noise(50, 30)
    def draw(f): torch.manual_seed(3); return f(image)
    assert torch.equal(draw(t), draw(t)) and torch.equal(draw(t), draw(pickle.loads(pickle.dumps(t))))


# --- distributions -----------------------------------------------------------------------------
def test_rectangles_follow_an_independent_simulation():
    "ECN: area U(.64,1), aspect U(2,3), 10 attempts; simulated with rejection in numpy"
    rng, H, W = np.random.default_rng(0), 128, 64
    a, r = rng.uniform(.64, 1, (6000, 10))*H*W, rng.uniform(2, 3, (6000, 10))
    h, w = np.round(np.sqrt(a*r)), np.round(np.sqrt(a/r))
    ok = (h <= H) & (w <= W)
    some, at = ok.any(1), ok.argmax(1)
    h, w = (x[np.arange(6000), at][some] for x in (h, w))
    torch.manual_seed(0)
    b = np.array([R.RandomSizedRectCrop().box(H, W) for _ in range(3000)])
    whole = (b == (0, 0, H, W)).all(1)
    assert stats.ks_2samp(b[~whole, 2], h).pvalue > LEVEL and stats.ks_2samp(b[~whole, 3], w).pvalue > LEVEL
    p = 1-some.mean()
    assert stats.binomtest(int(whole.sum()), 3000, max(p, 1e-4)).pvalue > LEVEL
    free = b[(b[:, 3] == 50)]  # one width: its 15 places are equally likely
    assert stats.chisquare(np.bincount(free[:, 1], minlength=15)).pvalue > LEVEL


def test_rectangle_aspects_are_uniform_and_not_log_uniform():
    "Where nothing is refused; torchvision's law differs by .05 in its distribution function"
    torch.manual_seed(0)
    b = np.array([R.RandomSizedRectCrop(area=(.05, .2)).box(4000, 4000) for _ in range(6000)])
    assert stats.kstest(b[:, 2]/b[:, 3], stats.uniform(2, 1).cdf).pvalue > LEVEL
    assert stats.kstest(b[:, 2]*b[:, 3]/4000**2, stats.uniform(.05, .15).cdf).pvalue > LEVEL
    assert stats.kstest(np.log(b[:, 2]/b[:, 3]), stats.uniform(np.log(2), np.log(1.5)).cdf).pvalue < LEVEL
    assert stats.kstest((b[:, 0]+.5)/(4001-b[:, 2]), 'uniform').pvalue > LEVEL
    assert stats.kstest((b[:, 1]+.5)/(4001-b[:, 3]), 'uniform').pvalue > LEVEL


@pytest.mark.parametrize('h,w', [(384, 128), (30, 90), (3, 3), (6, 5)])
def test_occlusion_sides_and_places_are_uniform(h, w):
    torch.manual_seed(0)
    ro, end = R.RandomOcclusion(), int(.8*min(h, w))
    if end < 2: assert ro.box(h, w) is None; return
    b = np.array([ro.box(h, w) for _ in range(4000)])
    assert b[:, 2].min() >= 1 and b[:, 2].max() <= end-1
    if end > 2: assert stats.chisquare(np.bincount(b[:, 2], minlength=end)[1:]).pvalue > LEVEL
    u = (b[:, 0]+np.random.default_rng(0).random(4000))/(h-b[:, 2]+1)  # a uniform place, smoothed, is U(0,1)
    v = (b[:, 1]+np.random.default_rng(1).random(4000))/(w-b[:, 2]+1)
    assert stats.kstest(u, 'uniform').pvalue > LEVEL and stats.kstest(v, 'uniform').pvalue > LEVEL


@pytest.mark.parametrize('name,p,area,aspect', [('a', .5, (.02, .2), (.3, 3)), ('b', .5, (.02, .4), (.3, 1/.3)),
                                                ('iics', .5, (.02, .4), (.3, 1/.3)), ('ice', .6, (.02, .4), (.3, 1/.3))])
def test_erasing_presets_follow_their_rows(name, p, area, aspect):
    e = R.erasing(name, 9.)
    torch.manual_seed(0)
    n, x = 1500, torch.zeros(3, 64, 32)
    assert stats.binomtest(sum(bool(e(x).any()) for _ in range(n)), n, p).pvalue > LEVEL
    rng, H, W = np.random.default_rng(0), 256, 128
    a, r = rng.uniform(*area, 20000)*H*W, rng.uniform(*aspect, 20000)
    h, w = np.round(np.sqrt(a*r)), np.round(np.sqrt(a/r))
    ok = (h < H) & (w < W)
    b = np.array([e.box(H, W) for _ in range(1500)])
    for mine, theirs in ((b[:, 2], h[ok]), (b[:, 3], w[ok]), (b[:, 2]*b[:, 3], (h*w)[ok])):
        assert stats.ks_2samp(mine, theirs).pvalue > LEVEL


def test_blur_probability_and_radius(monkeypatch):
    radii = []
    real = R.ImageFilter.GaussianBlur
    monkeypatch.setattr(R.ImageFilter, 'GaussianBlur', lambda r: radii.append(r) or real(r))
    torch.manual_seed(0)
    blur, image = R.GaussianBlur(), noise(8, 8)
    for _ in range(2000): blur(image)
    assert stats.binomtest(len(radii), 2000, .5).pvalue > LEVEL
    assert stats.kstest(radii, stats.uniform(.1, 1.9).cdf).pvalue > LEVEL


def test_flip_and_shift_of_a_recipe():
    "Half mirrored, 21 x 21 offsets uniform and independent of the mirror"
    mark = np.zeros((40, 40, 3), np.uint8)
    mark[20, 10] = 255
    t = R.method_transform('iics', 40, 40, occlusion='none')
    torch.manual_seed(0)
    at = np.array([np.unravel_index(t(Image.fromarray(mark))[0].argmax(), (40, 40)) for _ in range(3000)])
    down = at[:, 0]-10
    # column 10 goes to 0..20, its mirror image 29 to 19..39; the two share columns 19 and 20
    left, right = at[:, 1][at[:, 1] < 19], at[:, 1][at[:, 1] > 20]-21
    assert stats.chisquare(np.bincount(down, minlength=21)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(left, minlength=19)).pvalue > LEVEL
    assert stats.chisquare(np.bincount(right, minlength=19)).pvalue > LEVEL
    assert stats.binomtest(len(left), len(left)+len(right), .5).pvalue > LEVEL


def test_occlusion_comes_on_the_image_and_erasing_after_normalisation():
    white = Image.new('RGB', (16, 32), 'white')
    torch.manual_seed(0)
    x = torch.stack([R.method_transform('qaconv', 32, 16)(noise(32, 16, i)) for i in range(20)])
    assert x.min() >= 0 and x.max() == 1
    seen = set()
    for _ in range(60): seen |= set(R.method_transform('abmt', 32, 16)(white)[0].unique().tolist())
    assert any(math.isclose(v, .485, abs_tol=1e-6) for v in seen)


def test_table_of_recipes_names_the_rows_of_the_fact_sheet():
    kinds = {k: [type(s).__name__ for s in R.method_transform(k).transforms] for k in R.PIPELINES}
    pads = {k for k, s in kinds.items() if 'Pad' in s}
    assert pads == {'iics', 'abmt-source', 'abmt', 'ice', 'spcl', 'cap', 'mmt'}
    assert {k for k, s in kinds.items() if 'RandomHorizontalFlip' not in s} == {'gcl', 'ice-plain'}
    assert {k for k, s in kinds.items() if 'Normalize' not in s} == {'qaconv'}
    assert {k for k, s in kinds.items() if 'RandomErasing' in s} == {'ecn', 'iics', 'abmt', 'ice', 'spcl'}
    assert {k: R.PIPELINES[k][:2] for k in ('qaconv', 'scr', 'ecn')} == {'qaconv': (384, 128), 'scr': (384, 192), 'ecn': (256, 128)}


# --- views -------------------------------------------------------------------------------------
def test_views_are_deterministic_and_independent_of_each_other():
    crops, t = toy_crops(3, n_cams=2), R.train_transform(32, 16)
    def item(*ts, i=1, e=0, seed=5):
        d = CropDataset(crops, R.Views(*ts), seed=seed)
        d.set_epoch(e)
        return d[i][0]
    a, b, c = item(t, t, t)
    assert not (torch.equal(a, b) or torch.equal(b, c) or torch.equal(a, c))
    assert torch.equal(item(R.test_transform(32, 16), t)[1], b) and torch.equal(item(t)[0], a)
    for other in (item(t, i=2)[0], item(t, e=1)[0], item(t, seed=6)[0]): assert not torch.equal(a, other)


def test_views_leave_the_random_stream_where_one_draw_leaves_it():
    "A change of a view's pipeline does not shift what others draw"
    image, t = noise(20, 10), R.train_transform(16, 8)
    states = []
    for ts in ((t,), (t, t, t), (R.test_transform(16, 8),)):
        torch.manual_seed(0)
        R.Views(*ts)(image)
        states.append(torch.random.get_rng_state())
    assert all(torch.equal(s, states[0]) for s in states)


@pytest.mark.parametrize('names', [('ice', 'ice', 'ice-plain'), ('mmt', 'mmt'), ('abmt',)])
def test_views_in_a_loader(names):
    crops = toy_crops(4, n_cams=2)
    d = CropDataset(crops, R.Views(*[R.method_transform(k, 32, 16) for k in names]), seed=0)
    views, rows = next(iter(DataLoader(d, batch_sampler=PKSampler(crops.pids, 4, 2))))
    assert [v.shape for v in views] == [(8, 3, 32, 16)]*len(names) and rows.shape == (8,)


# --- CamStyle ----------------------------------------------------------------------------------
def styled(n=30, cams=4, drop=(), seed=0):
    "Images and fakes that say in their pixels which row and camera they are of"
    cam = np.arange(n) % cams
    def px(i, c): return np.full((4, 4, 3), (i, c, 0), np.uint8)
    real = Crops(np.stack([px(i, cam[i]) for i in range(n)]), np.ones(n, int), cam)
    pairs = [(i, c) for i in range(n) for c in range(cams) if c != cam[i] and (i, c) not in drop]
    pairs = [pairs[k] for k in np.random.default_rng(seed).permutation(len(pairs))]
    table = np.array(pairs, int).reshape(-1, 2)  # drop may leave none
    fakes = Crops(np.array([px(*p) for p in pairs], np.uint8).reshape(-1, 4, 4, 3), cams=table[:, 1], extra={'row': table[:, 0]})
    return real, fakes


def pixels(image): return torch.from_numpy(np.array(image))[0, 0, :2]


@QUIET
@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 100), st.integers(0, 5), st.data())
def test_camstyle_items_are_of_their_row_and_of_the_drawn_camera(cams, each, seed, epoch, data):
    n = cams*each
    drop = data.draw(st.sets(st.tuples(st.integers(0, n-1), st.integers(0, cams-1)), max_size=4))
    real, fakes = styled(n, cams, drop)
    lost = sum(c != real.cams[i] for i, c in drop)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        d = V.CamStyleDataset(real, pixels, fakes, seed=seed)
    assert d.missing == lost and len(w) == (lost > 0) and (not lost or f'{lost} of' in str(w[0].message))
    d.set_epoch(epoch)
    for i in range(n):
        x, row = d[i]
        c = d.style(i)
        assert row == i and x[0] == i and x[1] == (real.cams[i] if (i, c) in drop else c)


def test_camstyle_cameras_are_uniform_and_independent():
    real, fakes = styled(40, 4)
    d = V.CamStyleDataset(real, pixels, fakes, seed=1)
    c = np.array([[d.style(i) for i in range(40)] for e in range(100) if d.set_epoch(e) is None])
    assert stats.chisquare(np.bincount(c.ravel(), minlength=4)).pvalue > LEVEL
    for cam in range(4): assert stats.chisquare(np.bincount(c[:, real.cams == cam].ravel(), minlength=4)).pvalue > LEVEL
    for a, b in ((c[:-1], c[1:]), (c[:, :-1], c[:, 1:])):
        table = np.zeros((4, 4))
        np.add.at(table, (a.ravel(), b.ravel()), 1)
        assert stats.chi2_contingency(table).pvalue > LEVEL


def test_camstyle_takes_cameras_that_are_not_contiguous():
    real, fakes = styled(8, 2)
    real, fakes = real.replace(cams=real.cams*5+2), fakes.replace(cams=fakes.cams*5+2)
    d = V.CamStyleDataset(real, pixels, fakes, seed=0)
    assert {d.style(i) for i in range(8)} <= {2, 7} and all(d[i][0][0] == i for i in range(8))


def test_one_camera_has_no_fakes_and_needs_none():
    real = Crops(np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(5)]), cams=np.zeros(5, int))
    none = Crops(np.zeros((0, 4, 4, 3), np.uint8), cams=np.zeros(0, int), extra={'row': np.zeros(0, int)})
    d = V.CamStyleDataset(real, pixels, none, seed=0)
    assert d.missing == 0 and [int(d[i][0][0]) for i in range(5)] == [0, 1, 2, 3, 4]


def test_find_fakes_reports_a_folder_without_any(tmp_path):
    crops = toy_crops(2, n_cams=2)
    with pytest.raises(ValueError, match='named') if len({crops.file_name(i) for i in range(8)}) < 8 else \
            pytest.raises(FileNotFoundError, match='no fake'): V.find_fakes(crops, tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder'): V.find_fakes(crops, tmp_path/'none')
