"The report: whatever is given or missing, one page that is whole, loads nothing, and shows no markup from outside."
import os
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from reidnb.data.checks import Finding
from reidnb.data.crops import Crops, ReIDData
from reidnb.data.toys import toy_crops
from reidnb.ranking.evaluation import cosine_distance, evaluate
from reidnb.practice.report import _SECTIONS, _templates, write_report
from reidnb.training.scoring import Ranking

VOID = {'meta', 'img', 'br'}
WORDS = {s['key']: s for s in _templates().get_template('report_parts.html.j2').module.sections}
MISSING = {k: s['missing'] for k, s in WORDS.items() if 'missing' in s}


class Reader(HTMLParser):
    "Checks nesting while it reads, and keeps tags, ids, addresses, alternative texts, and text"
    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.ids, self.loads, self.alts, self.text = [], [], [], [], [], []
        self.feed(text); self.close()
        assert self.stack == [], f'never closed: {self.stack}'
        assert len(self.ids) == len(set(self.ids)), 'an id stands twice'
        for x in self.loads: assert x.startswith(('data:', '#')), f'the page would load {x[:80]}'
        assert all(self.alts), 'a picture has no alternative text'
        for url in re.findall(r'url\(([^)]*)\)', text): assert url.strip('"\'').startswith('#'), url
        assert '@import' not in text
        known = set(self.ids)
        assert {x[1:] for x in self.loads if x.startswith('#')} <= known, 'an address points nowhere'

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.append(tag)
        self.ids += [a['id']] if 'id' in a else []
        self.loads += [a[k] for k in ('src', 'href', 'xlink:href', 'srcset', 'poster', 'data', 'action') if k in a]
        if tag == 'img': self.alts.append(a.get('alt'))
        assert not [k for k in a if k.startswith('on')], f'{tag} has a handler: {a}'
        if tag not in VOID: self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID: self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f'</{tag}> closes {self.stack[-1:]}'
        self.stack.pop()

    def handle_data(self, data): self.text.append(data)


def read(path):
    text = path.read_text()
    page = Reader(text)
    assert not {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form'} & set(page.tags)
    assert set(_SECTIONS) <= set(page.ids)
    assert path.stat().st_size < 3_000_000
    return text, ' '.join(' '.join(page.text).split())


def features(crops, signal=1., seed=0, dim=16):
    rng = np.random.default_rng(seed)
    people = rng.normal(size=(int(max(crops.pids.max(), 0))+1, dim))
    f = signal*people[np.maximum(crops.pids, 0)]*(crops.pids > 0)[:, None] + rng.normal(size=(len(crops), dim))
    return f.astype(np.float32)


def outcome(data, signal=1., **more):
    q, g = features(data.query, signal), features(data.gallery, signal, 0)
    dist, known = cosine_distance(q, g), data.query.labelled and data.gallery.labelled
    m = evaluate(dist, data.query.pids, data.gallery.pids, data.query.cams, data.gallery.cams,
                 cross_camera=data.cross_camera) if known else None
    return Ranking({'none': m} if m else {}, features=(q, g), distances={'none': dist}, **more)


def toy(n_ids=8, n_cams=3, **kwargs):
    crops = toy_crops(n_ids=n_ids, n_cams=n_cams, n_each=2)
    odd = np.arange(len(crops)) % 2 == 1
    return ReIDData(query=crops[~odd], gallery=crops[odd], name='toy', licence='drawn', **kwargs)


LOG = [dict(epoch=e, step=4*e+i, loss=3-.1*e, lr=1e-3) for e in range(3) for i in range(4)]
LOG += [dict(epoch=2, images=99, seconds=4.2), dict(epoch=2, mAP=.5, R1=.6)]
CARD = dict(name='baseline', seed=3, settings=dict(lr=1e-3, steps=[1, 2]), seconds=dict(train=70., test=2.),
            hardware='a machine', versions=dict(torch='9'), metrics=dict(after=dict(mAP=.4)))


def test_everything(tmp_path):
    data = toy()
    both = {'untrained': outcome(data, .3), 'trained': outcome(data, 2., log=LOG, card=CARD)}
    text, words = read(write_report(tmp_path/'new'/'report.html', data, both, intro='An introduction.'))
    m = both['trained'].scores
    for x in (f'{100*m.mAP:.1f}', f'{100*m.R1:.1f}', f'{100*m.mINP:.1f}', str(m.protocol), 'An introduction.',
              '70.0 s', 'a machine', 'settings.lr', 'toy', 'drawn', 'untrained'):
        assert x in words, x
    assert 'class="why"' not in text
    assert text.count('class="crop ask"') == 6 and 'class="crop yes"' in text and 'class="crop no"' in text
    assert text.count('✓') == text.count('class="crop yes"') and text.count('✗') == text.count('class="crop no"')
    assert text.count('<svg') == 3+1+2+2
    assert 'prefers-color-scheme' in text and 'width=device-width' in text


def test_what_is_missing_says_why(tmp_path):
    data = toy()
    _, words = read(write_report(tmp_path/'r.html', data, Ranking()))
    for key in ('numbers', 'training', 'ranked', 'curves', 'distances', 'plane', 'timing'):
        assert MISSING[key] in words
    _, words = read(write_report(tmp_path/'r.html', ReIDData(train=data.gallery, name='only train'),
                                 Ranking(log=LOG, card=CARD)))
    assert 'loss' in words and MISSING['ranked'] in words
    read(write_report(tmp_path/'r.html', ReIDData(), Ranking()))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.booleans(), cams=st.booleans(), times=st.booleans(), n_ids=st.integers(2, 6), n_cams=st.integers(1, 3),
       models=st.integers(1, 3), pictures=st.booleans(), junk=st.booleans())
