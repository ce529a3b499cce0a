"The loop of training where it is easily wrong: resuming, turns, scaling, selection, wrong use, and faults that a check must see."
import dataclasses
import subprocess
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import reidnb.training.loop as loop
from toy_method import Toy
from reidnb.core.checkpoints import seed_everything
from reidnb.core.distributed import gather
from reidnb.data.crops import UNKNOWN, ReIDData
from reidnb.data.samplers import FixedLength, ShuffleSampler
from reidnb.data.splits import reserve
from reidnb.data.toys import toy_crops
from reidnb.methods.baseline import Baseline
from reidnb.networks.teacher import EMATeacher
from reidnb.practice import experiments
from reidnb.training import conformance
from reidnb.training.conformance import CHECKS, check_method, small_settings
from reidnb.training.loop import fit, read_log
from reidnb.training.method import Method
from reidnb.training.turns import Turns

QUICK = tuple(k for k in CHECKS if k not in ('tables', 'processes'))


def bug(*values, why):
    "A case that failed once, and why"
    return pytest.param(*values, id=getattr(values[0], '__name__', None))


@pytest.fixture(autouse=True)
def _one_thread():
    "Small networks: one thread, and no warning about poor tables"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
    torch.set_num_threads(threads)


class Pair(Method):
    "Two turns with a module each"
    turns = 'a', 'b'

    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        if crops is not None: self.data = self.loader(ShuffleSampler(len(crops), 8, seed=settings.seed))

    def inputs(self, batch):
        "Mean colours"
        return batch.images.mean((2, 3))

    def epoch(self, n): return self.batches(self.data, n)
    def loss(self, batch, turn): return {'square': (getattr(self, turn)(self.inputs(batch)) - 1).square().mean()}


def build(cls, crops=None, **changes):
    "A method from its seed"
    s = small_settings(cls, **changes)
    seed_everything(s.seed)
    return cls(s, toy_crops(n_ids=8, n_cams=2, n_each=3) if crops is None else crops)


# Resuming

class SkipsEpochs(Pair):
    "One turn rests in every second epoch"
    def loss(self, batch, turn): return {} if turn == 'b' and self.n % 2 == 0 else super().loss(batch, turn)


class RenewsOne(Pair):
    "One optimiser begins anew at the beginning of an epoch, the other at its end"
    def epoch(self, n):
        if n == 1: self.renew('b')
        yield from super().epoch(n)
        if n == 1: self.renew('a')


class RenewsAtEnd(Toy):
    "A new head when an epoch has ended"
    def epoch(self, n):
        yield from super().epoch(n)
        self.head = nn.Linear(8, 8)
        self.renew()


class RenewsInside(Toy):
    "A new head after some batches"
    def after_batch(self, batch):
        if batch.index[0] % 2: self.head = nn.Linear(8, 8); self.renew()


class Staged(Toy):
    "Another optimiser and another rate in the second stage"
    def epoch(self, n):
        if n == 1: self.stage = 'two'; self.renew()
        return super().epoch(n)
    def optimizer(self):
        return torch.optim.SGD(self.parameters(), .01, momentum=.9) if self.stage else torch.optim.Adam(self.parameters(), 1e-3)
    def rate(self, n): return .5 if self.stage else 1.


class FreezesAndThaws(Toy):
    "Frozen for an epoch, with new optimisers"
    def epoch(self, n):
        if n == 1: self.freeze('net'); self.renew()
        if n == 2: self.freeze('net', on=False); self.renew()
        return super().epoch(n)


class Tied(Toy):
    "One tensor under two names"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.tie(4)
    def tie(self, n):
        "Two layers of one weight"
        self.down, self.up = nn.Linear(8, n, bias=False), nn.Linear(8, n, bias=False)
        self.up.weight = self.down.weight
    def features(self, batch):
        f = super().features(batch)
        return f + F.linear(self.down(f), self.up.weight.T)


