"bf16 on a CPU: the guard is on where it must be, in the loop too, its numbers are right, and it leaves nothing behind."
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reidnb.core.precision as P
from reidnb.networks.backbones import Encoder, make_backbone
from reidnb.data.toys import toy_crops
from reidnb.networks.extraction import extract
from reidnb.methods.baseline import Baseline, BaselineSettings
from reidnb.core.checkpoints import seed_everything
from reidnb.training.loop import fit, NonFiniteLoss

torch.set_num_threads(1)
SMALLEST = [((8, 64, 4, 2), 64, 3, 2), ((8, 64, 4, 2), 128, 1, 2), ((1, 32, 2, 2), 32, 3, 2), ((8, 64, 4, 1), 64, 3, 2),
            ((1, 16, 1, 1), 16, 3, 2), ((2, 16, 2, 1), 16, 3, 2), ((2, 16, 4, 3), 16, 7, 4), ((2, 16, 4, 2), 16, 3, 3)]


class Convolutions(TorchDispatchMode):
    "Every convolution that reaches the kernels: forward or backward, type, shapes of input and weights, stride"
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if 'convolution' in str(op):
            back = 'backward' in str(op)
            x, w, stride = (args[1], args[2], args[4]) if back else (args[0], args[1], args[3])
            self.seen.append((back, x.dtype, x, w, stride))
        return op(*args, **(kwargs or {}))


def toy(**k):
    s = BaselineSettings(backbone='small', weights='none', height=64, width=32, p=4, k=2, epochs=1, warmup=1, steps=(),
                         **{'precision': 'bf16', **k})
    seed_everything(0)
    return Baseline(s, toy_crops(n_ids=8, n_cams=2, n_each=2))


@pytest.fixture
def amx(monkeypatch):
    "A processor with AMX, as far as the guard can tell, in a process that has told nobody yet"
    monkeypatch.setattr(P, 'has_amx', lambda: True)
    monkeypatch.setattr(P, '_limit', '')
    P._tell.cache_clear()
    yield
    P._tell.cache_clear()


@pytest.mark.filterwarnings('ignore:bf16 convolutions')
def test_fit_with_amx_has_no_bf16_convolution(amx, tmp_path):
    "Forward and backward; without the guard they are bf16 on any machine, so this fails where it is taken away"
    with Convolutions() as c: fit(toy(), tmp_path, progress=False)
    assert {back for back, *_ in c.seen} == {False, True}
    assert {dtype for _, dtype, *_ in c.seen} == {torch.float32}


def test_fit_without_amx_has_no_narrow_bf16_convolution(monkeypatch, tmp_path):
    monkeypatch.setattr(P, 'has_amx', lambda: False)
    with Convolutions() as c: fit(toy(), tmp_path, progress=False)
    for back in (False, True):
        narrow = {dtype for b, dtype, x, w, s in c.seen if b == back and P.is_narrow(x, w, s)}
        wide = {dtype for b, dtype, x, w, s in c.seen if b == back and not P.is_narrow(x, w, s)}
        assert narrow == {torch.float32} and wide == {torch.bfloat16}


def test_a_limit_of_the_environment_gives_the_speed_back(amx, monkeypatch, tmp_path):
    "Below AMX the wide convolutions stay bf16, and nothing is said"
    monkeypatch.setattr(P, '_limit', 'AVX512_CORE_BF16')
    with Convolutions() as c, warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(toy(), tmp_path, progress=False)
    assert {dtype for *_, dtype, x, w, s in [(b, d, x, w, s) for b, d, x, w, s in c.seen] if not P.is_narrow(x, w, s)} == {torch.bfloat16}


