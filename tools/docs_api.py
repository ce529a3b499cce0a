"""Read the public names of a module, with the comments beside their parameters, from its source. Imports nothing of it; needs only Python."""
import ast
import io
import tokenize
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path


@dataclass
class Param:
    """One parameter, field or return value, with the comment that stands beside it"""
    name: str
    type: str = ''
    default: str = ''
    doc: str = ''


@dataclass
class Entry:
    """A public function, class, method, property or constant"""
    name: str                                     # `Crops.labels` for a method
    kind: str                                     # function, class, method, property or data
    line: int
    doc: str = ''
    params: list = field(default_factory=list)    # of Param
    returns: Param = None
    members: list = field(default_factory=list)   # of Entry, for a class
    flags: list = field(default_factory=list)     # classmethod, staticmethod
    value: str = ''                               # of a constant


def comments(text: str) -> dict:
    """Line number -> the comment on that line"""
    return {t.start[0]: t.string.lstrip('#').strip() for t in tokenize.generate_tokens(io.StringIO(text).readline)
            if t.type == tokenize.COMMENT and not t.string.startswith('#|')}


def code(node) -> str: return ast.unparse(node) if node is not None else ''


def parameters(fn, notes: dict) -> tuple:
    """Parameters of a function (without self), and its return value"""
    a = fn.args
    positional = a.posonlyargs + a.args
    defaults = [None]*(len(positional)-len(a.defaults)) + list(a.defaults)
    args = list(zip([n.arg for n in positional], positional, defaults))
    if a.vararg: args.append(('*'+a.vararg.arg, a.vararg, None))
    elif a.kwonlyargs: args.append(('*', None, None))
    args += list(zip([n.arg for n in a.kwonlyargs], a.kwonlyargs, a.kw_defaults))
    if a.kwarg: args.append(('**'+a.kwarg.arg, a.kwarg, None))
    args = [(n, x, d) for n, x, d in args if n not in ('self', 'cls')]
    end = fn.body[0].lineno
    last = max([getattr(d, 'end_lineno', 0) or x.end_lineno for _, x, d in args if x is not None], default=fn.lineno)
    params = []
    for n, x, d in args:
        if x is None: params.append(Param(n)); continue
        params.append(Param(n, code(x.annotation), code(d), notes.get(getattr(d, 'end_lineno', x.end_lineno), '')))
    where = next((k for k in range(last+1 if args else fn.lineno, end+1) if k in notes and k < max(end, last+1)), None)
    doc = notes.get(where, '')
    if not args: doc = notes.get(fn.lineno, '') or doc
    if end == fn.lineno: doc = ''                                       # a one-line function: its comment is about the body
    returns = Param('returns', code(fn.returns), '', doc) if doc or (fn.returns is not None and code(fn.returns) != 'None') else None
    return params, returns


def function(fn, notes: dict, owner: str = '') -> Entry:
    """The entry of a function or of a method of `owner`"""
    marks = [code(d) for d in fn.decorator_list]
    prop = any(m.split('.')[-1].split('(')[0] in ('property', 'cached_property') for m in marks)
    e = Entry(f'{owner}.{fn.name}' if owner else fn.name, 'property' if prop else 'method' if owner else 'function', fn.lineno,
              ast.get_docstring(fn) or '', flags=[m for m in marks if m in ('classmethod', 'staticmethod')])
    e.params, e.returns = parameters(fn, notes)
    return e


def made_default(node) -> str:
    """The default of a dataclass field; of `field(default_factory=list)` it is `list()`"""
    if isinstance(node, ast.Call) and code(node.func).endswith('field'):
        given = {k.arg: k.value for k in node.keywords}
        if 'default' in given: return code(given['default'])
        return f"{code(given['default_factory'])}()" if isinstance(given.get('default_factory'), ast.Name) else '...'
    return code(node)


def klass(c, notes: dict) -> Entry:
    """The entry of a class: the parameters of `__init__` or the fields of a dataclass, and its public methods"""
    e = Entry(c.name, 'class', c.lineno, ast.get_docstring(c) or '')
    init = next((f for f in c.body if isinstance(f, ast.FunctionDef) and f.name == '__init__'), None)
    made = any('dataclass' in code(d) for d in c.decorator_list) or any(code(b).endswith(('NamedTuple', 'TypedDict')) for b in c.bases)
    if init: e.params, _ = parameters(init, notes)
    elif made:
        e.params = [Param(code(n.target), code(n.annotation), made_default(n.value), notes.get(n.end_lineno, ''))
                    for n in c.body if isinstance(n, ast.AnnAssign)]
    for f in c.body:
        if isinstance(f, ast.FunctionDef) and not f.name.startswith('_'): e.members.append(function(f, notes, c.name))
        elif isinstance(f, ast.Assign) and isinstance(f.value, ast.Call) and code(f.value.func) == 'property':
            doc = next((k.value.value for k in f.value.keywords if k.arg == 'doc'), notes.get(f.lineno, ''))
            e.members.append(Entry(f'{c.name}.{code(f.targets[0])}', 'property', f.lineno, doc))
    return e


