"The site: what is read from the notebooks, the build, and every page in a browser (the last two with --slow)."
import functools
import http.server
import json
import re
import shutil
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import docs       # noqa: E402
import docs_api   # noqa: E402


# --- names and comments of a module ------------------------------------------------------------------------
MODULE = '''
__all__ = ['SIZE', 'distance', 'Table']
import torch
SIZE = 3 # Rows of a page
_hidden = 4
def distance(
    a, # Features, `(N,D)`
    b:torch.Tensor=None, # Others; `None`: `a | b`
    *,
    floor:float=1e-12, # Least norm
    **kw, # Passed on
)->torch.Tensor: # Distances in `[0,2]`, `(N,M)`
    """One minus cosine (eq. 1)"""
    return a # not a docment
def helper(x): return x # of nobody
@dataclass
class Table:
    "Rows *and* columns"
    rows:int # How many
    names:list=field(default_factory=list) # One a row

    n = property(lambda s: 1, doc="Number of pages")
    @property
    def wide(self)->bool: # Wider than high
        "Whether it is wide"
        return True
    @classmethod
    def read(cls,
        path, # File
    ): # The table
        "Read a table"
    def _private(self): pass
@patch
def save(self:Table,
    path, # Where
)->None:
    "Write it"
'''


@pytest.fixture
def entries(tmp_path):
    (tmp_path / 'm.py').write_text(MODULE)
    return {e.name: e for e in docs_api.entries(tmp_path / 'm.py')}


def test_functions_with_their_docments(entries):
    assert list(entries) == ['SIZE', 'distance', 'Table'] and entries['SIZE'].doc == 'Rows of a page' and entries['SIZE'].value == '3'
    e = entries['distance']
    assert docs_api.signature(e) == 'distance(a, b=None, *, floor=1e-12, **kw)' and e.line == 6
    assert [(p.name, p.type, p.default, p.doc) for p in e.params if p.name != '*'] == [
        ('a', '', '', 'Features, `(N,D)`'), ('b', 'torch.Tensor', 'None', 'Others; `None`: `a | b`'),
        ('floor', 'float', '1e-12', 'Least norm'), ('**kw', '', '', 'Passed on')]
    assert (e.returns.type, e.returns.doc) == ('torch.Tensor', 'Distances in `[0,2]`, `(N,M)`')


def test_classes_with_fields_methods_and_patches(entries):
    e = entries['Table']
    assert docs_api.signature(e) == 'Table(rows, names=list())' and e.params[1].doc == 'One a row'
    members = {m.name: m for m in e.members}
    assert list(members) == ['Table.n', 'Table.wide', 'Table.read', 'Table.save']
    assert [m.kind for m in e.members] == ['property', 'property', 'method', 'method']
    assert members['Table.n'].doc == 'Number of pages' and members['Table.read'].flags == ['classmethod']
    assert members['Table.read'].returns.doc == 'The table' and members['Table.save'].params[0].doc == 'Where'
    assert members['Table.save'].returns is None


def test_comments_become_markdown_as_they_stand():
    assert docs_api.plain('P*K of <them> in `a*b<c`, $5 | [x]') == 'P\\*K of \\<them> in `a*b<c`, \\$5 \\| \\[x]'
    assert docs_api.plain('an odd ` tick') == 'an odd \\` tick'


def test_every_public_name_has_its_docments():
    "What the house rules ask of notebooks arrives in the API: a comment at each parameter of each exported function"
    site, bare = docs.Site(), []
    assert len(site.api) > 30
    for module, found in site.api.items():
        for e in found:
            if e.kind == 'data': continue
            if not e.doc: bare.append(f'{module}.{e.name}')
            bare += [f'{module}.{e.name}({p.name})' for p in e.params if p.name != '*' and not p.doc]
    assert not bare


