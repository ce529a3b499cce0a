"""Build the site of the book from its notebooks, offline: pages, math, search, figures, API.

usage: python tools/docs.py [--out _docs] [--fresh] [--draft]       needs the dev requirements (Sphinx, MyST-NB, furo); executes no cell
A relative link that leads nowhere, or any warning of Sphinx, fails the build. Notebooks are found by folder: nothing to edit for a new one.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import sys
import time
from configparser import ConfigParser
from dataclasses import dataclass, field
from importlib.metadata import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import docs_api

ROOT = Path(__file__).parent.parent
# The wings of the book in reading order: the only place that says it. A folder of nbs/ without pages is skipped, one not named here comes last.
WINGS = ['tutorials', 'data', 'datasets', 'world', 'networks', 'losses', 'neighbours', 'ranking', 'viz', 'training', 'generators', 'methods', 'results',
         'practice', 'core']
# What a wing is called, and what it is about; without an entry it is called as its folder.
ABOUT = {'core': ('Core', 'What every room uses: files, checkpoints, processes, costs, figures.'),
         'neighbours': ('Neighbours', 'Who is near whom: nearest and reciprocal neighbours, and the clusters they make.'),
         'data': ('Data', 'Crops as one table: folders, splits, checks, transforms, samplers, loading.'),
         'datasets': ('Data sets', 'Public data sets of images and of videos: their layouts, their protocols, their terms.'),
         'world': ('World', 'A world without real people: bodies, clothes, places, cameras, walks, and the sites they make.'),
         'networks': ('Networks', 'From an image to a vector: backbones, norms, attention, parts, memories, teachers.'),
         'losses': ('Losses', 'What shapes the vectors, one family a page.'),
         'ranking': ('Ranking', 'From vectors to an ordered gallery: scores, re-ranking, time, matching.'),
         'viz': ('Pictures', 'What a ranking got right and wrong, and where a network looks.'),
         'training': ('Training', 'One loop for every method: what it promises, how it resumes, what it writes down.'),
         'generators': ('Generators', 'Images that were never taken: camera styles and views.'),
         'methods': ('Methods', 'The parts put together, one chapter a method.'),
         'results': ('Results', 'What was measured, one page a method, made from result cards.'),
         'practice': ('Practice', 'Search, reports, experiments and the command line.'),
         'tutorials': ('Tutorials', 'One task each.')}
FRONT = ['start']                                        # pages of nbs/ itself that stand before the parts; the others stand after
LAST = ['protocol', 'glossary', 'equations']             # and the order of these
DIRECTIVE = re.compile(r'^#\s*\|\s*([\w-]+):?[ \t]*(.*)$')
LINK = re.compile(r'(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)')
TEST = re.compile(r'^\s*(assert\b|test_\w+\(|with expect_fail)', re.M)


def settings(root: Path = ROOT) -> dict:
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])


def slug(heading: str) -> str:
    """The id MyST gives a heading: as on GitHub"""
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    return re.sub(r'[^\w\- ]', '', text.strip().lower().replace(' ', '-'))


def same(anchor: str) -> str: return re.sub(r'[\W_]', '', anchor.lower())


@dataclass
class Page:
    """A notebook on its way to the site"""
    path: Path                                            # of the notebook
    name: str                                             # `data/crops`: the page's address without .html
    cells: list
    title: str = ''
    subtitle: str = ''
    module: str = ''                                      # `reidnb.data.crops`
    headings: dict = field(default_factory=dict)          # what an anchor says -> its slug
    sections: dict = field(default_factory=dict)          # exported name -> slug of the section that defines it
    shown: set = field(default_factory=set)               # names whose code stands open on the page, `Crops.labels` for a method

    @property
    def part(self): return self.name.rpartition('/')[0]


def source(cell) -> str: return ''.join(cell['source'])


def directives(cell) -> dict:
    """The `#|` lines of a cell, as {name: rest}"""
    out = {}
    for line in source(cell).lstrip().splitlines():
        if not (m := DIRECTIVE.match(line)): break
        out[m[1]] = m[2].strip()
    return out


def read(path: Path, lib: str, nbs: Path) -> Page:
    """Read a notebook and learn its title, module, headings and where each name is defined"""
    where = path.relative_to(nbs)
    name = (where.parent/re.sub(r'^\d+[a-zA-Z]?_', '', path.stem)).as_posix()
    page = Page(path, name, json.loads(path.read_text(encoding='utf-8'))['cells'])
    at, used = '', {}
    for cell in page.cells:
        if cell['cell_type'] == 'markdown':
            text = re.sub(r'^(```|~~~).*?^\1', '', source(cell), flags=re.M | re.S)
            for m in re.finditer(r'^(#{1,4}) (.+?)[ #]*$', text, re.M):
                base = at = slug(m[2])
                if base in used: at = f'{base}-{used[base]}'
                used[base] = used.get(base, 0)+1
                page.headings.setdefault(same(m[2]), at)
                if len(m[1]) == 1 and not page.title: page.title = m[2]
            if page.title and not page.subtitle and (m := re.search(r'^> (.+)$', text, re.M)): page.subtitle = m[1]
        elif cell['cell_type'] == 'code':
            marks = directives(cell)
            if 'default_exp' in marks: page.module = f"{lib}.{marks['default_exp']}"
            if marks.keys() & {'export', 'exports'}:
                for n in defined(source(cell)): page.sections.setdefault(n, at)
            if 'exports' in marks: page.shown |= set(opened(source(cell)))
    page.title = page.title or path.stem
    return page


def body(text: str) -> list:
    """The statements of a cell; none when it is not Python"""
    try: return ast.parse(text).body
    except SyntaxError: return []


def defined(text: str) -> list:
    """Names a cell defines"""
    names = [n.name for n in body(text) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    targets = [t for n in body(text) if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in getattr(n, 'targets', None) or [n.target]]
    return names + [t.id for u in targets for t in getattr(u, 'elts', [u]) if isinstance(t, ast.Name)]


def opened(text: str) -> list:
    """Functions, classes and methods a cell defines, a method as `Class.method`, patched ones too"""
    out = []
    for n in body(text):
        if isinstance(n, ast.ClassDef): out += [n.name] + [f'{n.name}.{f.name}' for f in n.body if isinstance(f, ast.FunctionDef)]
        elif isinstance(n, ast.FunctionDef):
            patched = any(docs_api.code(d).split('(')[0] in ('patch', 'patch_to') for d in n.decorator_list) and n.args.args
            out.append(f'{docs_api.code(n.args.args[0].annotation)}.{n.name}' if patched else n.name)
    return out


def only_imports(text: str) -> bool:
    """Whether a cell holds imports and nothing else"""
    return bool(body(text)) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body(text))


def merged(outputs: list) -> list:
    """A copy of outputs in which what was printed in one go is one output"""
    out = []
    for o in json.loads(json.dumps(outputs)):
        if o['output_type'] == 'stream': o['text'] = ''.join(o['text'])
        if out and o['output_type'] == 'stream' and o.get('name') == out[-1].get('name'): out[-1]['text'] += o['text']
        else: out.append(o)
    return out


class Site:
    """All pages, the names they define, and the links between them"""
    def __init__(self, root: Path = ROOT):
        self.root, cfg = root, settings(root)
        self.lib, self.git = cfg['lib_name'], f"{cfg['git_url']}/blob/{cfg['branch']}"
        self.nbs, self.version = root/cfg['nbs_path'], cfg['version']
        paths = [p for p in sorted(self.nbs.rglob('*.ipynb')) if not any(s.startswith(('.', '_')) for s in p.relative_to(self.nbs).parts)]
        self.pages = [read(p, self.lib, self.nbs) for p in paths]
        twice = {p.name for p in self.pages if sum(q.name == p.name for q in self.pages) > 1}
        if twice: raise SystemExit(f'two notebooks would write the same page: {sorted(twice)}')
        self.by_path = {p.path.resolve(): p for p in self.pages}
        self.broken, self.api = [], {}
        for p in self.pages:
            file = root/(p.module.replace('.', '/')+'.py')
            if p.module and file.exists(): self.api[p.module] = docs_api.entries(file)
            elif p.module: print(f'{p.path.relative_to(root)}: {p.module} is not exported yet, so the page has no API')

    def target(self, page: Page, link: str) -> str:
        """Where a link of a notebook leads on the site; broken ones are noted"""
        if re.match(r'[a-z][a-z0-9+.-]*:|//', link): return link
        file, _, anchor = link.partition('#')
        path = (page.path.parent/file).resolve() if file else page.path.resolve()
        if not path.exists(): path = (self.root/file).resolve()         # as in README.md, which is made from the index
        def bad(why): self.broken.append(f'{page.path.relative_to(self.root)}: ({link}) {why}')
        if to := self.by_path.get(path):
            if not anchor: return f'/{to.name}.ipynb'
            if at := to.headings.get(same(anchor)): return f'/{to.name}.ipynb#{at}'
            return bad(f'has no heading like this; there are {", ".join(to.headings.values())}') or link
        if not path.exists(): return bad('does not exist') or link
        if not path.is_relative_to(self.root): return bad('leaves the repository') or link
        return f'{self.git}/{path.relative_to(self.root).as_posix()}' + (f'#{anchor}' if anchor else '')

    def links(self, page: Page, text: str) -> str:
        """Markdown with its relative links turned to the site's; code stays as it is"""
        parts = re.split(r'(^```.*?^```|`(?!\]\()[^`\n]+`(?!\]))', text, flags=re.M | re.S)
        for k in range(1, len(parts), 2): parts[k] = parts[k].replace('](', ']\0(')
        return re.sub(LINK, lambda m: f'[{m[1]}]({self.target(page, m[2])})', ''.join(parts)).replace('\0', '')

    # --- cells ---------------------------------------------------------------------------------------------
    def title(self, page: Page, text: str) -> str:
        """The first cell: title, subtitle as a lead, and where the sources are"""
        nb = page.path.relative_to(self.root).as_posix()
        line = f'[Notebook `{nb}`]({self.git}/{nb})'
        if page.module: line += f' [Module `{page.module}`]({self.git}/{page.module.replace(".", "/")}.py)'
        if page.module in self.api and self.api[page.module]: line += ' [API](#api)'
        head, quote, rest = re.match(r'\s*(# [^\n]*)\n*((?:^>[^\n]*\n?)*)(.*)', text, re.M | re.S).groups()
        return '\n\n'.join([head, '{.lead}\n'+quote.strip() if quote else '', '{.sources}\n'+line, rest.strip()])

    def code(self, cell: dict, page: Page):
        """A code cell without its directives, tagged for the style sheet; None when nothing of it is shown"""
        marks, text = directives(cell), re.sub(r'^(\s*#\s*\|.*\n?)+', '', source(cell)).strip('\n')
        if not text or 'hide' in marks or marks.get('include') == 'false' or 'nbdev_export(' in text: return None
        meta, tags = {}, []
        if marks.get('echo') == 'false': tags.append('remove-input')
        if marks.get('output') == 'false': tags.append('remove-output')
        mystnb = meta.setdefault('mystnb', {})
        if marks.keys() & {'export', 'exporti'} or marks.get('code-fold') == 'true' or only_imports(text):
            names = [n for n in defined(text) if n != '_all_']
            label = 'imports' if only_imports(text) else ', '.join(names) or 'code'
            tags.append('hide-input')
            mystnb |= {'code_prompt_show': label, 'code_prompt_hide': label}
        if cap := marks.get('fig-cap'): mystnb |= {'figure': {'caption': cap}, 'image': {'alt': cap}}
        if marks.get('layout') in ('half', 'strip'): tags.append(marks['layout'])             # two side by side; a long one, scrolled on a phone
        if marks.keys() & {'export', 'exports', 'exporti'}: tags.append('defines')
        elif TEST.search(text): tags.append('tests')
        for flag in ('slow', 'cuda'):
            if flag in marks: tags.append(flag)
        if marks.get('eval') == 'false': tags.append('shown')
        text = '\n'.join(s for s in text.splitlines() if not re.match(r'.*#\|\s*hide_line\s*$', s))
        outputs = merged(cell.get('outputs', []))
        printed = ''.join(''.join(o.get('text', '')) for o in outputs).splitlines()
        if len(printed) <= 3 and any(len(s) > 110 for s in printed): tags.append('wraps')         # a sentence, not a table
        for o in outputs:
            o.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)   # a page has no kernel: the still picture stays
            if 'text/markdown' in o.get('data', {}):
                o['data'] = {'text/markdown': self.links(page, ''.join(o['data']['text/markdown']))}
        return dict(cell_type='code', id=cell['id'], metadata={**meta, 'tags': tags}, execution_count=None, source=text, outputs=outputs)

    def notebook(self, page: Page) -> dict:
        """The notebook as MyST-NB renders it"""
        cells, first = [], True
        for k, cell in enumerate(page.cells):
            cell = {'id': f'c{k}', **cell}
            if cell['cell_type'] == 'code':
                if c := self.code(cell, page): cells.append(c)
            elif cell['cell_type'] == 'markdown':
                text = self.links(page, source(cell))
                if re.fullmatch(r'#+ .* -\s*', text): continue          # nbdev: a heading that the docs do not show
                if first and text.lstrip().startswith('# '): text, first = self.title(page, text), False
                cells.append(dict(cell_type='markdown', id=cell['id'], metadata={}, source=text))
        for extra in (self.reference(page), self.contents() if page.name == 'index' else ''):
            if extra: cells.append(dict(cell_type='markdown', id=f'x{len(cells)}', metadata={}, source=extra))
        meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'),
                    language_info=dict(name='python', pygments_lexer='python'))
        return dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)

    # --- pages made here -----------------------------------------------------------------------------------
    def reference(self, page: Page) -> str:
        """The API of a page's module, at its foot"""
        if not self.api.get(page.module): return ''
        url = f"{self.git}/{page.module.replace('.', '/')}.py"
        out = ['## API', '', '{.api-lead}', f'What `{page.module}` exports.', '']
        for e in self.api[page.module]:
            at = page.sections.get(e.name)
            out += [docs_api.markdown(e, page.module, url, f'#{at}' if at else '', page.shown), '']
        return '\n'.join(out)

    def parts(self) -> list:
        """Folders that hold notebooks, in the order of the book"""
        found = {p.part for p in self.pages if p.part}
        return [p for p in WINGS if p in found] + sorted(found - set(WINGS))

    def contents(self) -> str:
        """The hidden tables of contents of the root page, which make the side bar"""
        rest = [p.name for p in self.pages if not p.part and p.name not in ('index', *FRONT)]
        rest = [n for n in LAST if n in rest] + ['api'] + [n for n in rest if n not in LAST]
        front = [n for n in FRONT if any(p.name == n for p in self.pages)]
        def tree(caption, names): return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *names, '```', ''])
        return '\n'.join([tree('', front) if front else '', tree('The book', [f'{p}/index' for p in self.parts()]), tree('Reference', rest)])

    def part_page(self, part: str) -> str:
        """The contents of one part: every chapter with its subtitle"""
        title, text = ABOUT.get(part, (part.capitalize(), ''))
        pages = [p for p in self.pages if p.part == part]
        out = [f'# {title}', '', *(['{.lead}', f'> {text}', ''] if text else []), '{.chapters}']
        for p in pages:
            names = [e.name for e in self.api.get(p.module, ()) if e.kind != 'data']
            out += [f'* [{p.title}](/{p.name}.ipynb)', '', f'  {p.subtitle}', '']
            if names: out += [f'  {{.names}}\n  {" ".join(f"`{p.module}.{n}`" for n in names)}', '']
        return '\n'.join([*out, '```{toctree}', ':hidden:', '', *(p.name.split('/')[-1] for p in pages), '```'])

    def api_page(self) -> str:
        """Every public name of the package, by part and module"""
        out = ['# API', '', '{.lead}', '> Every public name of the package, where it is explained, and what it is for in one line.', '']
        for part in [*self.parts(), '']:
            pages = [p for p in self.pages if p.part == part and self.api.get(p.module)]
            if pages: out += [f'## {ABOUT.get(part, (part.capitalize() or "Notebooks", ""))[0]}', '']
            for p in pages:
                out += [f'### `{p.module}`', '', f'[{p.title}](/{p.name}.ipynb): {p.subtitle}', '', '````{list-table}', ':class: api-index', ':widths: 30 70', '']
                for e in self.api[p.module]:
                    first = e.doc.strip().splitlines()[0] if e.doc.strip() else ''
                    out += [f'* - `{p.module}.{e.name}`', f'  - {docs_api.plain(first)}'.rstrip()]
                out += ['````', '']
        return '\n'.join(out)

    def names(self) -> dict:
        """What a word between backticks may mean -> [domain role, target]: wings, modules, full names, names that are unique in a wing or in all"""
        out, short = {f'{self.lib}.{part}': ['doc', f'{part}/index'] for part in self.parts()}, {}
        for p in self.pages:
            if p.module: out[p.module] = ['doc', p.name]
        for module, found in self.api.items():
            for e in (x for f in found for x in (f, *f.members)):
                full = f'{module}.{e.name}'
                out[full] = out[full.removeprefix(f'{self.lib}.')] = ['obj', full]
                wing = module.rpartition('.')[0]                        # which hands on names of its modules: `reidnb.world.make_site`
                for name in {e.name, f'{wing}.{e.name}', f'{wing}.{e.name}'.removeprefix(f'{self.lib}.')}: short.setdefault(name, set()).add(full)
        return {name: ['obj', *full] for name, full in short.items() if len(full) == 1} | out

    def write(self, src: Path, draft: bool = False):
        """Write the sources of the site; files that did not change keep their time, so a second build is short"""
        files = {f'{p.name}.ipynb': json.dumps(self.notebook(p), indent=1, sort_keys=True) for p in self.pages}
        if any(p.name == 'api' for p in self.pages): raise SystemExit('nbs/api.ipynb: the page `api` is made by tools/docs.py')
        files |= {f'{part}/index.md': self.part_page(part) for part in self.parts()}
        files |= {'api.md': self.api_page(), 'names.json': json.dumps(self.names())}
        report = 'broken links:\n' + '\n'.join(f'  {b}' for b in self.broken)
        if self.broken and not draft: raise SystemExit(report)
        if self.broken: print(report)
        for old in src.rglob('*'):
            if old.is_file() and old.relative_to(src).as_posix() not in files and 'static' not in old.parts: old.unlink()
        for name, text in files.items():
            path = src/name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text(encoding='utf-8') != text: path.write_text(text, encoding='utf-8')