class HeadsInDict(Toy):
    "One head more each epoch; `before_load` makes them"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.heads = nn.ModuleDict()
    def epoch(self, n):
        self.heads[str(n)] = nn.Linear(8, 8)
        self.renew()
        return super().epoch(n)
    def before_load(self, state):
        for k in state:
            name = k.split('.')[1] if k.startswith('heads.') else ''
            if name and name not in self.heads: self.heads[name] = nn.Linear(8, 8)
    def loss(self, batch):
        f = self.features(batch)
        return super().loss(batch) | {k: F.cross_entropy(h(f), self.labels[batch.index]) for k, h in self.heads.items()}


class GrowingMemory(Toy):
    "A buffer with a row more each epoch"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.register_buffer('memory', torch.ones(1, 8))
    def epoch(self, n):
        if n != 1: self.memory = torch.cat([self.memory, torch.rand(1, 8)])
        return super().epoch(n)
    def loss(self, batch): return super().loss(batch) | {'near': (self.features(batch) @ self.memory.T).square().mean()}


class BornEmpty(Toy):
    "A buffer that is None until the first epoch"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.register_buffer('memory', None)
    def epoch(self, n):
        if n == 0: self.memory = torch.rand(8)
        return super().epoch(n)
    def loss(self, batch): return super().loss(batch) | {'mean': (self.features(batch) * self.memory).mean()}


class OtherType(Toy):
    "An empty buffer of floats takes whole numbers"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.register_buffer('found', torch.zeros(0))
    def epoch(self, n):
        if n == 0: self.found = self.labels.clone()
        return super().epoch(n)
    def loss(self, batch): return {'ce': F.cross_entropy(self.head(self.features(batch)), self.found[batch.index])}


class FreezesOnly(Toy):
    "Frozen in an epoch; the optimiser, which holds the module, goes on"
    def epoch(self, n):
        if n == 1: self.freeze('net')
        return super().epoch(n)