# --- notebooks ---------------------------------------------------------------------------------------------
def cell(text, kind='code', **kw): return dict(cell_type=kind, id=f'c{abs(hash(text))}', metadata={}, source=text, **({'outputs': []} if kind == 'code' else {}), **kw)
def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[c if isinstance(c, dict) else cell(c, 'markdown') for c in cells], metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def book(tmp_path):
    "A project of three notebooks, one of them in a folder nobody has heard of"
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    write(tmp_path / 'nbs' / 'index.ipynb', '# Toy\n\n> A toy.\n\n[a](data/10_a.ipynb#The-first) [licence](LICENSE)')
    write(tmp_path / 'nbs' / 'data' / '10_a.ipynb', '# A\n\n> Do a.', cell('#| default_exp a'), cell('#| hide\nimport secret'),
          '## The first\n\n`[not](a.link)` and [b](../zoo/20_b.ipynb), [self](#the-first)', cell('#| exports\ndef f():\n    "F"'),
          cell('#| export\n#| eval: false\nx = 1'),
          cell('#| export\nimport os\nfrom a import (\n    b, c)'), cell('import torch  # only this'), cell('import re\nre.escape("a")'), cell('assert f() is None'), '## Export -', cell('#| hide\nimport nbdev; nbdev.nbdev_export()'))
    write(tmp_path / 'nbs' / 'zoo' / '20_b.ipynb', '# B', '## Same', '## Same')
    (tmp_path / 'LICENSE').write_text('')
    (tmp_path / 'reidnb').mkdir()
    (tmp_path / 'reidnb' / 'a.py').write_text('__all__ = ["f"]\ndef f():\n    "F"\nx = 1\n')
    return tmp_path


