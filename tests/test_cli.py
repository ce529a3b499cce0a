"The command line in processes of its own: exit statuses, one-line errors, Ctrl-C and resume, a disk that is full."
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from reidnb.training.loop import read_log

RUN = [sys.executable, '-m', 'reidnb.practice.cli']
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
SMALL = ['train', 'baseline-small', '--data', 'world:campus', '--train-people', '10', '--test-people', '6',
         '--height', '64', '--width', '32', '--p', '4', '--no-before', '--weights', 'none']


def run(*args, **kw): return subprocess.run([*RUN, *map(str, args)], capture_output=True, text=True, env=ENV, timeout=300, **kw)


def test_train_then_eval_and_search(tmp_path):
    r = run(*SMALL, '--epochs', 2, '--out', tmp_path / 'run')
    assert r.returncode == 0, r.stderr[-2000:]
    assert 'after training' in r.stdout and 'mAP' in r.stdout
    assert {'model.safetensors', 'log.jsonl', 'card.json', 'report.html'} <= {p.name for p in (tmp_path / 'run').iterdir()}
    e = run('eval', tmp_path / 'run', '--data', 'world:campus', '--train-people', 10, '--test-people', 6)
    assert e.returncode == 0, e.stderr[-2000:]
    score = r.stdout.split('after training')[1].split('|')[0].strip()
    assert score in e.stdout, 'eval prints the score that training printed'


@pytest.mark.parametrize('args,word', [
    (['train', 'baseline-small', '--data', 'no/such/folder'], 'no/such/folder'),
    (['train', 'baseline-small', '--data', 'marked1501'], 'market1501'),
    (['search', 'none.jpg', '--gallery', 'nowhere'], 'none.jpg'),
    (['eval', 'runs/none'], 'runs/none'),
    (['world', '--site', 'camps'], 'campus'),
])
def test_an_error_is_one_line(args, word, tmp_path):
    r = run(*args, cwd=tmp_path)
    assert r.returncode == 2 and word in r.stderr and 'Traceback' not in r.stderr
    assert r.stderr.startswith('reidnb: ') and r.stderr.count('\n') == 1


def test_unknown_recipe_lists_those_there_are(tmp_path):
    r = run('train', 'icee', cwd=tmp_path)
    assert r.returncode == 2 and 'baseline-small' in r.stderr + r.stdout


def test_help_tells_what_each_option_means(tmp_path):
    r = run('train', 'baseline-small', '--help', cwd=tmp_path)
    text = ' '.join(r.stdout.replace('│', ' ').split())
    for words in ('`world:SITE`, a dataset', 'by default `runs/RECIPE-DATA`', 'Label smoothing'): assert words in text, words


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    args = [*RUN, *SMALL, '--epochs', '4000', '--decay', 'none', '--out', str(tmp_path / 'run'), '--no-report']
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a shell's `&` ignores it
    deadline = time.time() + 120
    while not (tmp_path / 'run' / 'checkpoint.pt').exists() and time.time() < deadline: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and 'goes on' in err and 'Traceback' not in err
    done = sum('images' in row for row in read_log(tmp_path / 'run'))
    assert 1 <= done < 4000
    args[args.index('4000')] = str(done + 2)
    r = subprocess.run(args, capture_output=True, text=True, env=ENV, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    assert [row['epoch'] for row in read_log(tmp_path / 'run') if 'images' in row] == list(range(done + 2))


def test_full_disk_is_one_line(tmp_path):
    "No file may grow beyond 100 kB: the first checkpoint cannot be written"
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    r = run(*SMALL, '--epochs', 2, '--out', tmp_path / 'run', preexec_fn=limit)
    assert r.returncode == 2 and 'cannot write' in r.stderr and 'Traceback' not in r.stderr
    assert not list((tmp_path / 'run').glob('*.part'))


def test_plain_folder_of_crops(tmp_path):
    "One sub-folder a person, one below it a camera: train, then search one image in it"
    from reidnb.world.sites import make_site
    crops = make_site('campus', n_train=12, n_test=2, height=64, width=32).train
    for i in range(len(crops)):
        p = tmp_path / 'crops' / f'anna{crops.pids[i]}' / f'door{crops.cams[i]}' / f'{i}.jpg'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(crops.images[i])
    args = ['train', 'baseline-small', '--data', tmp_path / 'crops', '--height', 64, '--width', 32, '--p', 4, '--epochs', 1,
            '--weights', 'none', '--no-before', '--no-report', '--out', tmp_path / 'run']
    r = run(*args, cwd=tmp_path)
    assert r.returncode == 0 and 'mAP' in r.stdout, r.stderr[-2000:]
    query = next((tmp_path / 'crops').rglob('*.jpg'))
    s = run('search', query, '--gallery', tmp_path / 'crops', '--model', tmp_path / 'run', '--k', 4, '--per', 'camera')
    assert s.returncode == 0 and s.stdout.count('.jpg') == 1 + min(4, crops.n_cams), s.stdout + s.stderr[-2000:]
    assert query.name in s.stdout.splitlines()[-min(4, crops.n_cams)], 'the image itself is its nearest'


def test_unlabelled_folder_says_what_is_missing(tmp_path):
    from reidnb.data.toys import toy_crops
    (tmp_path / 'flat').mkdir()
    for i, data in enumerate(toy_crops().images): (tmp_path / 'flat' / f'{i}.jpg').write_bytes(data)
    r = run('train', 'baseline-small', '--data', tmp_path / 'flat', cwd=tmp_path)
    assert r.returncode == 2 and 'label' in r.stderr and r.stderr.count('\n') == 1


def test_a_folder_of_unlabelled_crops_with_and_without_cameras(tmp_path):
    from reidnb.practice.cli import DataOptions
    from reidnb.data.toys import toy_crops
    crops = toy_crops(4, n_cams=3)
    for i, image in enumerate(crops.images):
        for path in (tmp_path / 'cams' / f'camera{crops.cams[i]}', tmp_path / 'flat'):
            path.mkdir(parents=True, exist_ok=True)
            (path / f'{i}.jpg').write_bytes(image)
    flat, cams = (DataOptions(data=str(tmp_path / k), layout=v).open().train for k, v in dict(flat='', cams='camera').items())
    assert len(flat) == len(cams) == 24 and not flat.labelled and not cams.labelled
    assert not flat.has_cams and cams.n_cams == 3