class AllButOne(Toy):
    "A part of what is frozen learns"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.body = nn.ModuleDict(dict(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    def features(self, batch): return self.body['b'](self.body['a'](super().features(batch)))
    def epoch(self, n):
        if n == 0: self.freeze('body'); self.freeze('body.b', on=False); self.renew()
        return super().epoch(n)


class NoGradient(Toy):
    "One parameter stops learning without `freeze`"
    def epoch(self, n):
        if n == 0: self.net.bias.requires_grad_(False); self.renew()
        return super().epoch(n)


class TiedGrows(Tied):
    "One tensor under two names, made anew with another size"
    def epoch(self, n):
        if n == 0: self.tie(6); self.renew()
        return super().epoch(n)


class NormGrows(Toy):
    "A layer norm made anew with another size"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.up, self.norm = nn.Linear(8, 4), nn.LayerNorm(4)
    def epoch(self, n):
        if n == 0: self.up, self.norm = nn.Linear(8, 6), nn.LayerNorm(6); self.renew()
        return super().epoch(n)
    def loss(self, batch): return super().loss(batch) | {'n': self.norm(self.up(self.features(batch)))[:, 0].square().mean()}


class FactsOnce(Toy):
    "Says something about the first epoch only"
    def epoch(self, n):
        if n == 0: self.facts = {'clusters': 5}
        return super().epoch(n)


class Counter(nn.Module):
    "A count that torch itself keeps in a state"
    n = 0
    def get_extra_state(self): return {'n': self.n}
    def set_extra_state(self, state): self.n = state['n']


class ExtraState(Toy):
    "A module with a state that is no tensor"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.counter = Counter()
    def after_batch(self, batch): self.counter.n += 1
    def loss(self, batch): return {k: v * (1 + .1 * self.counter.n) for k, v in super().loss(batch).items()}


@pytest.mark.parametrize('cls,changes', [
    (Toy, dict(accumulate=4)), (Toy, dict(accumulate=4, optimizer='sgd')), (Toy, dict(precision='bf16', accumulate=4)),
    (Toy, dict(optimizer='amsgrad', clip=.1)), (SkipsEpochs, dict(optimizer='amsgrad', accumulate=4)),
    (RenewsOne, dict(optimizer='amsgrad')), (RenewsOne, dict(optimizer='sgd')), (RenewsAtEnd, dict(accumulate=4)),
    (RenewsInside, {}), (RenewsInside, dict(accumulate=2)), (Staged, {}), (FreezesAndThaws, {}), (Tied, {}), (HeadsInDict, {}),
    (GrowingMemory, {}),
    bug(BornEmpty, {}, why='fit_sizes passes over a buffer that is None: the state has a name too many'),
    bug(OtherType, {}, why='fit_sizes keeps the old type: whole numbers come back as floats'),
    bug(FreezesOnly, {}, why='the optimiser is built without what is frozen, its state is of all'),
    bug(AllButOne, {}, why='a checkpoint knows names of frozen modules, not which parameters learn'),
    bug(NoGradient, {}, why='a checkpoint knows names of frozen modules, not which parameters learn'),
    bug(TiedGrows, {}, why='fit_sizes makes two tensors of one'),
    bug(NormGrows, {}, why='fit_sizes leaves normalized_shape of a LayerNorm'),
    bug(FactsOnce, {}, why='facts of an earlier epoch stay until something else is said; a resumed run has none'),
])
def test_resumed_as_if_never_stopped(cls, changes):
    found, = check_method(cls, small_settings(cls, **changes), only=('resumes',), raises=False)
    assert found.ok, found.note


def test_a_state_that_is_no_tensor_is_refused():
    found, = check_method(ExtraState, only=('resumes',), raises=False)
    assert not found.ok and '_extra_state' in found.note and 'keep it as a buffer' in found.note


def test_the_scale_of_half_precision_is_resumed(monkeypatch, tmp_path):
    "Gradients scaled on the CPU: the scale doubles every fourth step, and the count of steps since then is kept"
    class Scaled(loop.Accelerator):
        "With a gradient scaler that the CPU has"
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler('cpu', init_scale=4., growth_interval=4)
    monkeypatch.setattr(loop, 'Accelerator', Scaled)
    found, = check_method(Toy, only=('resumes',), raises=False)
    assert found.ok, found.note
    fit(build(Toy), tmp_path, progress=False)
    assert torch.load(tmp_path / 'checkpoint.pt')['scaler'] | dict(_growth_tracker=2, scale=4. * 2 ** 4) == \
        torch.load(tmp_path / 'checkpoint.pt')['scaler']


def test_a_finished_run_is_only_read(tmp_path):
    one, two = build(RenewsAtEnd), build(RenewsAtEnd)
    log = fit(one, tmp_path, progress=False)
    before = (tmp_path / 'checkpoint.pt').read_bytes()
    assert fit(two, tmp_path, progress=False) == log == read_log(tmp_path)
    assert (tmp_path / 'checkpoint.pt').read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_more_epochs_go_on(tmp_path):
    fit(build(Staged, epochs=2), tmp_path / 'a', progress=False)
    more, whole = build(Staged, epochs=4), build(Staged, epochs=4)
    fit(more, tmp_path / 'a', progress=False), fit(whole, tmp_path / 'b', progress=False)
    assert all(torch.equal(a, b) for a, b in zip(more.state_dict().values(), whole.state_dict().values()))
    with pytest.raises(ValueError, match='4 epochs, 3 are asked for'): fit(build(Staged, epochs=3), tmp_path / 'a', progress=False)


def test_a_trained_object_goes_on_and_leaves_a_checkpoint_for_a_new_one(tmp_path):
    class Grows(Toy):
        "A larger head in the second epoch"
        def epoch(self, n):
            if n == 1: self.head = nn.Linear(8, 9); self.renew()
            return super().epoch(n)
    m = build(Grows, epochs=2)
    fit(m, tmp_path, progress=False)
    m.settings = dataclasses.replace(m.settings, epochs=3)
    fit(m, tmp_path, progress=False)
    assert fit(build(Grows, epochs=4), tmp_path, progress=False)[-1]['epoch'] == 3


# What learns

def test_thawing_leaves_alone_what_did_not_learn_before():
    m = build(Baseline)
    fixed = [k for k, p in m.named_parameters() if not p.requires_grad]
    assert fixed == ['encoder.neck.bias']
    m.freeze('encoder')
    m.freeze('encoder', on=False)
    assert [k for k, p in m.named_parameters() if not p.requires_grad] == fixed


def test_a_new_optimiser_has_no_gradient_of_the_past():
    m = build(Toy)
    t = Turns(m)
    t.backward('all', m.net.weight.sum())
    m.renew()
    t.renew('all')
    assert not t.waiting and m.net.weight.grad is None


def steps(scaler, accumulate, n=2):
    "Gradients of each turn of `Pair` as its steps meet them"
    m, seen, x = build(Pair), {'a': [], 'b': []}, torch.ones(4, 3)
    t = Turns(m, scaler=scaler)
    def note(optimizer, *_):
        turn = next(k for k, o in t.optimizers.items() if o is optimizer)
        seen[turn].append(optimizer.param_groups[0]['params'][0].grad.clone())
    hook = register_optimizer_step_pre_hook(note)
    try:
        for i in range(n):
            for turn in m.turns:
                t.backward(turn, (getattr(m, turn)(x) - 1).square().mean(), 1 / accumulate)
                if (i + 1) % accumulate == 0: t.step(turn)
    finally: hook.remove()
    return seen


@pytest.mark.parametrize('accumulate', [1, bug(2, why='the scale grows after turn a, before b divides by it')])
def test_a_scale_changes_no_gradient_of_several_turns(accumulate):
    scaler = torch.amp.GradScaler('cpu', init_scale=4., growth_interval=1)
    plain, scaled = steps(None, accumulate), steps(scaler, accumulate)
    for turn in plain:
        assert len(plain[turn]) == 2 // accumulate == len(scaled[turn])
        for x, y in zip(plain[turn], scaled[turn]): assert torch.allclose(x, y), turn


def test_a_parameter_of_two_turns_is_refused_or_kept_apart():
    class Shared(Pair):
        "A module that both turns move"
        def __init__(self, settings, crops=None):
            super().__init__(settings, crops)
            self.base = nn.Linear(3, 3)
        def inputs(self, batch): return self.base(super().inputs(batch))
        def optimizer(self, turn): return self.new_optimizer(self.param_groups(getattr(self, turn), self.base))
    found, = check_method(Shared, only=('accumulates',), raises=False)
    assert found.ok or 'base' in found.note, found.note


def test_a_turn_moves_its_own_parameters_only():
    m = build(Pair)
    t = Turns(m)
    loss = sum(p.sum() for p in m.parameters())
    t.backward('a', loss)
    assert all(p.grad is not None for p in m.a.parameters()) and all(p.grad is None for p in m.b.parameters())


# Selection

class Grown(Toy):
    "A feature with a number more each epoch; the model file holds its layer"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.out = nn.Linear(8, 2)
    def epoch(self, n):
        self.out = nn.Linear(8, 3 + n)
        self.renew()
        return super().epoch(n)
    def embed(self, images): return F.normalize(self.out(super().embed(images)), dim=1)
    def loss(self, batch): return super().loss(batch) | {'size': self.out(self.features(batch)).square().mean()}


class NewHead(Toy):
    "A head with a class more each epoch, which the model file leaves out"
    def epoch(self, n):
        self.head = nn.Linear(8, 8 + n)
        self.renew()
        return super().epoch(n)


@pytest.mark.parametrize('cls', [Toy, NewHead, bug(Grown, why='the best weights have other sizes than the last: lost after training')])
def test_the_best_epoch_is_given_back(cls, tmp_path, monkeypatch):
    maps, score = iter([.9, .2, .1]), loop.score
    monkeypatch.setattr(loop, 'score', lambda method, val: dataclasses.replace(score(method, val), mAP=next(maps)))
    used, val = reserve(ReIDData(train=toy_crops(n_ids=12, n_cams=2, n_each=2), name='toy'), .3, 0)
    kept, m = [], build(cls, used.train, select='holdout', holdout=.3, eval_every=1)
    save = loop.save_model
    def saved(method, path):
        kept.append({k: v.clone() for k, v in method.state_dict().items() if not k.startswith(cls.training_only)})
        return save(method, path)
    monkeypatch.setattr(loop, 'save_model', saved)
    fit(m, tmp_path, val=val, progress=False)
    assert len(kept) == 2 and all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())
    again = build(cls, used.train, select='holdout', holdout=.3, eval_every=1)
    fit(again, tmp_path, val=val, progress=False)
    assert all(torch.equal(v, kept[0][k]) for k, v in again.state_dict().items() if k in kept[0])
    file = load_file(tmp_path / 'model.safetensors')
    assert file.keys() == kept[0].keys() and all(torch.equal(v, kept[0][k]) for k, v in file.items())


# Wrong use: an error from this package that names what is wrong

def made(name, base=Toy, **members):
    "A method with some functions replaced"
    return type(name, (base,), dict(__doc__=name, **members))


def _drawn_loader(self, settings, crops=None):
    Toy.__init__(self, settings, crops)
    self.data = self.loader([[0, 1, 2, 3], [4, 5, 6, 7]])


def _two_terms(extra): return lambda self, batch: Toy.loss(self, batch) | {'more': extra(self, batch)}


WRONG = {   # name -> (class, words of the message)
    'unknown_turn': (made('M', epoch=lambda s, n: s.renew('critic')), 'no turn .*critic.*all'),
    'old_optimiser': (made('M', epoch=lambda s, n: (setattr(s, 'head', nn.Linear(8, 8)), Toy.epoch(s, n))[1]), 'self.renew'),
    'foreign_tensor': (made('M', optimizer=lambda s: torch.optim.SGD([nn.Parameter(torch.zeros(2)), *s.parameters()], .1)),
                       '1 tensors that are not in M'),
    'turn_without_module': (made('M', Pair, turns=('a', 'critic')), 'no module .*critic.*override optimizer'),
}
MUTE = {
    'optimizer_none': (made('M', optimizer=lambda s: None), 'optimizer'),
    'loss_tensor': (made('M', loss=lambda s, b: Toy.loss(s, b)['ce']), 'loss.*dict'),
    'loss_none': (made('M', loss=lambda s, b: None), 'loss'),
    'loss_empty': (made('M', loss=lambda s, b: {}), 'nothing was trained|no step'),
    'loss_float': (made('M', loss=_two_terms(lambda s, b: .5)), "'more'"),
    'loss_vector': (made('M', loss=_two_terms(lambda s, b: s.features(b).mean(1))), "'more'"),
    'loss_of_one': (made('M', loss=_two_terms(lambda s, b: s.features(b).mean()[None])), "'more'"),
    'loss_detached': (made('M', loss=lambda s, b: {'ce': Toy.loss(s, b)['ce'].detach()}), "gradient"),
    'epoch_none': (made('M', epoch=lambda s, n: None), 'epoch'),
    'epoch_of_pairs': (made('M', epoch=lambda s, n: s.data), 'Batch'),
    'facts_tensor': (made('M', epoch=lambda s, n: (setattr(s, 'facts', {'r': torch.tensor(1.)}), Toy.epoch(s, n))[1]), 'facts'),
    'facts_nan': (made('M', epoch=lambda s, n: (setattr(s, 'facts', {'r': float('nan')}), Toy.epoch(s, n))[1]), 'facts'),
    'facts_reserved': (made('M', epoch=lambda s, n: (setattr(s, 'facts', {'loss': 1.}), Toy.epoch(s, n))[1]), 'facts'),
    'term_reserved': (made('M', loss=lambda s, b: {'loss': Toy.loss(s, b)['ce'], 'more': s.net.weight.mean()}), "'loss'"),
    'freeze_unknown': (made('M', epoch=lambda s, n: s.freeze('bn', 'nothing')), 'freeze|no module'),
    'freeze_parameter': (made('M', epoch=lambda s, n: s.freeze('net.weight')), 'freeze|no module'),
    'freeze_itself': (made('M', epoch=lambda s, n: s.freeze('')), 'freeze|no module'),
    'freeze_all': (made('M', epoch=lambda s, n: (s.freeze('net', 'bn', 'head'), s.renew(), Toy.epoch(s, n))[2]), 'frozen|learns|trains'),
    'freeze_turn': (made('M', Pair, epoch=lambda s, n: (s.freeze('b'), s.renew(), Pair.epoch(s, n))[2]), "'b'"),
    'sampler_list': (made('M', __init__=_drawn_loader), 'sampler'),
    'rate_none': (made('M', rate=lambda s, n: None), 'rate'),
    'turns_text': (made('M', Pair, turns='critic'), 'turns'),
}


@pytest.mark.parametrize('cls,words', [pytest.param(*v, id=k) for k, v in WRONG.items()] + [
    pytest.param(*v, id=k) for k, v in MUTE.items()])
def test_wrong_use_is_told(cls, words, tmp_path):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=f'(?s){words}') as e:
        fit(build(cls, epochs=1), tmp_path, progress=False)
    assert f'{Path("reidnb") / "training"}' in traceback.extract_tb(e.value.__traceback__)[-1].filename


