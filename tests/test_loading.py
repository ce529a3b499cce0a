"What a batch path gives is what the pipeline gives crop by crop: pixels, draws, batches, and the log of a run."
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch.utils.data import default_collate
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

from children import plain
from reidnb.core.checkpoints import seed_everything
from reidnb.data import loading as L
from reidnb.data.crops import Crops
from reidnb.data.items import CropDataset, hash_keys, item_state, item_states, Row
from reidnb.data.samplers import PKSampler, ShuffleSampler
from reidnb.data.toys import toy_crops
from reidnb.data.transforms import (Cutout, method_transform, pipeline, PIPELINES, RandomErasing, test_transform as
    plain_transform, train_transform, Views)
from reidnb.methods.registry import recipe
from reidnb.training.loop import fit
from reidnb.training.method import Method, Settings

torch.set_num_threads(1)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GREY = 1 / 255 / .224 + 1e-6   # a grey level after normalisation


def jpeg(h, w, seed=0, exif=None):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(out, 'JPEG', **({'exif': exif} if exif else {}))
    return out.getvalue()


def ragged(sizes): return Crops([jpeg(h, w, i) for i, (h, w) in enumerate(sizes)], np.arange(len(sizes))+1, np.zeros(len(sizes), int))


SOME = ragged([(40, 20), (32, 16), (70, 50), (9, 31), (48, 24), (1, 1)])


# --- pixels ------------------------------------------------------------------------------------
@QUICK
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=8), st.integers(0, 3000),
       st.lists(st.integers(0, 7), min_size=1, max_size=6), st.booleans())
def test_pixels_equal_the_resize_within_and_above_the_budget(sizes, budget, rows, shared):
    crops, size = ragged(sizes), (16, 8)
    rows = [i % len(crops) for i in rows]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        p = L.Pixels(crops, size, budget=budget, shared=shared)
    room = min(len(crops), budget//(16*8*3))
    assert p.block.numel() == room*16*8*3 <= budget and bool(w) == (room < len(crops))
    resize = T.Resize(size, T.InterpolationMode.BICUBIC)
    oracle = torch.stack([TF.pil_to_tensor(resize(crops.image(i))) for i in rows])
    assert torch.equal(p[rows], oracle) and torch.equal(p[rows], oracle)
    assert p.kept == len({i for i in rows if i < room})


def test_the_budget_counts_to_the_byte(monkeypatch):
    crops = ragged([(10, 10), (10, 10)])
    with pytest.warns(UserWarning, match='1 of 2'): assert L.Pixels(crops, (10, 10), budget=599).room == 1
    assert L.Pixels(crops, (10, 10), budget=600).room == 2
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert L.pixel_budget(4000) == 1000


def test_turned_photos_are_read_as_decoded():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    crops = Crops([jpeg(20, 10, exif=exif)])
    assert torch.equal(L.Pixels(crops, (10, 20))[[0]][0], TF.pil_to_tensor(crops.image(0)))


def test_a_broken_file_is_named():
    crops = Crops([jpeg(20, 10), jpeg(20, 10)[:50]])
    with pytest.raises(ValueError, match='row 1'): L.Pixels(crops, (8, 4))[[0, 1]]
    with pytest.raises(FileNotFoundError, match='missing'): L.Pixels(Crops(['nowhere.jpg']), (8, 4))[[0]]


def test_only_a_bicubic_resize_to_a_full_size_is_kept():
    for first in (T.Resize((8, 4)), T.Resize(8, T.InterpolationMode.BICUBIC), T.Pad(1)):
        assert L.resize_of(T.Compose([first])) is None
    assert L.resize_of(T.Compose([T.RandomHorizontalFlip(.5), T.Resize((8, 4), T.InterpolationMode.BICUBIC)])) == (8, 4)
    assert L.resize_of(Views(train_transform(32, 16), method_transform('ecn', 32, 16))) is None


# --- draws -------------------------------------------------------------------------------------
@QUICK
@given(st.lists(st.lists(st.integers(0, 2**70), min_size=1, max_size=7), max_size=6))
def test_keys_are_hashed_as_numpy_does(keys):
    assert hash_keys([tuple(k) for k in keys]) == [int(np.random.SeedSequence(k).generate_state(1, np.uint64)[0]) for k in keys]


@QUICK
@given(st.integers(0, 2**62), st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 5)), max_size=6))
def test_states_of_a_batch_are_those_of_its_items(seed, epoch, rows):
    rows = [Row(i, v) if v else i for i, v in rows]
    assert item_states(seed, epoch, rows) == [item_state(seed, epoch, i) for i in rows]