def mathjax(to: Path):
    """Copy the one file of MathJax that the pages need, from the package that carries it"""
    if to.exists(): return
    found = [f for f in files('sphinx-mathjax-offline') or () if f.name == 'tex-svg.js']
    if not found: raise SystemExit('MathJax is not installed: pip install sphinx-mathjax-offline')
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(found[0].locate(), to)


def build(out: Path, work: Path = ROOT/'build'/'docs', fresh: bool = False, draft: bool = False, root: Path = ROOT) -> int:
    """Build the site into `out`; 0 when nothing was amiss"""
    from sphinx.application import Sphinx
    if fresh: shutil.rmtree(work, ignore_errors=True)
    if fresh or not (work/'doctrees').exists(): shutil.rmtree(out, ignore_errors=True)
    src = work/'src'
    Site(root).write(src, draft)
    mathjax(work/'static'/'mathjax'/'tex-svg.js')
    cfg = settings(root)
    theme = Path(__file__).parent/'theme'
    mark = hashlib.sha1((theme/'conf.py').read_bytes()+(src/'names.json').read_bytes()).hexdigest()   # either changed: all pages anew
    values = dict(project=cfg['lib_name'], author=cfg['author'], version=cfg['version'], release=cfg['version'], html_title=cfg['title'],
                  copyright=cfg['copyright'], html_static_path=[str(theme/'static'), str(work/'static')],
                  names_file=str(src/'names.json'), names_hash=mark)
    app = Sphinx(str(src), str(theme), str(out), str(work/'doctrees'), 'html', confoverrides=values,
                 status=None, warningiserror=not draft, parallel=min(4, os.cpu_count() or 1))
    app.build()
    return app.statuscode


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder to write')
    parser.add_argument('--fresh', action='store_true', help='build every page again')
    parser.add_argument('--draft', action='store_true', help='build also with broken links and warnings')
    args, start = parser.parse_args(), time.time()
    code = build(args.out.resolve(), fresh=args.fresh, draft=args.draft)
    pages = len(list(args.out.rglob('*.html')))
    print(f"{args.out/'index.html'}: {pages} pages in {time.time()-start:.0f} s" if not code else 'the site has faults: see the warnings above')
    sys.exit(code)