def test_a_freeze_that_fails_leaves_nothing_half_frozen():
    m = build(Toy)
    with pytest.raises((AttributeError, ValueError)): m.freeze('bn', 'nothing')
    assert not m.frozen and m.bn.weight.requires_grad


# Two tables

class Two(Toy):
    "Learns people of the source, reads crops beside them"
    def __init__(self, settings, crops=None, source=None):
        super().__init__(settings, crops)
        self.source = source
        if crops is None: return
        if source is None: raise ValueError('a source is needed')
        known = ShuffleSampler(np.flatnonzero(source.pids > 0), 4, seed=settings.seed)
        free = FixedLength(ShuffleSampler(len(crops), 4, seed=settings.seed), len(known))
        self.register_buffer('known', torch.from_numpy(source.labels()))
        self.data, self.taught = self.loader(free), self.loader(known, crops=source)
        self.head = nn.Linear(8, source.n_ids)
    training_only = 'head.', 'labels', 'known'
    def epoch(self, n): return self.batches(self.data, n, self.taught)
    def loss(self, batch): return {'ce': F.cross_entropy(self.head(self.features(batch.source)), self.known[batch.source.index])}


@pytest.fixture
def run(monkeypatch, tmp_path):
    "Run the experiment of a class above"
    monkeypatch.setattr(experiments, 'recipe', lambda cls: (cls, small_settings(cls, epochs=1)))
    data = ReIDData(train=toy_crops(n_ids=8, n_cams=2, n_each=2), name='toy')
    return lambda cls, out='run', **k: experiments.run_experiment(cls, data, tmp_path / out, progress=False, **k)


