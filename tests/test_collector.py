"A notebook that fails says which notebook, which cell and which line; `slow` and `cuda` cells are skipped unless asked for."
import json
import shutil
from pathlib import Path

import pytest

pytest_plugins = ['pytester']
ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(pytester):
    shutil.copy(ROOT / 'conftest.py', pytester.path)
    def write(*sources):
        cells = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None)
                 for i, s in enumerate(sources)]
        nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        (pytester.path / '10_toy.ipynb').write_text(json.dumps(nb))
        return pytester
    return write


def test_names_notebook_cell_and_line(project):
    r = project('x = 1', 'y = 2\nz = 0\nassert y == z, "two is not zero"').runpytest_subprocess()
    r.assert_outcomes(failed=1)
    r.stdout.fnmatch_lines(['*10_toy.ipynb: cell 2 (id c1), line 3: AssertionError: two is not zero*'])


def test_line_of_a_call_into_a_function(project):
    r = project('def f(v):\n    return 1/v', 'a = 0\n\nf(a)').runpytest_subprocess()
    r.stdout.fnmatch_lines(['*cell 2 (id c1), line 3: ZeroDivisionError*'])


def test_syntax_error(project):
    r = project('x = (').runpytest_subprocess()
    r.assert_outcomes(failed=1)
    r.stdout.fnmatch_lines(['*cell 1 (id c0), line 1: *SyntaxError*'])


def test_slow_and_cuda_cells_are_skipped(project):
    p = project('#| slow\nassert False', '#| cuda\nassert False', '#| eval: false\nassert False', 'assert True')
    p.runpytest_subprocess().assert_outcomes(passed=1)
    r = p.runpytest_subprocess('--slow')
    r.assert_outcomes(failed=1)
    r.stdout.fnmatch_lines(['*cell 1 (id c0), line 2*'])


def test_fresh_namespace(project):
    p = project('left_over = 1')
    cells = [dict(cell_type='code', id='d0', metadata={}, source='assert "left_over" not in globals()',
                  outputs=[], execution_count=None)]
    (p.path / '20_next.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    p.runpytest_subprocess().assert_outcomes(passed=2)


TWO_FILES = {f'test_{k}': "import os, pytest\n@pytest.mark.parametrize('n', range(6))\ndef test_a(n):\n"
                          "    with open(os.environ['SEEN'], 'a') as f: f.write(f'{__name__} {os.getpid()}\\n')" for k in 'ab'}


def processes(p, monkeypatch, *args):
    "Run two files of six tests each; the processes in which each of them ran"
    p.makepyfile(**TWO_FILES)
    p.path.joinpath('pyproject.toml').write_text((ROOT / 'pyproject.toml').read_text())
    seen = p.path / 'seen'
    monkeypatch.setenv('SEEN', str(seen))
    monkeypatch.delenv('PYTEST_XDIST_WORKER', raising=False)
    p.runpytest_subprocess(*args, 'test_a.py', 'test_b.py').assert_outcomes(passed=12)
    rows = [line.split() for line in seen.read_text().splitlines()]
    assert len(rows) == 12
    return [{pid for name, pid in rows if name == f'test_{k}'} for k in 'ab']


@pytest.mark.parametrize('missing', [('xdist',), ('xdist', 'timeout')])
def test_runs_without_the_plugins(project, monkeypatch, missing):
    "With the project's own configuration"
    a, b = processes(project('assert True'), monkeypatch, *(x for k in missing for x in ('-p', f'no:{k}')))
    assert a == b and len(a) == 1


def test_a_file_stays_in_one_process(project, monkeypatch):
    pytest.importorskip('xdist')
    a, b = processes(project('assert True'), monkeypatch, '-n', '2')
    assert len(a) == len(b) == 1 and a != b


def test_another_dist_is_obeyed(project, monkeypatch):
    pytest.importorskip('xdist')
    a, b = processes(project('assert True'), monkeypatch, '-n', '2', '--dist', 'load')
    assert len(a | b) == 2 and (len(a) == 2 or len(b) == 2)   # tests go to whoever is free: a file is split


def test_a_slow_draw_is_no_failure(project):
    "Hypothesis has no deadline here"
    p = project('assert True')
    p.makepyfile("import time\nfrom hypothesis import given, settings, strategies as st\n@settings(max_examples=2)\n@given(st.integers())\n"
                 "def test_slow(n): time.sleep(.3)")
    p.runpytest_subprocess('test_a_slow_draw_is_no_failure.py').assert_outcomes(passed=1)
