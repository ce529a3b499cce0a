"The words of a comparison on simulated scores, and comparisons with a planted side, in small."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from reidnb.practice.comparisons import Side, compare, read_comparison, verdict
from reidnb.world.sites import make_site

SIZE = dict(height=64, width=32, epochs=2, weights='small', p=4, k=2)


@pytest.mark.parametrize('n', [3, 5])
def test_equal_sides_are_level(n):
    "At least 95 of 100, in 20,000 simulated comparisons"
    rng = np.random.default_rng(0)
    words = [verdict(*rng.normal(.5, .02, (2, n))) for _ in range(20_000)]
    assert words.count('level') / len(words) >= .95
    assert abs(words.count('ahead') - words.count('behind')) < 4 * np.sqrt(len(words))   # neither side is favoured


@pytest.mark.parametrize('seed', range(5))
def test_a_lead_of_twice_the_spread_is_ahead(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        a, b = rng.normal(.5, .02, (2, 3))
        a += b.mean() - a.mean() + 2 * max(np.ptp(a), np.ptp(b))
        if (a > b).all(): assert (verdict(a, b), verdict(b, a)) == ('ahead', 'behind')
        else: assert verdict(a, b) == 'level'
        assert verdict(a + 1, b + 1) == verdict(a, b) == verdict(3 * a, 3 * b)


@pytest.fixture(scope='module')
def sites():
    "Twelve people each to learn from and to test on, at two sites"
    return [make_site(k, n_train=12, n_test=12, height=64, width=32) for k in ('campus', 'mall')]


def test_a_side_whose_rate_is_ten_times_off_gets_the_same_chance(sites, tmp_path):
    sides = {'right': Side('baseline-small', {'lr': 1e-3}), 'off': Side('baseline-small', {'lr': 1e-2})}
    rows = []
    found = compare(tmp_path / 'c.json', sides, *sites, workers=1, report=rows.append, **SIZE)
    tried = {k: sorted(r['changes']['lr'] for r in found.rows if (r['kind'], r['side']) == ('trial', k)) for k in sides}
    assert tried == {'right': [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2], 'off': [1e-3, 3.16e-3, 1e-2, 3.16e-2, .1]}
    assert found.verdict('right', 'off') == 'level', found
    assert len(rows) == len(found.rows) == 2 * (3 + 3 + 5 + 3)


def test_a_gain_of_batch_norm_statistics_is_no_gain(sites, tmp_path):
    "A side that cannot learn, whose statistics move: better than the untrained network, level with the start row"
    sides = {'still': Side('baseline-small', tries={'lr': [1e-9]})}
    found = compare(tmp_path / 'c.json', sides, *sites, trials=1, workers=1, report=None, **SIZE)
    assert found.starts()[0] == 'statistics still'
    assert found.scores('still').mean() > found.scores('untrained still').mean() + .01
    assert found.verdict('still') == 'level'
    assert 'pairs' not in found.tables() and 'statistics still' in str(found)


CHILD = '''
import sys
from reidnb.practice.comparisons import Side, compare
from reidnb.world.sites import make_site
if __name__ == '__main__':
    sites = [make_site(k, n_train=12, n_test=12, height=64, width=32) for k in ('campus', 'mall')]
    sides = {'a': Side('baseline-small', tries={'lr': [1e-3, 1e-2]})}
    compare(sys.argv[1], sides, *sites, trials=2, workers=int(sys.argv[2]), report=lambda s: print(s, flush=True),
            height=64, width=32, epochs=2, weights='small', p=4, k=2)
'''


def test_killed_and_asked_again_it_goes_on(tmp_path):
    "Side by side in two processes, killed by signal 9 after two runs, against one process that nobody stops"
    (tmp_path / 'child.py').write_text(CHILD)
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(x for x in sys.path if x)}
    def child(card, workers):
        return subprocess.Popen([sys.executable, str(tmp_path / 'child.py'), str(tmp_path / card), str(workers)], env=env,
                                stdout=subprocess.PIPE, text=True)
    first = child('cut.json', 2)
    for _ in range(2): first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    time.sleep(1.5)   # its workers notice that they are alone
    had = len(json.loads((tmp_path / 'cut.json').read_text())['metrics']['rows'])
    again, whole = child('cut.json', 2), child('whole.json', 1)
    lines, _ = again.communicate(timeout=280)
    assert whole.communicate(timeout=280) and again.returncode == whole.returncode == 0
    assert 2 <= had < 11 and len(lines.splitlines()) == 11 - had
    def rows(card):
        found = read_comparison(tmp_path / card).rows
        return sorted(json.dumps({k: v for k, v in r.items() if k != 'seconds'}, sort_keys=True) for r in found)
    assert rows('cut.json') == rows('whole.json')
    assert not [p for p in Path(tmp_path / 'cut').glob('*')]   # folders of finished runs are gone


def test_a_side_that_diverged_gets_no_word():
    "One of its runs has no score"
    rows = [dict(kind=k, side='a', seed=s, on='test', changes={}, mAP=.2, images=8) for k in ('untrained', 'statistics') for s in range(3)]
    rows += [dict(kind='run', side='a', seed=s, on='test', changes={}, **(dict(error='inf') if s == 1 else dict(mAP=.5, images=8)))
             for s in range(3)]
    found = read_comparison(dict(name='comparison', metrics=dict(rows=rows), settings=dict(
        value='mAP', seeds=[0, 1, 2], sides={'a': {}}, simple=[], differ=[])))
    assert found.verdict('a') == 'not comparable'