def test_a_notebook_becomes_a_page(book):
    site = docs.Site(book)
    page = next(p for p in site.pages if p.name == 'data/a')
    assert (page.title, page.subtitle, page.module, page.sections['f']) == ('A', 'Do a.', 'reidnb.a', 'the-first')
    cells = site.notebook(page)['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    assert [c['source'].splitlines()[0] for c in code] == ['def f():', 'x = 1', 'import os', 'import torch  # only this', 'import re', 'assert f() is None']
    assert [c['metadata']['tags'] for c in code] == [['defines'], ['hide-input', 'defines', 'shown'], ['hide-input', 'defines'], ['hide-input'], [], ['tests']]
    assert [c['metadata']['mystnb'].get('code_prompt_show') for c in code] == [None, 'x', 'imports', 'imports', None, None]
    text = '\n'.join(c['source'] for c in cells if c['cell_type'] == 'markdown')
    assert '`[not](a.link)`' in text and '[b](/zoo/b.ipynb)' in text and '[self](/data/a.ipynb#the-first)' in text
    assert 'Export' not in text and 'secret' not in str(cells) and 'py:function} f()' in text
    assert not site.broken


def test_imports_are_folded_in_the_whole_book():
    "A cell of imports and nothing else stands behind one line, also where it is exported"
    site, n = docs.Site(), 0
    for p in site.pages:
        for c in site.notebook(p)['cells']:
            if c['cell_type'] != 'code' or not docs.only_imports(c['source']): continue
            n += 1
            assert 'hide-input' in c['metadata']['tags'] and c['metadata']['mystnb']['code_prompt_show'] == 'imports', (p.name, c['source'])
    assert n > 30


def test_what_stands_open_is_not_said_twice(book):
    "The parameters of a function whose code the page shows are folded in its API"
    e = docs_api.Entry('f', 'function', 1, 'F', params=[docs_api.Param('a', 'int', '', 'A'), docs_api.Param('b', 'int', '', 'B')])
    assert '<details' not in docs_api.markdown(e, 'm', 'url') and '2 parameters' in docs_api.markdown(e, 'm', 'url', shown={'f'})
    assert docs.opened('class A:\n    def g(self): pass\n@patch\ndef h(self:A): pass\ndef f(): pass') == ['A', 'A.g', 'A.h', 'f']
    assert next(p for p in docs.Site(book).pages if p.name == 'data/a').shown == {'f'}


def test_pictures_have_captions_and_places(book):
    picture = cell('#| echo: false\n#| layout: half\n#| fig-cap: Two people\nshow()')
    write(book / 'nbs' / 'data' / '12_d.ipynb', '# D', picture)
    site = docs.Site(book)
    meta = site.notebook(next(p for p in site.pages if p.name == 'data/d'))['cells'][1]['metadata']
    assert meta['tags'] == ['remove-input', 'half'] and meta['mystnb'] == {'figure': {'caption': 'Two people'}, 'image': {'alt': 'Two people'}}


def test_what_is_printed_stays_between_the_pictures():
    printed, picture = dict(output_type='stream', name='stdout', text=['a\n']), dict(output_type='display_data', data={}, metadata={})
    assert [o.get('text') for o in docs.merged([printed, printed, picture, printed])] == ['a\na\n', None, 'a\n'] and printed['text'] == ['a\n']


def test_wings_come_in_the_order_of_the_book(book):
    "Folders as WINGS says, then all others by name; an empty one is skipped; modules of wings have their API and short names"
    for folder in ('training', 'core', 'apes', 'world'): write(book / 'nbs' / folder / '10_p.ipynb', f'# {folder}', cell(f'#| default_exp {folder}.p'))
    (book / 'nbs' / 'losses').mkdir()
    for folder in ('core', 'world'):
        (book / 'reidnb' / folder).mkdir()
        (book / 'reidnb' / folder / 'p.py').write_text(f'__all__ = ["{folder}_it", "both"]\ndef {folder}_it(): "It"\ndef both(): "Both"\n')
    site = docs.Site(book)
    assert site.parts() == ['data', 'world', 'training', 'core', 'apes', 'zoo']
    names = site.names()
    assert names['reidnb.world'] == ['doc', 'world/index'] and names['reidnb.world.p'] == ['doc', 'world/p']
    for name in ('world_it', 'world.world_it', 'reidnb.world.world_it', 'reidnb.world.p.world_it'): assert names[name] == ['obj', 'reidnb.world.p.world_it']
    assert names['core.both'] == ['obj', 'reidnb.core.p.both'] and 'both' not in names
    assert '### `reidnb.core.p`' in site.api_page() and '`reidnb.world.p.world_it`' in site.part_page('world')


def test_new_folders_and_pages_need_no_list(book):
    site = docs.Site(book)
    assert site.parts() == ['data', 'zoo'] and 'zoo/index' in site.contents() and '# Zoo' in site.part_page('zoo')
    site.write(book / 'out')
    assert (book / 'out' / 'zoo' / 'b.ipynb').exists() and (book / 'out' / 'zoo' / 'index.md').exists()
    (book / 'nbs' / 'zoo' / '20_b.ipynb').rename(book / 'nbs' / 'zoo' / '30_c.ipynb')
    with pytest.raises(SystemExit, match=r'10_a.ipynb: \(../zoo/20_b.ipynb\) does not exist'): docs.Site(book).write(book / 'out')
    docs.Site(book).write(book / 'out', draft=True)
    assert (book / 'out' / 'zoo' / 'c.ipynb').exists() and not (book / 'out' / 'zoo' / 'b.ipynb').exists()


@pytest.mark.parametrize('link, why', [('10_b.ipynb', 'does not exist'), ('10_a.ipynb#The-second', 'has no heading like this'),
                                       ('#nowhere', 'has no heading'), ('../../../etc', 'does not exist'), ('/etc/hosts', 'leaves the repository')])
def test_broken_links_are_named(book, link, why):
    write(book / 'nbs' / 'data' / '12_d.ipynb', f'# D\n\n[there]({link})')
    with pytest.raises(SystemExit, match=re.escape(f'nbs/data/12_d.ipynb: ({link}) {why}')): docs.Site(book).write(book / 'out')


def test_good_links(book):
    site = docs.Site(book)
    page = next(p for p in site.pages if p.name == 'zoo/b')
    for link, to in {'https://a.b/c': 'https://a.b/c', '../data/10_a.ipynb': '/data/a.ipynb', '../../LICENSE': f'{site.git}/LICENSE',
                     '#same': '/zoo/b.ipynb#same', '../data/10_a.ipynb#the_first': '/data/a.ipynb#the-first'}.items():
        assert site.target(page, link) == to
    assert not site.broken


def test_two_notebooks_of_one_name_are_refused(book):
    write(book / 'nbs' / 'data' / '20_a.ipynb', '# Another a')
    with pytest.raises(SystemExit, match='same page'): docs.Site(book)


def test_no_link_of_the_book_is_broken():
    "Also those with an anchor, and those in the markdown that cells have printed"
    site = docs.Site()
    for p in site.pages: site.notebook(p)
    assert not site.broken, '\n'.join(site.broken)


# --- the build ---------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def built():
    "The site in _docs/, brought up to date"
    for name in ('sphinx', 'myst_nb', 'furo', 'sphinx_copybutton'): pytest.importorskip(name)
    out = ROOT / '_docs'
    with warnings.catch_warnings():      # MyST-Parser calls what Sphinx 11 will drop
        warnings.simplefilter('ignore')
        assert docs.build(out) == 0
    return out


def place(name):
    "`page.html#module.name` of a public name, wherever its notebook stands"
    site = docs.Site()
    return next(f'{p.name}.html#{p.module}.{name}' for p in site.pages for e in site.api.get(p.module, ()) if e.name == name)


@pytest.fixture(scope='module')
def pages(built): return sorted(p.relative_to(built).as_posix() for p in built.rglob('*.html') if '_static' not in p.parts)


@pytest.mark.slow
def test_every_notebook_is_a_page(built, pages):
    site = docs.Site()
    assert {f'{p.name}.html' for p in site.pages} | {'api.html', 'search.html', 'genindex.html'} <= set(pages)
    home = (built / 'index.html').read_text()
    order = [home.index(f'href="{part}/index.html"') for part in site.parts()]
    assert order == sorted(order), 'the side bar is not in the order of the book'


@pytest.mark.slow
def test_nothing_comes_from_outside(built, pages):
    "No page loads a script, a style, a font or a picture from another host"
    for page in pages:
        text = (built / page).read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*?\bsrc="([^"]+)"', text) + [
            m for tag in re.findall(r'<link[^>]+>', text) for m in re.findall(r'href="([^"]+)"', tag) if 'rel="canonical"' not in tag]
        assert not [u for u in loaded if u.startswith(('http:', 'https:', '//'))], page
    for css in built.rglob('*.css'): assert not re.search(r'url\(["\']?(https?:)?//|@import', css.read_text()), css.name


