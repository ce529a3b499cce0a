"Launchers, started as a user types them, on the CPU: so many processes train one network, and what does not fit is refused."
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from children import STILL, finish, plain, start, start_world
from reidnb.training.loop import read_log

BIN = Path(sys.executable).parent
TRAIN = ('train baseline-small --data world:campus --train-people 8 --test-people 4 --no-before --no-report --epochs 1 '
         f'--p 4 --k 2 --optimizer {STILL["optimizer"]} --lr {STILL["lr"]}').split()
SAYS = {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'OMP_NUM_THREADS'}


def typed(*words, **env):
    "Run a command in a shell that knows of no launch and no GPU"
    clean = {k: v for k, v in os.environ.items() if k not in SAYS and not k.startswith(('ACCELERATE_', 'TORCHELASTIC_'))}
    clean |= {'PYTHONPATH': os.pathsep.join(x for x in sys.path if x), 'CUDA_VISIBLE_DEVICES': '', **env}
    return subprocess.run([*map(str, words)], env=clean, capture_output=True, text=True, timeout=300)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def torchrun(*words, **env):
    return typed(BIN / 'torchrun', '--standalone', '--nproc_per_node', 2, *words, **env)


def accelerate_launch(*words, **env):
    return typed(BIN / 'accelerate', 'launch', '--cpu', '--num_processes', 2, '--main_process_port', free_port(), *words, **env)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "The run in one process"
    out = tmp_path_factory.mktemp('one')
    r = typed(sys.executable, '-m', 'reidnb', *TRAIN, '--out', out)
    assert r.returncode == 0, r.stderr
    assert re.fullmatch(r'baseline-small on world:campus: 1 process on the CPU, \d+ threads?', r.stdout.splitlines()[0])
    return out


# torchrun takes `--p` for a beginning of one of its own options unless `--` stands before
@pytest.mark.parametrize('launch,module', [(torchrun, ('-m', '--', 'reidnb')), (accelerate_launch, ('-m', 'reidnb'))],
                         ids=['torchrun', 'accelerate'])
def test_two_processes_train_one_network(launch, module, one, tmp_path):
    r = launch(*module, *TRAIN, '--out', tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    said = r.stdout.splitlines()
    assert re.fullmatch(r'baseline-small on world:campus: 2 processes on the CPU, \d+ threads? each', said[0]), said[0]
    assert r.stdout.count('after training') == r.stdout.count('ReIDData') == 1
    assert 'OMP_NUM_THREADS/MKL_NUM_THREADS' not in r.stderr
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in one.iterdir()}
    a, b = plain(one), plain(tmp_path)
    assert [(x['epoch'], x.get('step')) for x in a] == [(x['epoch'], x.get('step')) for x in b]   # each row once
    steps = [(x, y) for x, y in zip(a, b) if 'lr' in x]
    assert len(steps) >= 3
    for x, y in steps:
        assert x.keys() == y.keys()
        for k in x: assert abs(x[k] - y[k]) <= 1e-4 * (1 + abs(x[k])), (k, x, y)
    assert sum(r['images'] for r in read_log(one) if 'images' in r) == sum(r['images'] for r in b if 'images' in r)


@pytest.mark.parametrize('env,words', [
    ({'WORLD_SIZE': '2'}, 'WORLD_SIZE=2 and not RANK'),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'mpirun started 2 processes'),
    ({'ACCELERATE_DYNAMO_BACKEND': 'NO', 'MASTER_ADDR': '127.0.0.1'}, 'use torchrun')], ids=['half', 'mpirun', 'no parent'])
def test_half_a_launch_is_refused(env, words, tmp_path):
    r = typed(sys.executable, '-m', 'reidnb', *TRAIN, '--out', tmp_path / 'run', **env)
    assert r.returncode == 2 and words in r.stderr, r.stderr
    assert not (tmp_path / 'run').exists()


JOIN = '''
import os, sys
from reidnb.core.distributed import describe_world, join_processes, relaunch
relaunch()
os.write(1, f'{join_processes()} {join_processes()} {describe_world()} {sys.argv[1:]}\\n'.encode())   # a line in one piece
'''