# --- the batch form ----------------------------------------------------------------------------
def both(transform, seed=2, epoch=1, rows=range(6), crops=SOME):
    "A batch by the batch form, and stacked from the pipeline"
    one, two = L.BatchDataset(crops, transform, seed), CropDataset(crops, transform, seed)
    one.set_epoch(epoch), two.set_epoch(epoch)
    (x, i), (y, j) = one.__getitems__(rows), default_collate([two[r] for r in rows])
    assert torch.equal(i, j)
    return x, y


@pytest.mark.parametrize('name', sorted(PIPELINES))
@pytest.mark.parametrize('hide', [None, 'none', 're', 'cutout', 'ro'])
def test_every_recipe_gives_the_same_batch(name, hide):
    t = method_transform(name, 48, 24, occlusion=hide)
    assert (L.batch_form(t) is None) == name.startswith('ecn')
    if name.startswith('ecn'): return
    for epoch, seed in itertools.product(range(4), (0, 2**40)):
        x, y = both(t, seed, epoch)
        assert x.dtype == torch.float32 and x.is_contiguous()
        assert torch.equal(x, y) if name != 'ice' else (x-y).abs().max() <= GREY


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 12), st.floats(0, 1), st.floats(0, 1), st.booleans(),
       st.integers(0, 2**32), st.integers(0, 9))
def test_any_size_and_strength_gives_the_same_batch(h, w, pad, flip, erase, norm, seed, epoch):
    t = train_transform(h, w, pad=pad, flip=flip, erase=erase, **({} if norm else {'mean': None}))
    rows = [3, Row(3, 1), 0, 5, Row(3, 2), 1]
    assert torch.equal(*both(t, seed, epoch, rows))


@pytest.mark.parametrize('p', [0, .3, .6, .7, 1])
def test_probabilities_are_compared_as_torch_does(p):
    steps = [T.RandomHorizontalFlip(p), Cutout(3, .5)]
    assert torch.equal(*both(pipeline(20, 10, image_steps=steps, tensor_steps=[RandomErasing(p), RandomErasing(1-p, value=0)])))


def test_views_have_their_own_draws():
    strong = pipeline(48, 24, image_steps=[T.Pad(3), T.RandomCrop((48, 24)), T.RandomHorizontalFlip()], tensor_steps=[RandomErasing(.6)])
    mirror = method_transform('scr', 48, 24)   # changes pixels in place, which the second view must not see
    for views in (Views(strong, strong, plain_transform(48, 24)), Views(mirror, plain_transform(48, 24)), Views(plain_transform(48, 24), strong), Views(strong)):
        for epoch in range(3):
            x, y = both(views, epoch=epoch)
            assert isinstance(x, tuple) and len(x) == len(y) and all(map(torch.equal, x, y))
    x, _ = both(Views(strong, strong))
    assert not torch.equal(*x)


