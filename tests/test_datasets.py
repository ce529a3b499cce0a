"""Tests of reidnb.datasets.catalogue: Market's layout in depth, and every dataset with a file missing, corrupt and misnamed."""
import re
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_trees import FOLDERS, MAKERS, PIXELS, SPLITS, Broken, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reidnb.data.toys import toy_crops
from reidnb.datasets.catalogue import DATASETS, datasets_readme, datasets_table, find_family, find_spec, load
from reidnb.datasets.specs import session_seconds
from reidnb.data.video import tracklets

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
JPEGS = toy_crops(n_ids=6, n_cams=2, n_each=1, height=16).images
PARTS = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
rows = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(0, 99999)), min_size=1, max_size=30)


@quick
@given(rows)
def test_clock_equals_a_literal_one(r):
    cams, sessions, frames = np.array(r).T
    last = {}
    for c, s, f in r: last[c, s] = max(last.get((c, s), 0), f)
    slow = [(sum(last.get((c, k), 0) for k in range(1, s))+f)/25 for c, s, f in r]
    assert session_seconds(cams, sessions, frames).tolist() == slow


@st.composite
def names(draw):
    "File names of the three parts: people, distractors and junk"
    out = {}
    for part, pids in (('train', (1, 2)), ('query', (3, 4)), ('gallery', (3, 4, 0, -1))):
        n = draw(st.integers(1, 6))
        out[part] = sorted({f"{p:04d}_c{c}s{s}_{f:06d}_{k:02d}.jpg" if p >= 0 else f"-1_c{c}s{s}_{f:06d}_{k:02d}.jpg"
            for k in range(n) for p, c, s, f in [draw(st.tuples(st.sampled_from(pids), st.integers(1, 6),
                                                 st.integers(1, 3), st.integers(0, 99999)))]})
    return out


def write(root, names):
    "Write a tree in Market's layout"
    for part, files in names.items():
        (root/PARTS[part]).mkdir(parents=True)
        for i, f in enumerate(files): (root/PARTS[part]/f).write_bytes(JPEGS[i])
    return root


def expected(names):
    "What must come out, the slow way: part -> sorted (pid, cam, seconds, file)"
    parse = lambda f: [int(x) for x in re.match(r'(-?\d+)_c(\d)s(\d)_(\d+)', f).groups()]
    last = {}
    for p, c, s, f in (parse(f) for files in names.values() for f in files):
        last[c, s] = max(last.get((c, s), 0), f)
    return {part: [(p, c-1, (sum(last.get((c, k), 0) for k in range(1, s))+f)/25, file)
                   for file in files for p, c, s, f in [parse(file)] if p != -1]
            for part, files in names.items()}


@quick
@given(names(), st.sampled_from(['.', 'market', 'market1501/Market-1501-v15.09.15', 'Market-1501']),
       st.booleans())
def test_any_tree_is_read_right(files, place, zipped):
    with tempfile.TemporaryDirectory() as tmp:
        root = write(Path(tmp)/place/'' if place == '.' else Path(tmp)/place, files)
        if zipped:
            with zipfile.ZipFile(Path(tmp)/'Market-1501-v15.09.15.zip', 'w') as z:
                for f in sorted(root.rglob('*.jpg')): z.write(f, f"Market/{f.relative_to(root)}"); f.unlink()
            for sub in PARTS.values(): (root/sub).rmdir()
        data = load('market1501', tmp)
        for part, want in expected(files).items():
            c = data.subsets[part]
            got = [(int(c.pids[i]), int(c.cams[i]), float(c.times[i]), c.file_name(i)) for i in range(len(c))]
            assert got == want
        junk = sum(f.startswith('-1') for f in files['gallery'])
        assert data.dropped == ({'junk': junk} if junk else {})
        assert any('WARNING' in n for n in data.notes)