@pytest.mark.parametrize('how', ['file', 'option'])
def test_accelerate_is_read_from_its_file_or_its_words(how, tmp_path):
    script, config = tmp_path / 'join.py', tmp_path / 'config.yaml'
    script.write_text(JOIN)
    config.write_text('compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nmixed_precision: "no"\n'
                      'num_machines: 1\nnum_processes: 3\nmachine_rank: 0\nmain_training_function: main\n')
    words = ['--config_file', config] if how == 'file' else ['--cpu', '--num-processes=3']
    r = typed(BIN / 'accelerate', 'launch', *words, script, '--p', 4, OMP_NUM_THREADS='1')
    assert r.returncode == 0, r.stderr
    assert sorted(r.stdout.splitlines()) == [
        f"({k}, 3) ({k}, 3) 3 processes on the CPU, 1 thread each ['--p', '4']" for k in range(3)]


def test_threads_are_shared_unless_chosen(tmp_path):
    (tmp_path / 'join.py').write_text(JOIN)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    share = max(1, min(cores, psutil.cpu_count(logical=False) or cores) // 2)
    chosen = 1 if share > 1 or cores < 2 else 2
    for env, n in (({}, share), ({'OMP_NUM_THREADS': str(chosen)}, chosen)):
        r = torchrun(tmp_path / 'join.py', **env)
        assert r.returncode == 0, r.stderr
        assert r.stdout.count(f'2 processes on the CPU, {n} thread{"s" * (n > 1)} each') == 2, r.stdout


def refused(code, words, world=2):
    "Every process ends with a ValueError that holds these words"
    for p in start_world(['-c', code], world=world):
        err = p.communicate(timeout=300)[1]
        assert p.returncode == 1 and 'ValueError' in err and words in err, err[-2000:]


def test_a_group_of_another_size_is_refused(tmp_path):
    refused(f'''
import os, torch.distributed as dist
from reidnb.core.distributed import join_processes
dist.init_process_group('gloo', init_method='file://{tmp_path}/' + os.environ['RANK'], rank=0, world_size=1)
join_processes()
''', 'of 2, torch.distributed process 0 of 1')


def test_an_accelerator_that_sees_one_process_is_refused():
    refused('''
import os
del os.environ['ACCELERATE_USE_CPU']
from accelerate import Accelerator, PartialState
PartialState()   # sees no GPU: one process, and accelerate keeps that
from reidnb.core.distributed import accelerator_options, check_world, join_processes
join_processes()
check_world(Accelerator(**accelerator_options()))
''', 'accelerate says process 0 of 1')


def test_accelerate_sees_the_processes_that_were_joined():
    finish(start_world(['-c', '''
import os, sys, warnings
del os.environ['ACCELERATE_USE_CPU'], os.environ['OMP_NUM_THREADS']
warnings.simplefilter('error', UserWarning)   # accelerate's of threads
from reidnb.core.distributed import accelerator_options, check_world, join_processes
rank, world = join_processes()
from accelerate import Accelerator
acc = Accelerator(**accelerator_options())
check_world(acc)
assert (acc.process_index, acc.num_processes, acc.device.type) == (rank, 2, 'cpu') and world == 2
''']))


def test_a_lost_process_ends_in_an_error():
    "The second process lives and does not answer"
    first, second = start_world(['-c', '''
import time, torch
from reidnb.core.distributed import average_gradients, join_processes
rank, _ = join_processes()
if rank == 1: time.sleep(600)
p = torch.nn.Parameter(torch.zeros(3))
p.grad = torch.ones(3)
average_gradients([p])
'''], REIDNB_TIMEOUT='3')
    try:
        err = first.communicate(timeout=120)[1]
        assert first.returncode == 1 and 'imed out' in err, err[-2000:]
        assert second.poll() is None
    finally:
        second.kill()
        second.communicate()


GRADIENTS = '''
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from reidnb.core.distributed import average_gradients, broadcast_state, join_processes
rank, _ = join_processes()

# types, layouts and what is missing somewhere
shapes = [(3, 5), (7,), (0,), (), (2, 3, 4, 4), (5,), (6,)]
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    ps = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    for k, (p, s) in enumerate(zip(ps, shapes)): p.grad = (torch.arange(p.numel(), dtype=dtype).view(s) + k) * (1 + 2*rank)
    ps[4].grad = ps[4].grad.contiguous(memory_format=torch.channels_last)
    if rank == 0: ps[5].grad = None
    ps[6].grad = None
    average_gradients(p for p in ps)
    for k, (p, s) in enumerate(zip(ps[:6], shapes)):
        want = (torch.arange(p.numel(), dtype=dtype).view(s) + k) * (2 if k != 5 else 1.5)
        assert p.grad.dtype == dtype and torch.equal(p.grad, want), (dtype, k, p.grad, want)
    assert ps[6].grad is None

# many buckets, some with one large tensor: the numbers of a loop
torch.manual_seed(rank)
ps = [nn.Parameter(torch.zeros(n)) for n in (10, 7_000_000, 3_000_000, 4_000_000, 5)]
for p in ps: p.grad = torch.randn(p.shape)
want = [p.grad.clone() for p in ps]
for w in want: torch.distributed.all_reduce(w)
average_gradients(ps)
assert all(torch.equal(p.grad, w / 2) for p, w in zip(ps, want))

# what DistributedDataParallel makes
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8*36, 4))
ours, theirs = net(), net()
wrapped = DistributedDataParallel(theirs, broadcast_buffers=False)
torch.manual_seed(1 + rank)
x = torch.randn(4, 3, 8, 8)
ours(x).square().mean().backward(), wrapped(x).square().mean().backward()
average_gradients(ours.parameters())
for a, b in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)
'''


def test_gradients_are_averaged(): finish(start_world(['-c', GRADIENTS]))


STATE = '''
import torch
from torch import nn
from reidnb.core.distributed import broadcast_state, join_processes
rank, _ = join_processes()

class Net(nn.Module):
    def __init__(self, seed, n=3):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm, self.half, self.head = nn.BatchNorm2d(4), nn.Linear(3, 2).bfloat16(), nn.Linear(5, n)
        self.tied = self.head
        for name, x in dict(seen=torch.rand(9, generator=g) < .5, count=torch.randint(9, (4,), generator=g),
                            empty=torch.zeros(0), large=torch.rand(7_000_000, generator=g)).items():
            self.register_buffer(name, x, persistent=name != 'seen')
        with torch.no_grad():
            for p in self.parameters(): p.copy_(torch.randn(p.shape, generator=g))

net, first = Net(rank), Net(0)
places = {k: v.data_ptr() for k, v in net.state_dict().items()}
broadcast_state(net)
for (k, a), b in zip([*net.named_parameters(), *net.named_buffers()], [*first.parameters(), *first.buffers()]):
    assert torch.equal(a, b) and a.stride() == b.stride(), k
assert {k: v.data_ptr() for k, v in net.state_dict().items()} == places   # in place: an optimiser keeps its parameters
assert all(p.requires_grad and p.is_leaf for p in net.parameters())

for wrong, words in ((Net(0, 3 + rank), 'head.weight'), (nn.Linear(2, 2).to([torch.float32, torch.float16][rank]), 'weight'),
                     ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)][rank], 'bias')):
    before = [p.clone() for p in wrong.parameters()]
    try: broadcast_state(wrong)
    except ValueError as e: assert words in str(e) and 'in process 1' in str(e), e
    else: raise AssertionError('nothing was refused')
    assert all(map(torch.equal, before, wrong.parameters()))
'''


def test_the_first_process_gives_its_state(): finish(start_world(['-c', STATE]))


def test_python_runs_the_package():
    r = typed(sys.executable, '-m', 'reidnb', '--help')
    assert r.returncode == 0 and 'usage: reidnb ' in r.stdout


def test_the_module_loads_no_torch():
    "main sets what must be set before torch is there"
    finish(start(['-c', "import runpy, sys; runpy.run_module('reidnb', run_name='x'); assert 'torch' not in sys.modules"]))