def entries(path: Path) -> list:
    """The public entries of a module, in reading order"""
    text = path.read_text(encoding='utf-8')
    tree, notes, out = ast.parse(text), comments(text), []
    listed = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and code(n.targets[0]) == '__all__'), None)
    for n in tree.body:
        if isinstance(n, ast.FunctionDef):
            if any(code(d).split('(')[0] in ('patch', 'patch_to') for d in n.decorator_list) and n.args.args:
                owner = code(n.args.args[0].annotation)
                home = next((e for e in out if e.name == owner), None)
                if home and not n.name.startswith('_'): home.members.append(function(n, notes, owner))
            elif not n.name.startswith('_'): out.append(function(n, notes))
        elif isinstance(n, ast.ClassDef) and not n.name.startswith('_'): out.append(klass(n, notes))
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            target = n.targets[0] if isinstance(n, ast.Assign) else n.target
            for t in target.elts if isinstance(target, ast.Tuple) else [target]:
                name = code(t)
                if not name.isidentifier() or name.startswith('_'): continue
                doc = notes.get(n.end_lineno, '') or notes.get(n.lineno, '')
                value = code(n.value) if not isinstance(target, ast.Tuple) else ''
                out.append(Entry(name, 'data', n.lineno, doc, value=value if len(value) <= 60 else ''))
    return [e for e in out if listed is None or e.name in listed]


def signature(e: Entry) -> str:
    """`name(a, b=1)`: names and defaults; types stand in the table"""
    if e.kind in ('data', 'property'): return e.name
    return f"{e.name}({', '.join(p.name + (f'={p.default}' if p.default else '') for p in e.params)})"


def plain(text: str) -> str:
    """A comment as markdown: what is not between backticks stands as it is"""
    parts = text.replace('\\', '\\\\').split('`')
    if len(parts) % 2 == 0: return text.replace('`', '\\`').replace('<', '\\<').replace('*', '\\*')
    for k in range(0, len(parts), 2):
        for c in '<*[$|': parts[k] = parts[k].replace(c, '\\'+c)
    for k in range(1, len(parts), 2): parts[k] = parts[k].replace('\\\\', '\\')
    return '`'.join(parts)


def table(e: Entry) -> str:
    """Parameters and return value as a MyST list-table"""
    rows = [p for p in e.params if p.name != '*'] + ([e.returns] if e.returns else [])
    if not rows or not any(p.doc or p.type for p in rows): return ''
    out = ['````{list-table}', ':class: api-params', ':widths: 30 70', '']
    for p in rows:
        kind = p.type + (f' = {p.default}' if p.default else '')
        head = '*returns*' if p is e.returns else f'`{p.name}`'
        kind = f' {{api-type}}`{kind.replace("`", "")}`' if kind else ''
        out += [f'* - {head}{kind}', f'  - {plain(p.doc)}'.rstrip()]
    return '\n'.join([*out, '````'])


def folded(e: Entry, text: str) -> str:
    """A table behind one line: what it says stands beside the code on the same page already"""
    n = sum(p.name != '*' for p in e.params)
    label = ' and '.join(s for s in (f'{n} parameter{"s"*(n > 1)}'*(n > 0), 'result'*(e.returns is not None)) if s)
    raw = '\n'.join(['`````{raw} html', '%s', '`````'])
    return '\n\n'.join([raw % f'<details class="api-fold"><summary>{label}</summary>', text, raw % '</details>'])


def markdown(e: Entry, module: str, source: str, section: str = '', shown=(), depth: int = 7) -> str:
    """The entry as MyST: signature, docstring, table and source link; `source` is the address of the module, `shown` names with open code"""
    fence = '`'*depth
    # one line: Sphinx breaks long ones itself
    out = [f'{fence}{{py:{e.kind}}} {" ".join(signature(e).split())}', f':module: {module}', *(f':{f}:' for f in e.flags)]
    if e.kind == 'data' and e.value: out.append(f':value: {" ".join(e.value.split())}')
    here = f' [above]({section})' if section else ''
    first, _, rest = cleandoc(e.doc).partition('\n')
    out += ['', '{.api-source}', f'[source]({source}#L{e.line}){here}', '', plain(first)]
    if rest.strip(): out += ['', *('\n'.join(map(plain, part.splitlines())) for part in [rest.strip('\n')])]
    text = table(e)
    out += ['', folded(e, text) if text and e.name in shown else text, '']
    for m in e.members: out += [markdown(m, module, source, shown=shown, depth=depth-1), '']
    return '\n'.join([*out, fence])
