"Cached pixels equal decoded ones; batch-wise augmentation equals the step by step one, in law and pixel by pixel."
import itertools
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import stats
from torch.utils.data import DataLoader

from reidnb.data import loading as L
from reidnb.data.crops import Crops
from reidnb.data.items import CropDataset
from reidnb.data.toys import toy_crops
from reidnb.networks.extraction import extract
from reidnb.data.samplers import PKSampler, ShuffleSampler
from reidnb.data.transforms import IMAGENET_MEAN, method_transform, PIPELINES, RandomErasing, train_transform
from reidnb.data.transforms import test_transform as plain
from reidnb.data.transforms import Views

torch.set_num_threads(1)
LEVEL = 1e-3
RNG = np.random.default_rng(0)


def jpeg(h, w, seed=0, exif=None):
    import io
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(out, 'JPEG', **({'exif': exif} if exif else {}))
    return out.getvalue()


def ragged(sizes): return Crops([jpeg(h, w, i) for i, (h, w) in enumerate(sizes)], np.arange(len(sizes))+1, np.zeros(len(sizes), int))


# --- cache -------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=8), st.integers(0, 12000),
       st.sampled_from([None, (16, 8)]), st.integers(1, 3))
def test_cache_equals_decoding_within_and_above_the_budget(sizes, budget, size, threads):
    crops = ragged(sizes)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        c = L.cache_pixels(crops, budget=budget, size=size, threads=threads)
    need = np.cumsum([size[0]*size[1]*3 if size else a*b*3 for a, b in sizes])
    assert c.kept == (need <= budget).sum() and c.pixels.numel() == (need[c.kept-1] if c.kept else 0) <= budget
    assert bool(w) == (c.kept < len(sizes))
    t = plain(16, 8)
    for i in range(len(sizes)):
        assert torch.equal(t(c.image(i)), t(crops.image(i)))
        if not size: assert (np.array(c.image(i)) == np.array(crops.image(i))).all()
    assert c.fingerprint() == crops.fingerprint() and (c.pids == crops.pids).all()


@pytest.mark.parametrize('name', sorted(PIPELINES))
def test_every_recipe_reads_the_same_from_the_cache(name):
    crops, t = ragged([(40, 20), (32, 16), (70, 50), (9, 31)]), method_transform(name, 32, 16)
    fast = L.cache_for(crops, t)
    assert (L.resize_of(t) is None) == (name in ('qaconv', 'ecn', 'ecn-msmt'))
    for e in range(3):
        a, b = (CropDataset(c, t, seed=2) for c in (crops, fast))
        a.set_epoch(e), b.set_epoch(e)
        assert all(torch.equal(a[i][0], b[i][0]) for i in range(4))


def test_views_and_extraction_from_the_cache():
    crops, t = toy_crops(3, n_cams=2), Views(*[method_transform(k, 32, 16) for k in ('ice', 'ice', 'ice-plain')])
    fast = L.cache_for(crops, t)
    assert fast.image(0).size == (16, 32)
    a, b = (next(iter(DataLoader(CropDataset(c, t, seed=0), 12)))[0] for c in (crops, fast))
    assert all(map(torch.equal, a, b))
    class Mean(torch.nn.Module):
        def embed(self, x): return x.flatten(1)[:, ::7]
    assert torch.equal(extract(Mean(), crops, height=32, width=16), extract(Mean(), fast, height=32, width=16))
    assert L.resize_of(Views(train_transform(32, 16), method_transform('ecn', 32, 16))) is None


def test_only_a_bicubic_resize_to_a_full_size_is_kept():
    from torchvision.transforms import v2 as T
    for first in (T.Resize((8, 4)), T.Resize(8, T.InterpolationMode.BICUBIC), T.Pad(1)):
        assert L.resize_of(T.Compose([first])) is None
    assert L.resize_of(T.Compose([T.Resize((8, 4), T.InterpolationMode.BICUBIC)])) == (8, 4)