def test_sources_are_read_or_refused_with_a_word(run):
    source = toy_crops(n_ids=6, n_cams=2, n_each=2, seed=1, name='source')
    pids = source.pids.copy()
    pids[::3] = UNKNOWN
    assert run(Two, source=source.replace(pids=pids)).card['source']['images'] == 16
    with pytest.raises(ValueError, match='no labelled training crop'): run(Two, source=source.replace(pids=None))
    with pytest.raises(ValueError, match='there twice'): run(Two, source=[source, source])
    with pytest.raises(ValueError, match='give at least one'): run(Two, source=[])
    with pytest.raises(ValueError, match='takes no source'): run(Toy, source=source)
    with pytest.raises(ValueError, match='source is needed'): run(Two)
    with pytest.raises(ValueError, match='other crops of a source'): run(Two, source=source[:20])


def test_tables_of_other_lengths_are_refused():
    class Long(Two):
        "No `FixedLength`"
        def __init__(self, settings, crops=None, source=None):
            super().__init__(settings, crops, source)
            self.data = self.loader(ShuffleSampler(len(crops), 4))
    m = Long(small_settings(Two), toy_crops(8), toy_crops(6, seed=1))
    with pytest.raises(ValueError, match='8 batches of the crops, 6 of the source in epoch 0: wrap both samplers'): m.epoch(0)