def test_any_data(tmp_path, labels, cams, times, n_ids, n_cams, models, pictures, junk):
    data = toy(n_ids, n_cams)
    change = {} if labels else dict(pids=None)
    if not cams: change['cams'] = None
    if not times: change['times'] = None
    q, g = data.query.replace(**change), data.gallery.replace(**change)
    if junk and labels: g = g.replace(pids=np.where(np.arange(len(g)) == 1, -1, np.where(np.arange(len(g)) == 3, 0, g.pids)))
    data = ReIDData(query=q, gallery=g, name='any', cross_camera=cams and n_cams > 1)
    try: found = {f'm{i}': outcome(data, i) for i in range(models)}
    except ValueError as e:
        assert 'no query has a match' in str(e)                 # a fair answer of `evaluate`
        return
    text, words = read(write_report(tmp_path/'r.html', data, found, pictures=pictures))
    assert ('data:image/jpeg' in text) == pictures
    assert ('unknown' in words) >= (not cams)
    if not labels: assert MISSING['numbers'] in words


BAD = ['{{ 7*7 }}{% raw %}', '<b>', '<script>alert(1)</script>', '--><script>', ']]><script>', '"><img src=x onerror=alert(1)>', "' onload='x", '$\\frac{', '_hidden', '&amp;', 'ü 人 \u202e',
       '</style><b>', '{x}', '\\', '%s', 'a\nb']


@pytest.mark.parametrize('bad', BAD)
def test_hostile_text_stays_text(tmp_path, bad):
    "In every place where a text of the user lands it is shown letter by letter, and none is markup"
    data, places = toy(), []
    def at(place):
        places.append(f'{bad}{place}')
        return places[-1]
    n = len(data.gallery)
    data.gallery = data.gallery.replace(extra={'file': np.array([bad]*n), 'raw_cam': np.array([at('camera')]*n)}, notes=[at('note')])
    data.query = data.query.replace(extra={'file': np.array([at('file')]*len(data.query))})
    data.name, data.licence, data.notes, data.dropped = at('name'), at('licence'), [at('data note')], {at('dropped'): 3}
    card = dict(CARD, settings={at('key'): at('value')}, hardware=at('hardware'))
    log = [r | {bad: 1.} if 'loss' in r else r for r in LOG]
    found = {at('first'): outcome(data, .3, log=log, card=card), bad: outcome(data, .3), at('last'): outcome(data, 2., log=log, card=card)}
    finding = Finding(at('level'), at('what'), at('where'), at('fix'))
    text, words = read(write_report(tmp_path/'r.html', data, found, intro=at('intro'), seconds={at('stage'): 2.}, findings=[finding]))
    for x in ('<script', '<img src=x', '</style><b>', '<b>name'):
        if bad.startswith(x): assert x not in text
    for x in places: assert ' '.join(x.split()) in words, x
    _, words = read(write_report(tmp_path/'r.html', data, found, title=at('title')))
    assert ' '.join(places[-1].split()) in words
    if '$' not in bad: assert words.count(' '.join(bad.split())) > 20