@pytest.mark.parametrize('value, allowed', [('', True), ('avx512_core_bf16', False)])
def test_the_environment_is_read_at_the_start(value, allowed):
    "And not later: oneDNN would not see it either"
    code = ('import os, reidnb.core.precision as P; P.has_amx = lambda: True; a = P.amx_allowed(); '
            'os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"; print(a, P.amx_allowed())')
    env = {k: v for k, v in os.environ.items() if k not in ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA')}
    r = subprocess.run([sys.executable, '-c', code], env=env | {'ONEDNN_MAX_CPU_ISA': value}, capture_output=True, text=True, check=True)
    assert r.stdout.split() == [str(allowed)]*2


def test_the_command_line_sets_the_limit_before_torch():
    "Before a command loads torch; and not when torch is there already: too late for oneDNN"
    env = {k: v for k, v in os.environ.items() if k != 'ONEDNN_MAX_CPU_ISA'}
    def run(first):
        code = (f'{first}import os, sys\nfrom reidnb.practice.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\n'
                'print(os.environ.get("ONEDNN_MAX_CPU_ISA"), "torch" in sys.modules)')
        out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
        return out.split()[-2:]
    assert run('') == ['AVX512_CORE_BF16', 'False']
    assert run('import torch\n') == ['None', 'True']


def test_it_is_said_once(amx):
    with pytest.warns(UserWarning, match='ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 before Python starts') as said:
        for _ in range(3):
            with P.safe_bf16('cpu', 'bf16'): pass
    assert len(said) == 1


@pytest.mark.filterwarnings('ignore:bf16 convolutions')
def test_afterwards_all_is_as_before(amx):
    "Also after an exception, and where it is nested"
    net, x = torch.nn.Conv2d(4, 8, 3), torch.randn(2, 4, 9, 9)
    def types():
        with Convolutions() as c, torch.autocast('cpu', torch.bfloat16): net(x)
        return [d for _, d, *_ in c.seen]
    before = types()
    with pytest.raises(KeyError), P.safe_bf16('cpu', 'bf16'):
        with P.safe_bf16('cpu', 'bf16'): assert types() == [torch.float32]
        assert types() == [torch.float32]
        raise KeyError
    assert types() == before == [torch.bfloat16]
    for args in (('cpu', 'no'), ('cpu', 'fp16'), ('cuda', 'bf16'), ('cpu',)):
        with P.safe_bf16(*args): assert types() == before


@pytest.mark.filterwarnings('ignore:bf16 convolutions')
def test_extract_under_autocast_is_guarded(amx):
    encoder, crops = Encoder(make_backbone('small')), toy_crops(4, n_cams=2, n_each=1)
    with Convolutions() as c, torch.autocast('cpu', torch.bfloat16): f = extract(encoder, crops, height=64, width=32)
    assert c.seen and {d for _, d, *_ in c.seen} == {torch.float32}
    assert F.cosine_similarity(f, extract(encoder, crops, height=64, width=32)).min() > .99


@pytest.mark.parametrize('shape, out, kernel, stride', SMALLEST)
def test_the_smallest_convolutions_are_right(shape, out, kernel, stride):
    """Hundreds of runs on whatever this machine is; unguarded, the first is wrong now and then with AMX (forward), and the
    fourth to the last with AVX-512 (gradient by the weights). Memory is made dirty in between."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(shape, generator=g), torch.randn(out, shape[1], kernel, kernel, generator=g)/(shape[1]*kernel**2)**.5
    x, w = x.bfloat16().float(), w.bfloat16().float()
    dy = torch.randn(F.conv2d(x, w, stride=stride, padding=kernel//2).shape, generator=g).bfloat16().float()
    def run(x, w):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = F.conv2d(x, w, stride=stride, padding=kernel//2)
        y.backward(dy.to(y.dtype))
        return y.detach(), x.grad, w.grad
    want = run(x.double(), w.double())
    for i in range(400):
        junk = [torch.full((2**k,), 1e30*(-1)**i) for k in (9, 12, 15, 18)]
        del junk
        with torch.autocast('cpu', torch.bfloat16), P.safe_bf16(): got = run(x, w)
        assert got[0].dtype == torch.bfloat16
        for a, b in zip(want, got): assert (a - b.double()).abs().max() < .01*a.abs().max(), i


def test_every_argument_of_a_convolution_passes(amx):
    "Names, groups, padding in words, one and three dimensions, no bias, bf16 weights without autocast"
    g = torch.Generator().manual_seed(0)
    def draw(*s): return torch.randn(*s, generator=g)
    cases = [(F.conv2d, (draw(2, 4, 5, 4), draw(6, 2, 3, 3)), dict(stride=2, padding=1, groups=2)),
             (F.conv2d, (draw(2, 4, 5, 4), draw(6, 4, 3, 3), draw(6)), dict(padding='same', dilation=2)),
             (F.conv1d, (draw(2, 4, 5), draw(6, 4, 3), draw(6), 2, 1), {}), (F.conv3d, (draw(1, 2, 3, 3, 3), draw(2, 2, 2, 2, 2)), dict(stride=(1, 1, 2))),
             (F.conv2d, (draw(4, 5, 4), draw(6, 4, 3, 3)), {})]
    for every in (True, False):
        for f, args, k in cases:
            with P._Float32Convs(every), torch.autocast('cpu', torch.bfloat16): got = f(*args, **k)
            assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), f(*args, **k), atol=.1, rtol=.02)
            half = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args]
            with P._Float32Convs(every): assert f(*half, **k).dtype == torch.bfloat16
            with P._Float32Convs(every): assert torch.equal(f(*args, **k), f(*args, **k)) and f(*args, **k).dtype == torch.float32


def test_a_broken_variance_is_never_saved(tmp_path):
    class Broken(Baseline):
        def after_batch(self, batch):
            super().after_batch(batch)
            next(b for k, b in self.named_buffers() if k.endswith('running_var'))[0] = float('inf')
    m = Broken(toy(precision='no').settings, toy_crops(n_ids=8, n_cams=2, n_each=2))
    with pytest.raises(NonFiniteLoss, match='running_var'): fit(m, tmp_path, progress=False)
    assert not (tmp_path / 'checkpoint.pt').exists() and not (tmp_path / 'model.safetensors').exists()