def test_selection_replace_and_arrays():
    crops = toy_crops(3, n_cams=2)
    c = L.cache_pixels(crops)
    for rows in (slice(2, 7), [5, 1, 1], crops.pids == 2, np.array([-1])):
        a, b = c[rows], crops[rows]
        assert a.kept == len(b) and a.pixels is c.pixels
        assert all((np.array(a.image(i)) == np.array(b.image(i))).all() for i in range(len(b)))
    assert c.replace(pids=crops.pids*2).kept == len(c) and c.replace(images=crops.images).__class__ is Crops
    pixels = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    assert (np.array(L.cache_pixels(Crops(pixels)).image(2)) == pixels[2]).all()


def test_the_budget_counts_to_the_byte():
    crops = ragged([(10, 10), (10, 10)])
    with pytest.warns(UserWarning, match='1 of 2'): assert L.cache_pixels(crops, budget=599).kept == 1
    assert L.cache_pixels(crops, budget=600).kept == 2


def test_turned_photos_are_cached_as_read():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    crops = Crops([jpeg(20, 10, exif=exif), jpeg(20, 10)])
    c = L.cache_pixels(crops)
    assert c.image(0).size == crops.image(0).size == (20, 10) and c.image(1).size == (10, 20)
    assert (np.array(c.image(0)) == np.array(crops.image(0))).all()


def test_workers_share_the_pixels():
    "What a forked worker writes is seen here, and a spawned one is sent a handle: one block, no copy"
    c, ctx = L.cache_pixels(toy_crops(2, n_cams=1, height=128)), torch.multiprocessing.get_context('fork')
    if not c.pixels.is_shared(): pytest.skip('no shared memory on this machine')
    assert len(ForkingPickler.dumps(c)) < c.pixels.numel()/2
    p = ctx.Process(target=lambda c: c.pixels.zero_(), args=(c,))
    p.start(); p.join()
    assert int(np.array(c.image(1)).sum()) == 0


def test_a_broken_file_is_named():
    crops = Crops([jpeg(20, 10), jpeg(20, 10)[:50]])
    for size in (None, (8, 4)):
        with pytest.raises(ValueError, match='row 1'): L.cache_pixels(crops, size=size)
    with pytest.raises(FileNotFoundError, match='missing'): L.cache_pixels(Crops(['nowhere.jpg']))


# --- random numbers ----------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**62), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(1, 6))
def test_hash_equals_its_definition_in_python_integers(seed, epoch, rows, n):
    M, g = 2**64, 0x9E3779B97F4A7C15
    def m(x):
        x = (x ^ x >> 30)*0xBF58476D1CE4E5B9 % M
        x = (x ^ x >> 27)*0x94D049BB133111EB % M
        return x ^ x >> 31
    u = L.uniforms(seed, epoch, torch.tensor(rows), n)
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    for b, row in enumerate(rows):
        s = m(m(m((seed+g) % M) ^ epoch) ^ row)
        assert u[b].tolist() == [(m((s+(j+1)*g) % M) >> 11)*2.**-53 for j in range(n)]


def test_numbers_are_uniform_and_unrelated():
    rows = torch.arange(20000)
    a = L.uniforms(0, 0, rows, 3)
    for j in range(3): assert stats.kstest(a[:, j], 'uniform').pvalue > LEVEL
    others = [L.uniforms(0, 1, rows, 1), L.uniforms(1, 0, rows, 1), a[:, 1:2], a.roll(1, 0)[:, :1], L.uniforms(0, 0, rows+2**32, 1)]
    for b in others:
        table = np.histogram2d(a[:, 0].numpy(), b[:, 0].numpy(), 8, [[0, 1]]*2)[0]
        assert stats.chisquare(table.ravel()).pvalue > LEVEL


# --- batch-wise augmentation -------------------------------------------------------------------
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99), st.integers(0, 9))
def test_batch_equals_pil_steps_with_the_same_draws(h, w, pad, flip, erase, seed, epoch):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (5, h, w, 3), dtype=np.uint8)
    rows, x = torch.from_numpy(rng.integers(0, 10**6, 5)), torch.from_numpy(images).permute(0, 3, 1, 2)
    a = L.BatchAugment(seed, flip=flip, pad=pad, erase=erase)
    got, d = a(x, rows, epoch), L._draws(a, rows, epoch, h, w)
    for i in range(5):
        m, down, right, top, left, bh, bw = d[i].tolist()
        im = ImageOps.expand(Image.fromarray(images[i]), pad).crop((right, down, right+w, down+h))
        y = plain(h, w)(ImageOps.mirror(im) if m else im)
        assert 0 <= top <= h-bh and 0 <= left <= w-bw
        if bh: y[:, top:top+bh, left:left+bw] = torch.tensor(IMAGENET_MEAN)[:, None, None]
        assert torch.equal(got[i], y)
    assert torch.equal(L._shift_many(x, d, pad), L._shift_each(x, d, pad))
    assert torch.equal(L._erase_many(got.clone(), d, a.value), L._erase_each(got.clone(), d, a.value))
    order = torch.tensor([3, 0, 4])
    assert torch.equal(a(x[order], rows[order], epoch), got[order])