def test_the_source_may_be_the_crops():
    "Equal row numbers stand for equal crops; each table keeps its own batches"
    crops = toy_crops(n_ids=8, n_cams=2, n_each=2)
    m = Two(small_settings(Two), crops, crops)
    for b in m.epoch(1): assert torch.equal(crops_of(m, b.source), b.source.images) and torch.equal(crops_of(m, b), b.images)


def crops_of(m, batch):
    "Pixels of the rows of a batch, read one by one"
    return torch.stack([m.data.dataset[int(i)][0] for i in batch.index])


def test_a_source_that_is_no_table_is_refused(run):
    with pytest.raises((ValueError, TypeError), match='source'): run(Two, source='market')


def test_sources_without_names_have_a_name(run):
    nameless = [toy_crops(n_ids=6, n_cams=2, n_each=2, seed=k, name='') for k in (1, 2)]
    assert run(Two, source=nameless).card['source']['name'].strip(' +')


def test_a_resumed_run_does_not_say_that_it_began_elsewhere(run, tmp_path):
    run(Toy, 'other'), run(Toy)
    with pytest.raises(ValueError, match='began with other weights'): run(Toy, start=tmp_path / 'other')
    assert 'start' not in run(Toy).card
    begun = run(Toy, 'third', start=tmp_path / 'other')
    assert run(Toy, 'third').card['start'] == begun.card['start']   # without a word it goes on as it began


