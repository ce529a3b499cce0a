"""Pytest reads the notebooks: every `nbs/**/*.ipynb` is one test item, run cell by cell by nbdev's engine in a fresh namespace.

`#| slow` and `#| cuda` cells (and tests with these marks) are skipped unless `--slow` / `--cuda` is given.
"""
import gc
import os
import sys
import traceback

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')   # before torch: processes, not threads

import pytest  # noqa: E402

FLAGS = ('slow', 'cuda')


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run cells and tests marked slow')
    parser.addoption('--cuda', action='store_true', help='also run cells and tests that need a GPU')


@pytest.hookimpl(tryfirst=True)   # before xdist turns `no` into `load`
def pytest_cmdline_main(config):
    "With -n, a file, and what its tests share, stays in one process, unless --dist says otherwise"
    if getattr(config.option, 'numprocesses', None) and getattr(config.option, 'dist', None) == 'no':
        config.option.dist = 'loadfile'


def pytest_configure(config):
    try: from hypothesis import HealthCheck, settings
    except ImportError: pass
    else:   # a slow machine is no fault
        settings.register_profile('any machine', deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile('any machine')
    if config.getoption('--cuda'):
        import torch
        if not torch.cuda.is_available(): raise pytest.UsageError('--cuda: torch sees no GPU on this machine')


def pytest_collection_modifyitems(config, items):
    for item in items:
        for flag in FLAGS:
            if flag in item.keywords and not config.getoption(f'--{flag}'):
                item.add_marker(pytest.mark.skip(reason=f'needs --{flag}'))


def pytest_collect_file(file_path, parent):
    if file_path.suffix == '.ipynb' and '.ipynb_checkpoints' not in file_path.parts:
        return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    def collect(self): yield NotebookItem.from_parent(self, name=self.path.stem)


class CellFailed(Exception):
    "A cell raised: which one, at which of its lines, and what"
    def __init__(self, path, number, cell, exc):
        self.path, self.number, self.cell, self.exc = path, number, cell, exc

    def line(self):
        "1-based line in the cell: the deepest frame that belongs to it"
        if isinstance(self.exc, SyntaxError): return self.exc.lineno or 1
        frames = [f for f in traceback.extract_tb(self.exc.__traceback__) if 'ipython-input' in f.filename]
        lines = self.cell.source.count('\n') + 1
        return next((f.lineno for f in frames if f.name in ('<module>', '<cell line: 1>') and f.lineno <= lines),
                    frames[0].lineno if frames else 1)

    def __str__(self):
        at, src = self.line(), self.cell.source.splitlines()
        shown = '\n'.join(f"{'>' if n == at else ' '} {n:3d}  {s}" for n, s in enumerate(src, 1) if abs(n - at) < 8)
        tb = ''.join(traceback.format_exception(type(self.exc), self.exc, self.exc.__traceback__)[-6:])
        return (f'{self.path}: cell {self.number} (id {self.cell.get("id", "?")}), line {at}: '
                f'{type(self.exc).__name__}: {self.exc}\n{shown}\n\n{tb}')


class NotebookItem(pytest.Item):
    def runtest(self):
        import matplotlib
        matplotlib.use('agg')
        from execnb.nbio import read_nb
        from execnb.shell import CaptureShell
        from fastcore.xtras import working_directory
        from nbdev.process import extract_directives
        os.environ['IN_TEST'] = '1'   # nbdev and fastcore read this: no export from inside a test
        skip = {f for f in FLAGS if not self.config.getoption(f'--{f}')}
        nb, before = read_nb(self.path), (sys.modules['__main__'], sys.displayhook, sys.excepthook)
        shell = CaptureShell(self.path, mpl_format=None)   # takes the place of __main__
        self.addfinalizer(lambda: self.clean(shell, before))
        with working_directory(self.path.parent):
            for number, cell in enumerate(nb.cells, 1):
                if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: continue
                directives = extract_directives(cell, remove=False)
                if skip & directives.keys() or directives.get('eval:', [''])[0].lower() == 'false': continue
                shell.run(cell.source)
                if shell.exc: raise CellFailed(self.path.relative_to(self.config.rootpath), number, cell, shell.exc)

    def clean(self, shell, before):
        "Give back what the notebook held"
        import matplotlib.pyplot as plt
        sys.modules['__main__'], sys.displayhook, sys.excepthook = before
        plt.close('all')
        shell.user_ns.clear()
        os.environ.pop('IN_TEST', None)
        gc.collect()

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, CellFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self): return self.path, 0, f'notebook {self.path.relative_to(self.config.rootpath)}'