@QUICK
@given(st.integers(1, 40), st.integers(1, 30), st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=1, max_size=5), st.integers(0, 99))
def test_blur_is_pillows(h, w, sigmas, seed):
    "To one grey level in few pixels: a processor that fuses products and sums may round the weights otherwise"
    x = torch.randint(256, (len(sigmas), 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    y = L.blur_batch(x.clone(), sigmas)
    for a, b, s in zip(x, y, sigmas):
        im = Image.fromarray(a.permute(1, 2, 0).numpy())
        im = np.array(im if s is None else im.filter(ImageFilter.GaussianBlur(s)))
        assert np.abs(im.astype(int)-b.permute(1, 2, 0).numpy()).max() <= 1


def test_what_has_no_batch_form_is_read_crop_by_crop():
    t = train_transform(48, 24)
    for other in (T.Compose([*t.transforms, T.RandomRotation(9)]), T.Compose(t.transforms*2), T.Compose(t.transforms[1:]),
                  T.Compose([t.transforms[0], T.Pad(3, padding_mode='edge'), *t.transforms[2:]]), Views(t, t.transforms[0]), None):
        assert L.batch_form(other) is None and type(L.training_items(SOME, other)) is CropDataset
    with pytest.raises(ValueError, match='no batch form'): L.BatchAugment(lambda im: im)


# --- loaders -----------------------------------------------------------------------------------
def rows_of(loader, epoch):
    loader.dataset.set_epoch(epoch); loader.batch_sampler.set_epoch(epoch)
    x, i = map(torch.cat, zip(*loader))
    return i, x


HOW = [dict(ahead=False), dict(ahead=True), dict(workers=2)]


@pytest.mark.parametrize('how', HOW)
def test_batches_do_not_depend_on_threads_processes_or_shards(how):
    crops, t = toy_crops(6, n_cams=2), train_transform(32, 16)
    def make(sampler, data=None): return L.EpochLoader(data or L.training_items(crops, t, 7), sampler, **how)
    oracle = torch.stack([x for x, _ in items(crops, t, 7, 3)])
    for batch in (8, 6):
        i, x = rows_of(make(ShuffleSampler(24, batch)), 3)
        assert torch.equal(x[i.argsort()], oracle)
    i, x = rows_of(make(ShuffleSampler(24, 8), CropDataset(crops, t, 7)), 3)
    assert torch.equal(x[i.argsort()], oracle)
    j, y = rows_of(make(PKSampler(crops.pids, 6, 2).shard(1, 2)), 3)
    assert torch.equal(y, oracle[j])


def items(crops, t, seed, epoch):
    data = CropDataset(crops, t, seed)
    data.set_epoch(epoch)
    return [data[i] for i in range(len(crops))]


@pytest.mark.parametrize('how', HOW)
def test_a_crop_drawn_twice_in_an_epoch_looks_different(how):
    crops, sampler = toy_crops(1, n_cams=1, n_each=2), PKSampler([1, 1], 1, 2, epoch_size=3)
    def make(s): return L.EpochLoader(L.training_items(crops, train_transform(32, 16), 1), s, **how)
    i, x = rows_of(make(sampler), 0)
    assert len(i) == 6 and all(not torch.equal(a, b) for a, b in itertools.combinations(x[i == 0], 2))
    parts = [rows_of(make(PKSampler([1, 1], 1, 2, epoch_size=3).shard(r, 2)), 0)[1] for r in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), x)


def test_processes_share_what_they_decode():
    data = L.training_items(toy_crops(6, n_cams=2), train_transform(32, 16), 0)
    loader = L.EpochLoader(data, ShuffleSampler(24, 8), workers=2)
    rows_of(loader, 0)
    if not L._block(9, True).is_shared(): pytest.skip('no shared memory on this machine')
    assert data.pixels.kept == 24


def test_a_method_keeps_pixels_and_processes_over_its_epochs():
    crops, t = toy_crops(6, n_cams=2), train_transform(32, 16)
    m = Method(Settings(workers=2), crops)
    one, pids = [], set()
    for n in range(3):
        loader = m.loader(ShuffleSampler(24, 8, seed=n), t)   # another sampler each epoch, as clustering methods do
        one.append(list(m.batches(loader, n)))
        pids |= {w.pid for w in loader._started[0]._iterator._workers}
    assert len(pids) == 2 and m.loader(ShuffleSampler(24, 8), t).dataset is loader.dataset
    m = Method(Settings(), crops)
    for n, batches in enumerate(one):
        again = list(m.batches(m.loader(ShuffleSampler(24, 8, seed=n), t), n))
        assert all(torch.equal(a.images, b.images) and torch.equal(a.index, b.index) for a, b in zip(batches, again))
    assert m.loader(ShuffleSampler(24, 8), train_transform(32, 16)).dataset is not loader.dataset
    for _ in range(9): m.loader(ShuffleSampler(24, 8), train_transform(32, 16))
    assert len(m._loaders) <= 4


# --- a run -------------------------------------------------------------------------------------
SMALL = dict(backbone='small', weights='none', height=64, width=32, epochs=2, warmup=0)
CLUSTERS = dict(iterations=4, p=2, k=2, k1=6, eps=.7, min_samples=2)
RUNS = {'baseline': dict(p=4, k=2, pad=3), 'qaconv-small': dict(batch_size=8), 'scr-small': dict(height=96, width=48, p=4, k=2),
        'ice-small': dict(CLUSTERS, pad=3), 'ice': dict(CLUSTERS, pad=3, blur=0., truth=True), 'spcl': dict(CLUSTERS, gap=0.),
        'cap': CLUSTERS}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', RUNS)
def test_a_run_is_the_same_crop_by_crop(name, tmp_path, monkeypatch):
    "Both ways to a batch give the log of the other, to the bit; with blur to a grey level's worth"
    crops, logs = toy_crops(8, n_cams=2, n_each=3), []
    for batch in (True, False):
        if not batch: monkeypatch.setattr(L, 'batch_form', lambda t: None)
        cls, s = recipe(name, **{**SMALL, **RUNS[name]})
        seed_everything(0)
        m = cls(s, crops)
        fit(m, tmp_path/str(batch), progress=False)
        assert {type(x[-1].dataset) for x in m._loaders} == {L.BatchDataset if batch else CropDataset}
        logs.append(plain(tmp_path/str(batch), ('seconds', 'share')))
    assert sum('loss' in r for r in logs[0]) >= 2
    if name != 'ice-small': assert logs[0] == logs[1]
    for a, b in zip(*logs): assert a.keys() == b.keys() and all(abs(a[k]-b[k]) <= .05*(1+abs(a[k])) for k in a)
