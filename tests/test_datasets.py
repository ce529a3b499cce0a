"""Property and fault tests of reidnb.datasets on small trees in Market's layout."""
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reidnb.crops import toy_crops
from reidnb.datasets import DATASETS, datasets_readme, find_spec, load, session_seconds

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
    with pytest.raises(ValueError, match='12,936 of 751'): load('market', tmp_path, strict=True)
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
        'write it again: python -c "from reidnb.datasets import *; print(datasets_readme(), end=\'\')" > data/README.md'