@pytest.mark.slow
def test_every_public_name_has_a_place(built):
    "With the link to its line in the source, and no directive is left in the code"
    site = docs.Site()
    for p in site.pages:
        text = (built / f'{p.name}.html').read_text()
        assert '#| ' not in re.sub(r'<(code|p|li)\b.*?</\1>', '', text, flags=re.S), p.name
        for e in site.api.get(p.module, ()):
            assert f'id="{p.module}.{e.name}"' in text, f'{p.module}.{e.name}'
            assert f'{site.git}/{p.module.replace(".", "/")}.py#L{e.line}"' in text, e.name


# --- the browser -------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def browser(built):
    "Headless Chromium, driven by playwright, and the address of the site"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    path = next((p for n in ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable') if (p := shutil.which(n))), None)
    if path is None: pytest.skip('no Chromium on this machine (apt-get install chromium)')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                                                          '--disable-component-update', '--disable-sync'])
        b.site = f'http://127.0.0.1:{server.server_port}'
        yield b
        b.close()
    server.shutdown()


LOOK = textwrap.dedent('''
    async () => {
      if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
      const walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT), raw = [];
      while (walk.nextNode()) { const n = walk.currentNode;
        if (!n.parentElement.closest('pre, code, script, style') && /\\$\\$|\\\\[([]|\\\\(frac|sum|text|mathrm|lVert)\\b/.test(n.data)) raw.push(n.data.slice(0, 80)); }
      const wide = document.documentElement.scrollWidth, seen = window.innerWidth;
      return {raw, wide, seen, math: document.querySelectorAll('.math').length, set: document.querySelectorAll('.math mjx-container').length,
              errors: document.querySelectorAll('[data-mjx-error], mjx-merror').length,
              images: [...document.images].filter(i => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).map(i => i.src),
              dark: getComputedStyle(document.body).backgroundColor};
    }''')