@quick
@given(names(), st.sampled_from(['rename', 'no part', 'empty part', 'zero', 'camera 0']), st.data())
def test_damage_is_named(files, how, data):
    part = data.draw(st.sampled_from(list(PARTS)))
    with tempfile.TemporaryDirectory() as tmp:
        root = write(Path(tmp)/'market', files)
        folder = root/PARTS[part]
        one = folder/data.draw(st.sampled_from(files[part]))
        if how == 'zero':
            one.write_bytes(b'')
            if one.name.startswith('-1'): return
            found = [f for f in load('market', tmp).validate() if 'zero' in f.what]
            assert len(found) == 1 and one.name in found[0].what and found[0].where == part
            return
        if how == 'rename': one.rename(folder/'holiday.jpg')
        elif how == 'camera 0': one.rename(folder/'0001_c0s1_000001_00.jpg')
        else:
            for f in folder.iterdir(): f.unlink()
            if how == 'no part': folder.rmdir()
        with pytest.raises((ValueError, FileNotFoundError)) as e: load('market', tmp)
        assert PARTS[part] in str(e.value)
        if how == 'rename': assert 'holiday.jpg' in str(e.value)
        if how == 'camera 0': assert '0001_c0s1_000001_00.jpg' in str(e.value)


def test_damaged_zip_is_named(tmp_path):
    root = write(tmp_path/'tree', {k: ['0001_c1s1_000001_00.jpg'] for k in PARTS})
    path = tmp_path/'market1501.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for f in sorted(root.rglob('*.jpg')): z.write(f, f.relative_to(root))
    whole = path.read_bytes()
    assert len(load('market', path).query) == 1
    path.write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='market1501.zip'): load('market', path)
    at = whole.index(JPEGS[0])+50
    path.write_bytes(whole[:at]+bytes([whole[at] ^ 255])+whole[at+1:])
    with pytest.raises(ValueError, match='0001_c1s1_000001_00.jpg in .*market1501.zip is damaged'): load('market', path)


def test_environment_and_default_place(tmp_path, monkeypatch):
    files = {k: ['0001_c1s1_000001_00.jpg'] for k in PARTS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('REIDNB_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='data is not there.*project_reid'): load('market')
    write(tmp_path/'data'/'market', files)
    assert len(load('market').train) == 1
    files['train'].append('0002_c1s1_000001_00.jpg')
    write(tmp_path/'elsewhere'/'Market1501', files)
    monkeypatch.setenv('REIDNB_DATA', str(tmp_path/'elsewhere'))
    assert len(load('market').train) == 2


def test_strict_refuses_other_counts(tmp_path):
    write(tmp_path/'market', {k: ['0001_c1s1_000001_00.jpg'] for k in PARTS})
    with pytest.raises(ValueError, match='12,936 images, 751 people'): load('market', tmp_path, strict=True)
    assert load('market-style', tmp_path/'market', strict=True).name == DATASETS['market-style'].title


def test_style_without_clock(tmp_path):
    write(tmp_path, {k: ['0001_c12_000001.jpg'] for k in PARTS})
    data = load('market-style', tmp_path)
    assert not data.train.has_times and data.train.cams.tolist() == [11]
    with pytest.raises(ValueError, match='do not match'): load('market1501', tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match='did you mean market1501'): load('market15o1')
    for spec in DATASETS.values():
        for name in (spec.name, *spec.aliases): assert find_spec(name.upper()) is spec


def test_data_page_is_written_from_the_table():
    page = Path(__file__).parent.parent/'data'/'README.md'
    assert page.read_text() == datasets_readme(), \
        'write it again: python -c "from reidnb.datasets.catalogue import *; print(datasets_readme(), end=\'\')" > data/README.md'


# ------------------------------------------------------------------ every dataset

def plant(root, files):
    for name, data in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data)
    return root


def read(name, root, split=None):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load(name, root, split=split)


def images(tree): return sorted(f for f in tree.files if f.lower().endswith(('.jpg', '.jpeg', '.png', '.bmp')))


def facts(data):
    "Part -> rows (person, camera, file)"
    return {k: sorted((int(p), int(c), v.file_name(i)) for i, (p, c) in enumerate(zip(v.pids, v.cams)))
            for k, v in data.subsets.items() if v is not None}


def wanted(tree, files): return {k: sorted((p, c, f) for p, c, _, f, *_ in v) for k, v in tree.truth(files).items()}


every = pytest.mark.parametrize('name', sorted(MAKERS))


@every
def test_whole(name, tmp_path):
    "People, cameras from 0, files of every part; the difference to the published counts is said"
    for seed in range(4):
        split = 2*seed if name in SPLITS else None
        tree = make(name, seed, split)
        data = read(name, plant(tmp_path/str(seed)/FOLDERS[name][0], tree.files).parent, split)
        assert facts(data) == wanted(tree, tree.files)
        assert any('WARNING' in n for n in data.notes) or not (DATASETS[name].counts or DATASETS[name].tracklets)
        assert data.licence == DATASETS[name].licence


@every
def test_one_missing(name, tmp_path):
    "A missing image is counted, or the message names the place; the rest is right"
    tree = make(name, 5)
    for gone in images(tree)[::3]:
        files = {k: v for k, v in tree.files.items() if k != gone}
        root = plant(tmp_path/gone.replace('/', '_'), files)
        try: want = wanted(tree, files)
        except Broken:
            with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(root))): read(name, root)
            continue
        data = read(name, root)
        assert facts(data) == want
        listed = name in ('msmt17-v1', 'msmt17-v2', 'unrealperson', 'mars')
        if listed: assert data.dropped['listed but missing'] == 1 and any(gone.rpartition('/')[2] in n for n in data.notes)