# Faults that a check of the contract must see

class DeadHead(Toy):
    "No loss reaches one of its modules"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.dead = nn.Linear(8, 8)


class Detached(Toy):
    "Its network gets no gradient"
    def features(self, batch): return super().features(batch).detach()


class NothingLearned(Toy):
    "Its only turn never has a term"
    def loss(self, batch): return {}


class OthersInBatch(Toy):
    "A feature depends on the crops that are embedded with it"
    def embed(self, images):
        f = super().embed(images)
        return F.normalize(f - f.mean(0), dim=1)


class ByPosition(Toy):
    "A distance depends on where a query stands"
    def distance(self, query, gallery): return super().distance(query, gallery) + torch.arange(len(query))[:, None]


class SamePlan(Toy):
    "Every epoch has the batches of the first"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        if crops is not None: self.data.batch_sampler.set_epoch = lambda n: None


class OneSeed(Toy):
    "Its batches do not depend on the seed"
    def __init__(self, settings, crops=None): super().__init__(dataclasses.replace(settings, seed=0), crops)


class ThawsLater(Toy):
    "Freezes its batch norm in the second epoch and goes on collecting statistics"
    def epoch(self, n):
        if n == 1: self.freeze('bn'); self.renew()
        return super().epoch(n)
    def loss(self, batch):
        self.bn.train()
        return super().loss(batch)