def visit(browser, pages, width, scheme, together=3):
    "Faults of all pages at one width and colour scheme; some pages load side by side"
    context, faults, maths = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme), [], 0
    def say(name, what): faults.append(f'{name}: {what}')
    def listen(name):
        page = context.new_page()
        page.on('console', lambda m: say(name, f'console: {m.text}') if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: say(name, e))
        page.on('request', lambda r: say(name, f'asks for {r.url}') if not r.url.startswith((browser.site, 'data:', 'blob:')) else None)
        page.on('response', lambda r: say(name, f'{r.status} {r.url}') if r.status >= 400 else None)
        page.goto(f'{browser.site}/{name}', wait_until='commit')
        return page
    for k in range(0, len(pages), together):
        for name, page in [(name, listen(name)) for name in pages[k:k+together]]:
            page.wait_for_load_state('load')
            look = page.evaluate(LOOK)
            maths += look['math']
            for t in look['raw']: say(name, f'raw TeX is shown: {t}')
            for t in look['images']: say(name, f'no picture: {t}')
            if look['set'] != look['math'] or look['errors']: say(name, f"{look['set']} of {look['math']} formulas set, {look['errors']} with errors")
            if look['wide'] > look['seen']: say(name, f"{look['wide']} pixels wide on {look['seen']}")
            shade = sum(map(int, re.findall(r'\d+', look['dark'])[:3]))
            if (shade < 200) != (scheme == 'dark'): say(name, f"background {look['dark']} in {scheme}")
            page.close()
    context.close()
    return faults, maths


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_page_on_a_phone(browser, pages):
    "380 pixels, dark: no console error, all math set, nothing asks another host, no horizontal scroll"
    faults, maths = visit(browser, pages, 380, 'dark')
    assert not faults, '\n'.join(faults)
    assert maths > 100


@pytest.mark.slow
def test_pages_on_a_desk(browser, pages):
    "1300 pixels, light: the front, the contents of the parts, and three chapters"
    some = [p for p in pages if '/' not in p or p.endswith('index.html')] + [place(n).split('#')[0] for n in ('pairwise_distance', 'Crops', 'evaluate')]
    faults, _ = visit(browser, some, 1300, 'light')
    assert not faults, '\n'.join(faults)


MEASURE = textwrap.dedent('''
    async () => {
      if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
      for (const i of document.images) { i.loading = 'eager'; await i.decode().catch(() => 0); }
      const high = document.documentElement.scrollHeight;                          // as a reader finds it: what is folded stays folded
      const shots = [...document.querySelectorAll('article figure img')].map(i => i.getBoundingClientRect()).map(r => [r.top, r.bottom, r.width]);
      for (const d of document.querySelectorAll('article details')) d.open = true; // the code behind a line must fit as well
      const code = [...document.querySelectorAll('article pre')].map(e => ({wide: e.scrollWidth, seen: e.clientWidth, text: e.textContent.trimEnd()}));
      return {high, shots, code, wide: document.documentElement.scrollWidth};
    }''')


def measured(browser, pages, width):
    "What MEASURE finds on each page in a window of this width, 900 pixels high"
    context, out = browser.new_context(viewport=dict(width=width, height=900)), {}
    for name in pages:
        tab = context.new_page()
        tab.goto(f'{browser.site}/{name}', wait_until='load')
        out[name] = tab.evaluate(MEASURE)
        tab.close()
    context.close()
    return out