@every
def test_one_corrupt(name, tmp_path):
    "A file that is no image is read as a name, and found by validate and when it is opened"
    tree = make(name, 6)
    for bad in images(tree)[:3]:
        root = plant(tmp_path/bad.replace('/', '_'), tree.files | {bad: b'this is no image'})
        data, file = read(name, root), bad.rpartition('/')[2]
        assert facts(data) == wanted(tree, tree.files)
        at = [(k, i) for k, v in data.subsets.items() if v is not None for i, x in enumerate(v.images) if x == str(root/bad)]
        for k, i in at:
            with pytest.raises(ValueError, match=re.escape(file)): data.subsets[k].image(i)
        assert not at or any(file in f.what for f in data.validate(read_images=True))


@every
def test_one_misnamed(name, tmp_path):
    "A foreign name stops the loading and is named; where lists rule, it is left out, and what it was is missing"
    tree = make(name, 7)
    for old in images(tree)[:4]:
        new = '/'.join((*old.split('/')[:-1], 'holiday.jpg'))
        files = {k: v for k, v in tree.files.items() if k != old} | {new: PIXELS[0]}
        root = plant(tmp_path/old.replace('/', '_'), files)
        try: data = read(name, root)
        except (ValueError, FileNotFoundError) as e: assert str(root) in str(e) and ('holiday' in str(e) or 'lists' in str(e)); continue
        assert 'holiday.jpg' in ' '.join(data.notes) or name in ('unrealperson', 'ls-vid')
        assert facts(data) == wanted(tree, files)


@pytest.mark.parametrize('name', sorted(SPLITS))
def test_splits(name, tmp_path):
    "All splits are read, people of train and test differ, and a split that is not there is refused"
    tree = make(name, 8)
    root, seen = plant(tmp_path/'x', tree.files), set()
    for split in range(SPLITS[name]):
        data = read(name, root, split)
        train, query = (set(c.pids[c.pids > 0].tolist()) for c in (data.train, data.query))
        assert not train & query and f'split {split}' in data.name
        seen.add(tuple(sorted(train)))
    assert len(seen) > 1
    for split in (-1, SPLITS[name]):
        with pytest.raises(ValueError, match=f'splits 0 to {SPLITS[name]-1}'): load(name, root, split=split)


@pytest.mark.parametrize('name', ['mars', 'dukemtmc-videoreid', 'ilids-vid', 'prid2011-video', 'ls-vid'])
def test_walks(name, tmp_path):
    "`tracklets` gives the walks of the truth, in order"
    for seed in range(4):
        tree = make(name, seed)
        data = read(name, plant(tmp_path/str(seed), tree.files))
        for part, rows in tree.truth(tree.files).items():
            table = data.subsets[part]
            walks = tracklets(table)
            got = [[table.file_name(i) for i in walks[k]] for k in range(len(walks))]
            want = {}
            for p, c, t, f, k, w in sorted(rows, key=lambda x: x[4]): want.setdefault(w, []).append(f)
            assert sorted(got) == sorted(want.values())