def test_an_unknown_name_in_a_template_is_an_error():
    from jinja2 import UndefinedError
    parts = _templates().get_template('report_parts.html.j2').module
    for key in _SECTIONS:
        with pytest.raises((UndefinedError, TypeError)): getattr(parts, key)({} if key not in ('curves', 'distances', 'plane') else [{}])
    assert _templates().autoescape and set(WORDS) == set(_SECTIONS)


def test_a_wheel_carries_the_templates(tmp_path):
    "Built without network from a copy; what lies in the package's folder is what the loader reads"
    root = Path(__file__).parent.parent
    mine = {p.name for p in files('reidnb').joinpath('templates').iterdir()}
    assert {'report.html.j2', 'report_parts.html.j2', 'report.css.j2'} <= mine
    for f in ('setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'pyproject.toml', 'LICENSE'): (tmp_path/f).write_bytes((root/f).read_bytes())
    for p in (root/'reidnb').rglob('*'):
        if p.suffix in ('.py', '.j2'):
            to = tmp_path/p.relative_to(root); to.parent.mkdir(parents=True, exist_ok=True); to.write_bytes(p.read_bytes())
    code = 'from setuptools.build_meta import build_wheel; build_wheel("wheels")'
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    names = zipfile.ZipFile(next((tmp_path/'wheels').glob('*.whl'))).namelist()
    assert {f'reidnb/templates/{n}' for n in mine} <= set(names)


def test_pictures_false_shows_no_crop(tmp_path):
    data = toy()
    text, words = read(write_report(tmp_path/'r.html', data, outcome(data), pictures=False))
    assert '<img' not in text and 'image/jpeg' not in text
    assert 'written without pictures' in words and MISSING['ranked'] in words


def test_big_noisy_crops_stay_below_the_limit(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 200, 200, 3), dtype=np.uint8)
    crops = Crops(pixels, np.arange(400)//20+1, np.arange(400) % 20, name='noise')
    data = ReIDData(query=crops[::4], gallery=crops, name='noise')
    text, words = read(write_report(tmp_path/'r.html', data, {'a': outcome(data, .5), 'b': outcome(data, 1.)}, k=12))
    assert '8 more cameras are not shown' in words
    assert len(text) < 3_000_000


def test_unreadable_crops_are_shown_as_such(tmp_path):
    data = toy()
    data.gallery = data.gallery.replace(images=[b'broken']+list(data.gallery.images[1:]))
    text, words = read(write_report(tmp_path/'r.html', data, outcome(data)))
    assert '(unreadable)' in text


def test_features_all_the_same(tmp_path):
    data = toy()
    o = outcome(data)
    same = np.ones_like(o.gallery_features)
    zero = np.zeros_like(o.dist)
    m = evaluate(zero, data.query.pids, data.gallery.pids, data.query.cams, data.gallery.cams)
    o = Ranking({'none': m}, features=(np.ones_like(o.query_features), same), distances={'none': zero})
    read(write_report(tmp_path/'r.html', data, o))


def test_other_data_are_refused(tmp_path):
    data, other = toy(), toy(n_ids=3)
    for o in (outcome(other), Ranking(outcome(other).metrics), Ranking(features=(None, np.ones((3, 2))))):
        with pytest.raises(ValueError, match='belongs to other data'): write_report(tmp_path/'r.html', data, {'x': o})
    assert not list(tmp_path.iterdir())


def test_different_protocols_are_noticed(tmp_path):
    data = toy()
    a, b = outcome(data), outcome(data)
    a.metrics['none'] = evaluate(a.dist, data.query.pids, data.gallery.pids, data.query.cams, data.gallery.cams, ap='trapezoid')
    _, words = read(write_report(tmp_path/'r.html', data, {'a': a, 'b': b}))
    assert 'scored under different protocols' in words


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    data = toy()
    path = write_report(tmp_path/'r.html', data, Ranking())
    old = path.read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='old file is unchanged'): write_report(path, data, outcome(data))
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_same_report_twice(tmp_path):
    data = toy()
    found = {'a': outcome(data, .3), 'b': outcome(data, 1., log=LOG, card=CARD)}
    a, b = (write_report(tmp_path/f'{i}.html', data, found).read_bytes() for i in range(2))
    assert a == b