class LateTeacher(Toy):
    "From the second epoch its teacher follows batches, not steps"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.teacher = EMATeacher(self.net, keep=.5)
    def after_batch(self, batch):
        if self.n: self.after_step()
    def after_step(self): self.teacher.update(self.net)


class Brighter(torch.utils.data.Dataset):
    "Crops that grow brighter from epoch to epoch; worker processes keep the first epoch's"
    def __init__(self, crops): self.crops, self.n = crops, 0
    def set_epoch(self, n): self.n = n
    def __len__(self): return len(self.crops)
    def __getitem__(self, i): return torch.from_numpy(np.array(self.crops.image(int(i)))).permute(2, 0, 1) / 255 * (1 + self.n), int(i)


class StaleWorkers(Toy):
    "Its loader processes never hear of the second epoch"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        if crops is not None: self.data = self.loader(self.data.batch_sampler, dataset=Brighter(crops))


class MovesInLoss(Toy):
    "Its memory takes the batch before the loss compares with it"
    training_only = 'head.', 'labels', 'memory'
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        if crops is not None: self.register_buffer('memory', torch.zeros(3))
    def loss(self, batch):
        self.memory.lerp_(gather(batch.images.mean((0, 2, 3))[None]).mean(0), .5)
        return super().loss(batch) | {'near': self.net(self.memory).square().mean()}


class EpochZero(Toy):
    "What its loss needs is made in the first epoch and is in no state"
    def epoch(self, n):
        if n == 0: self.weight = 2.
        return super().epoch(n)
    def loss(self, batch):
        self.need_epoch()
        return {k: v * self.weight for k, v in super().loss(batch).items()}


SEEN = {'count': 0}


class InModule(Toy):
    "A count outside the object, set back where one is built"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        SEEN['count'] = 0
    def loss(self, batch):
        SEEN['count'] += 1
        return {k: v * (1 + .01 * SEEN['count']) for k, v in super().loss(batch).items()}


@pytest.mark.parametrize('cls', [EpochZero, InModule] + [bug(c, why=why) for c, why in [
    (NothingLearned, 'trains: 0 steps hold'), (DeadHead, 'no check asks for gradients'), (Detached, 'no check asks for gradients'),
    (OthersInBatch, 'saved: the same batches twice'), (ByPosition, 'saved: the same queries twice'),
    (SamePlan, 'no check compares epochs'), (OneSeed, 'no check compares seeds'), (ThawsLater, 'frozen: one epoch'),
    (LateTeacher, 'accumulates: one epoch'), (StaleWorkers, 'workers: one epoch'), (MovesInLoss, 'no check calls loss twice')]])
def test_planted_faults_are_found(cls):
    found = check_method(cls, only=QUICK, raises=False)
    assert found.bad, found


def test_two_processes_run_every_stage(monkeypatch):
    seen = set()
    class Counted(Toy):
        "Notes its epochs"
        def epoch(self, n):
            seen.add(n)
            return super().epoch(n)
    def none(*args, **kwargs): raise OSError('no process')
    monkeypatch.setattr(conformance.subprocess, 'Popen', none)
    check_method(Counted, only=('processes',), raises=False)
    assert seen == {0, 1, 2}


def test_a_check_ends_the_processes_it_began(monkeypatch):
    began, ended = [], []
    class Hangs:
        "A process that does not answer"
        returncode = None
        def __init__(self, *args, **kwargs): began.append(self)
        def poll(self): return 1 if self in ended else None
        def communicate(self, timeout=None):
            if self in ended: return '', ''
            raise subprocess.TimeoutExpired('python', timeout)
        def wait(self, timeout=None): return 1
        def kill(self): ended.append(self)
        terminate = kill
    monkeypatch.setattr(conformance.subprocess, 'Popen', Hangs)
    found, = check_method(Toy, only=('processes',), raises=False)
    assert found.ok is False and len(began) == 2 and set(ended) == set(began)