def test_versions_of_msmt17_are_told_apart(tmp_path):
    for k in (1, 2): plant(tmp_path/str(k)/'msmt17'/f'MSMT17_V{k}', make(f'msmt17-v{k}').files)
    assert [load('msmt17', tmp_path/str(k)).name for k in (1, 2)] == ['MSMT17 V1', 'MSMT17 V2']
    for k in (1, 2): plant(tmp_path/'both'/'msmt17'/f'MSMT17_V{k}', make(f'msmt17-v{k}').files)
    with pytest.raises(ValueError, match='choose msmt17-v1 or msmt17-v2'): load('msmt17', tmp_path/'both')
    assert load('MSMT17_V2', tmp_path/'both').name == 'MSMT17 V2'
    plant(tmp_path/'copy'/'msmt17', make('msmt17-market').files)
    assert load('msmt17', tmp_path/'copy').name == "MSMT17 in Market's layout"
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='mask_train_v2'): load('msmt17', tmp_path/'empty')


def test_files_of_version_7_3(tmp_path):
    "Cells, pictures, texts and empty cells of HDF5 come back as those of version 5"
    pytest.importorskip('h5py')
    from dataset_trees import cell, hdf5, mat
    from reidnb.datasets.specs import FolderTree, read_mat
    inner = cell([np.zeros((0, 0)), np.arange(24, dtype=np.uint8).reshape(4, 2, 3)], (1, 2))
    v = {'cells': cell([inner, inner]), 'names': cell(['1_001_1_01.png', 'b.png']), 'table': np.arange(6.).reshape(2, 3)}
    plant(tmp_path, {'new.mat': hdf5(v), 'old.mat': mat(**v)})
    new, old = (read_mat(FolderTree(tmp_path), f, *v) for f in ('new.mat', 'old.mat'))
    assert (new['table'] == old['table']).all() and new['cells'].shape == old['cells'].shape == (2, 1)
    for x in (new, old):
        assert [str(np.ravel(n)[0]) if np.size(n) else '' for n in x['names'].ravel()] == ['1_001_1_01.png', 'b.png']
        assert x['cells'][1, 0][0, 0].size == 0
        assert (x['cells'][1, 0][0, 1] == inner[0, 1]).all()
    whole = (tmp_path/'new.mat').read_bytes()
    plant(tmp_path, {'half.mat': whole[:len(whole)//2]})
    with pytest.raises(ValueError, match='half.mat'): read_mat(FolderTree(tmp_path), 'half.mat', 'table')


def test_hdf5_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    import sys
    from reidnb.datasets.specs import FolderTree, read_mat
    plant(tmp_path, {'new.mat': b'\x89HDF\r\n\x1a\n'+bytes(600)})
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(ImportError, match='new.mat is an HDF5 file: install h5py'): read_mat(FolderTree(tmp_path), 'new.mat', 'x')


def test_withdrawn_data_warn(tmp_path):
    for name in ('dukemtmc-reid', 'dukemtmc-videoreid'):
        root = plant(tmp_path/name, make(name).files)
        with pytest.warns(UserWarning, match='withdrawn'): assert 'withdrawn' in load(name, root).notes[0]


def test_table_is_complete():
    "Every entry says terms, consent, citation, source, clock and protocol; what is not verified is named"
    for s in DATASETS.values():
        assert all((s.licence, s.consent, s.citation, s.source, s.about, s.clock_text, s.protocol)), s.name
        assert set(s.counts) <= set(s.parts) and len(find_family(s.name)) == 1
        assert f"`{s.name}`" in datasets_table() and s.title in datasets_readme()
        if not s.counts and s.name != 'market-style': assert s.doubts, s.name
    assert set(MAKERS) == set(DATASETS)