@pytest.mark.parametrize('area,aspect', [((.02, .4), (.3, 1/.3)), ((.02, .2), (.3, 3.))])
def test_batch_draws_have_the_law_of_the_single_ones(area, aspect):
    a = L.BatchAugment(3, erase=.6, erase_area=area, erase_aspect=aspect)
    d = L._draws(a, torch.arange(6000), 0, 256, 128).numpy()
    torch.manual_seed(0)
    b = np.array([RandomErasing(1, area, aspect).box(256, 128) for _ in range(2500)])
    hit = d[:, 5] > 0
    assert stats.binomtest(int(d[:, 0].sum()), 6000, .5).pvalue > LEVEL and stats.binomtest(int(hit.sum()), 6000, .6).pvalue > LEVEL
    for k in (1, 2): assert stats.chisquare(np.bincount(d[:, k], minlength=21)).pvalue > LEVEL
    table = np.zeros((2, 21))
    np.add.at(table, (d[:, 0], d[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > LEVEL
    both = np.zeros((2, 2))
    np.add.at(both, (d[:, 0], hit.astype(int)), 1)
    assert stats.chi2_contingency(both).pvalue > LEVEL  # mirror and erasing are independent
    for k in range(4): assert stats.ks_2samp(d[hit, 3+k], b[:, k]).pvalue > LEVEL
    assert stats.ks_2samp((d[:, 5]*d[:, 6])[hit], b[:, 2]*b[:, 3]).pvalue > LEVEL


def test_impossible_rectangles_leave_the_image():
    a, x = L.BatchAugment(erase=1, pad=0, flip=0, erase_area=(.9, .9), erase_aspect=(20, 20)), torch.zeros(2, 3, 64, 32, dtype=torch.uint8)
    assert (L._draws(a, torch.arange(2), 0, 64, 32)[:, 3:] == 0).all() and a(x, torch.arange(2)).unique().numel() <= 3


def test_no_normalisation_and_bad_input():
    x = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    assert (L.BatchAugment(flip=0, pad=0, erase=0, mean=None)(x, torch.arange(2)) == 1).all()
    with pytest.raises(ValueError, match='uint8'): L.BatchAugment()(x.float(), torch.arange(2))
    for bad in (dict(flip=-1), dict(erase=2), dict(pad=-1)):
        with pytest.raises(ValueError, match='probabilities'): L.BatchAugment(**bad)


# --- loaders -----------------------------------------------------------------------------------
def rows_of(loader, epoch):
    loader.dataset.set_epoch(epoch); loader.batch_sampler.set_epoch(epoch)
    x, i = map(torch.cat, zip(*loader))
    return i, x


def test_loaders_agree_and_do_not_depend_on_workers_batches_or_processes():
    crops = toy_crops(6, n_cams=2)
    def make(workers=0, sampler=None):
        data = CropDataset(L.cache_pixels(crops, size=(32, 16)), L.pixel_transform(32, 16))
        return L.AugmentedLoader(DataLoader(data, batch_sampler=sampler or ShuffleSampler(24, 8), num_workers=workers), L.BatchAugment(7))
    i, x = rows_of(make(), 3)
    for other in (make(2), make(sampler=ShuffleSampler(24, 6)), L.ResidentLoader(crops, ShuffleSampler(24, 8), L.BatchAugment(7), height=32, width=16)):
        j, y = rows_of(other, 3)
        assert torch.equal(x[i.argsort()], y[j.argsort()])
    j, y = rows_of(make(), 4)
    assert not torch.equal(x[i.argsort()], y[j.argsort()])
    part = make(sampler=PKSampler(crops.pids, 6, 2).shard(1, 2))
    j, y = rows_of(part, 3)
    assert torch.equal(y, x[i.argsort()][j])
    assert len(make()) == 3


def test_a_method_reads_from_the_loaders():
    "`Method.batches` needs `dataset.set_epoch`, `batch_sampler.rank` and (images, rows)"
    from reidnb.training.method import Method, Settings
    crops = toy_crops(4, n_cams=2)
    loader = L.ResidentLoader(crops, PKSampler(crops.pids, 4, 2), L.BatchAugment(0), height=32, width=16)
    batches = list(Method(Settings(), crops).batches(loader, 1))
    assert batches and all(b.images.shape == (8, 3, 32, 16) and b.index.dtype == torch.int64 for b in batches)
    with pytest.raises(ValueError, match='budget'): L.ResidentLoader(crops, None, None, budget=10)
    t, got = train_transform(32, 16), []
    for c in (crops, L.cache_for(crops, t)):  # a method built on a cached table sees the same batches
        m = Method(Settings(), c)
        got.append(list(m.batches(m.loader(PKSampler(crops.pids, 4, 2), t), 1)))
    assert all(torch.equal(a.images, b.images) and torch.equal(a.index, b.index) for a, b in zip(*got))


@pytest.mark.cuda
def test_gpu_gives_the_same_pixels():
    a, x = L.BatchAugment(1), torch.randint(0, 256, (16, 3, 64, 32), dtype=torch.uint8)
    rows = torch.arange(16)
    torch.testing.assert_close(a(x, rows, 2), a.cuda()(x.cuda(), rows.cuda(), 2).cpu(), rtol=0, atol=1e-6)


# --- reduced decoding --------------------------------------------------------------------------
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(8, 300), st.integers(8, 200), st.integers(4, 80), st.integers(4, 60))
def test_draft_changes_nothing_below_twice_the_size(h, w, height, width):
    crops = Crops([jpeg(h, w)])
    d = L.DraftCrops(crops, height, width)
    if h < 2*height or w < 2*width:
        assert d.scale(0) == 1 and (np.array(d.image(0)) == np.array(crops.image(0))).all()
    else:
        assert d.scale(0) in (2, 4, 8)
        assert d.image(0).width >= width and d.image(0).height >= height and d.read_size(0) == d.image(0).size


def test_draft_keeps_other_formats_and_names_broken_files():
    import io
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(out, 'PNG')
    d = L.DraftCrops(Crops([out.getvalue(), jpeg(90, 60)[:80]]), 16, 8)
    assert d.scale(0) == 1 and d.image(0).size == (60, 90)
    with pytest.raises(ValueError, match='row 1'): d.image(1)


# --- rates -------------------------------------------------------------------------------------
def test_demand_counts_a_linear_layer():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*8*4, 10))
    assert np.isclose(L.gpu_demand(net, 8, 4, peak=1e6, share=.5), .5e6/(3*2*96*10))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_crop_drawn_twice_in_an_epoch_looks_different(workers):
    "Also with workers, in shards, and alike for every loader"
    crops, sampler = toy_crops(1, n_cams=1, n_each=2), PKSampler([1, 1], 1, 2, epoch_size=3)
    def make(s):
        data = CropDataset(L.cache_pixels(crops, size=(32, 16)), L.pixel_transform(32, 16))
        return L.AugmentedLoader(DataLoader(data, batch_sampler=s, num_workers=workers), L.BatchAugment(7))
    i, x = rows_of(make(sampler), 0)
    assert len(i) == 6 and all(not torch.equal(a, b) for a, b in itertools.combinations(x[i == 0], 2))
    j, y = rows_of(L.ResidentLoader(crops, sampler, L.BatchAugment(7), height=32, width=16), 0)
    assert torch.equal(i, j) and torch.equal(x, y)
    parts = [rows_of(make(PKSampler([1, 1], 1, 2, epoch_size=3).shard(r, 2)), 0)[1] for r in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), x)
    single = DataLoader(CropDataset(crops, train_transform(32, 16), seed=1), batch_sampler=sampler, num_workers=workers)
    k, z = rows_of(single, 0)
    assert torch.equal(i, k) and not torch.equal(*z[k == 1][:2])