@pytest.fixture(scope='module')
def desk(browser, pages): return measured(browser, pages, 1440)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_code_fits_its_column(desk):
    "1440 pixels: a block whose lines have at most 110 characters needs no scroll bar; nor do the drawings of the first two pages"
    cut, drawings = [], 0
    for name, page in desk.items():
        for c in page['code']:
            longest = max(map(len, c['text'].splitlines()), default=0)
            if longest <= 110 and c['wide'] > c['seen']: cut.append(f"{name}: {longest} characters, {c['wide']} pixels in {c['seen']}: {c['text'][:60]!r}")
            if name in ('index.html', 'start.html') and '─►' in c['text']:
                drawings += 1
                if c['wide'] > c['seen']: cut.append(f"{name}: the drawing is cut, {c['wide']} pixels in {c['seen']}")
    assert not cut, '\n'.join(cut)
    assert drawings == 2 and sum(len(p['code']) for p in desk.values()) > 1000


@pytest.mark.slow
def test_the_first_screen_shows_pictures(desk):
    "1440 x 900: the cameras above, a ranked list and a report side by side below them, all before the fold"
    (cams, ranked, report), width = desk['index.html']['shots'], 874
    assert max(cams[1], ranked[1], report[1]) <= 900, desk['index.html']['shots']
    assert ranked[0] >= cams[1] and abs(ranked[0]-report[0]) < 2 and cams[2] > .95*width and ranked[2] > .45*width


HIGH = 35_000   # pixels of `document.documentElement.scrollHeight` in a window of 1440 x 900: formulas set, pictures loaded, folds closed


@pytest.mark.slow
def test_no_method_page_is_tall(desk):
    tall = {name: page['high'] for name, page in desk.items() if name.startswith('methods/') and page['high'] > HIGH}
    assert not tall, f'split these chapters, or move their tables to nbs/results/: {tall}'


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_code_scrolls_in_its_own_box_on_a_phone(browser, pages):
    "380 pixels: no page scrolls sideways, also with every fold open; long code scrolls where it stands"
    some = [p for p in pages if '/' not in p or p.startswith(('methods/', 'data/'))]
    found = measured(browser, some, 380)
    wide = {name: page['wide'] for name, page in found.items() if page['wide'] > 380}
    assert not wide
    assert any(c['wide'] > c['seen'] for c in found['index.html']['code'])


@pytest.mark.slow
@pytest.mark.parametrize('word, page', [('pairwise_distance', ''), ('evaluate', ''), ('trapezoid', 'protocol.html')])
def test_search_finds(browser, word, page):
    page = page or place(word)
    tab = browser.new_page()
    tab.goto(f'{browser.site}/index.html')
    box = tab.locator('input[type=search], input[name=q]').first
    box.fill(word); box.press('Enter')
    tab.wait_for_selector(f'#search-results li a[href*="{page}"]', timeout=20_000)
    tab.locator(f'#search-results li a[href*="{page}"]').first.click()
    tab.wait_for_url(f'**/{page.split("#")[0]}*')
    tab.close()


@pytest.mark.slow
def test_the_colour_switch_and_the_file_system(browser, built):
    "The button turns the page dark; and the site opens from a folder, without a server"
    context = browser.new_context(color_scheme='light')
    tab, faults = context.new_page(), []
    tab.on('console', lambda m: faults.append(m.text) if m.type == 'error' else None)
    page = place('pairwise_distance').split('#')[0]
    tab.goto((built / page).as_uri())
    assert tab.evaluate(LOOK)['set'] > 5
    shade = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    for _ in range(3):
        tab.locator('button.theme-toggle:visible').first.click()
        if tab.evaluate("document.body.dataset.theme") == 'dark': break
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != shade
    tab.goto((built / 'search.html').as_uri() + '?q=pairwise_distance')
    tab.wait_for_selector('#search-results li a[href*="' + page + '"]', timeout=20_000)
    assert not faults
    context.close()
