"Every method keeps the contract, and a checker of planted faults finds each of them."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toy_method import Toy
from reidnb.core.distributed import gather
from reidnb.data.samplers import FixedLength, ShuffleSampler
from reidnb.methods.registry import RECIPES, recipe
from reidnb.networks.teacher import EMATeacher
from reidnb.training.conformance import CHECKS, check_method, small_settings
from reidnb.training.labelling import ClusterSettings

# What the small settings of a check do not know: sizes that a method's network needs, and switches that reach every stage
CHANGES = {
    'baseline-small': {}, 'qaconv-small': dict(epochs=2), 'scr-small': dict(epochs=2, height=96, width=48),
    'pcb-small': dict(epochs=2, height=96, width=48), 'ice-small': dict(keep=.9), 'spcl': {}, 'cap': dict(inter_from=1),
    'ecn-small': dict(embedding=32, neighbours=3, neighbours_from=1, styles='histogram'), 'ecn': dict(embedding=32, neighbours=3, memory='batch', frozen_stages=1),
    'iics-small': dict(intra_epochs=1, inter_epochs=1, per_camera=4, intra_clusters=6, inter_clusters=8),
    'camstyle-small': dict(channels=4, blocks=1, n_critic=2)}


def settings_of(name):
    cls, s = recipe(name)
    kept = {k: getattr(s, k) for k in s.__dataclass_fields__}
    small = small_settings(cls)
    return cls, type(s)(**kept | {k: getattr(small, k) for k in small.__dataclass_fields__
                                  if k in ('height', 'width', 'epochs', 'iterations', 'p', 'k', 'batch_size', 'k1', 'k2', 'eps')}
                        | {k: v for k, v in dict(backbone='small', weights='none', lr=1e-3, warmup=0, steps=(), decay='none').items() if k in kept}
                        | CHANGES[name])


def test_every_method_has_a_small_recipe_here():
    known = {recipe(n)[0] for n in CHANGES}
    assert {recipe(n)[0] for n in RECIPES} <= known, 'a method is not checked: name one of its recipes in CHANGES'


@pytest.mark.parametrize('name', CHANGES)
def test_methods_keep_the_contract(name):
    cls, settings = settings_of(name)
    found = check_method(cls, settings)
    assert [f.name for f in found] == list(CHECKS) and not found.bad


def test_the_toy_without_a_fault_passes():
    assert not check_method(Toy).bad


class PlainCounter(Toy):
    "A count that no checkpoint knows weighs the loss"
    count = 0
    def loss(self, batch):
        self.count += 1
        return {k: v * self.count for k, v in super().loss(batch).items()}


class PlainTeacher(Toy):
    "A teacher in a list is no part of the state"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.hidden = [EMATeacher(self.net, keep=.5)]
    def after_step(self): self.hidden[0].update(self.net)
    def loss(self, batch):
        x = batch.images.mean((2, 3))
        return super().loss(batch) | {'follow': (self.net(x) - self.hidden[0](x)).square().mean()}


class Drawn(Toy):
    "Draws from a generator of its own, which a checkpoint does not know"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.rng = np.random.default_rng(0)
    def loss(self, batch): return {k: v * self.rng.random() for k, v in super().loss(batch).items()}


class Replaced(Toy):
    "A new head each epoch, the old optimiser"
    def epoch(self, n):
        self.head = nn.Linear(8, self.crops.n_ids)
        yield from super().epoch(n)


class Unbuilt(Toy):
    "A head that a method built anew does not have"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.head = None
    def epoch(self, n):
        self.head = nn.Linear(8, self.crops.n_ids)
        self.renew()
        yield from super().epoch(n)


class OwnBatchOnly(Toy):
    "Compares the images of one process with each other only"
    def loss(self, batch):
        f = self.net(4 * batch.images.mean((2, 3)) - 2)
        return {'spread': (f[:, None] - f).square().mean()} | super().loss(batch)


class Gathered(Toy):
    "The same with the images of all: right"
    def loss(self, batch):
        f = gather(self.net(4 * batch.images.mean((2, 3)) - 2))
        return {'spread': (f[:, None] - f).square().mean()} | super().loss(batch)


class TeacherPerBatch(Toy):
    "Its teacher follows batches, not steps"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.teacher = EMATeacher(self.net, keep=.5)
    def after_batch(self, batch): self.after_step()
    def after_step(self): self.teacher.update(self.net)


class DrawsInLoader(Toy):
    "Augments from numpy's global generator, which worker processes do not share"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        if crops is None: return
        def noisy(image): return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 + np.random.rand() * torch.ones(1)
        self.data = self.loader(ShuffleSampler(np.flatnonzero(crops.pids > 0), 8, seed=settings.seed), transform=noisy)


class Overflows(Toy):
    "Is infinite in half precision"
    def loss(self, batch):
        f = self.features(batch)
        return super().loss(batch) | {'large': f.sum() * (float('inf') if f.dtype == torch.bfloat16 else 0.)
                                      if torch.is_autocast_enabled('cpu') else f.sum() * 0}


class Thaws(Toy):
    "Says that its batch norm is frozen and goes on collecting statistics"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.freeze('bn')
    def loss(self, batch):
        self.bn.train()
        return super().loss(batch)


class Unsaved(Toy):
    "Normalises by a number that the model file does not hold"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        self.scale = 1.
    def after_batch(self, batch): self.scale += .1
    def embed(self, images): return self.net(images.mean((2, 3))) * self.scale


class NeedsEpoch(Toy):
    "Labels come with the epoch; before it they are wrong and nobody is told"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        if crops is not None: self.labels.zero_()
    def epoch(self, n):
        self.labels.copy_(torch.from_numpy(self.crops.labels()))
        return super().epoch(n)


class Stumbles(NeedsEpoch):
    "Before the epoch an attribute is missing"
    def epoch(self, n):
        self.now = n
        return super().epoch(n)
    def loss(self, batch): return {k: v * (1 + 0 * self.now) for k, v in super().loss(batch).items()}


class NoCameras(Toy):
    "An index error where cameras are not known"
    def loss(self, batch):
        cams = torch.from_numpy(self.crops.cams)[batch.index]
        return super().loss(batch) | {'camera': 0 * torch.ones(self.crops.n_cams)[cams].sum()}


class TorchSpeaks(Toy):
    "Lets torch say what is missing"
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        if crops is not None and not crops.n_cams: torch.nn.functional.batch_norm(
            torch.zeros(1, 3), None, None, training=True)


class Bare(Toy):
    "A hook of its own without a docstring"
    def helper(self): return 1


FAULTS = [(PlainCounter, 'resumes'), (PlainTeacher, 'resumes'), (Drawn, 'resumes'), (Replaced, 'trains'), (Unbuilt, 'resumes'),
          (OwnBatchOnly, 'processes'), (TeacherPerBatch, 'accumulates'), (DrawsInLoader, 'workers'), (Overflows, 'half'),
          (Thaws, 'frozen'), (Unsaved, 'saved'), (NeedsEpoch, 'before'), (Stumbles, 'before'), (NoCameras, 'tables'),
          (TorchSpeaks, 'tables'), (Bare, 'documented')]


@pytest.mark.parametrize('cls,check', FAULTS, ids=[c.__name__ for c, _ in FAULTS])
def test_planted_faults_are_found(cls, check):
    found, = check_method(cls, only=(check,), raises=False)
    assert found.ok is False and found.note, found
    assert not check_method(Toy, only=(check,)).bad
    with pytest.raises(AssertionError, match=f'{cls.__name__} fails 1 of 1'): check_method(cls, only=(check,))


def test_what_is_right_is_not_called_a_fault():
    assert not check_method(Gathered, only=('processes',)).bad


class Two(Toy):
    "Two tables, as the contract page has them"
    def __init__(self, settings, crops=None, source=None):
        super().__init__(settings, crops)
        self.source = source
        if crops is None: return
        if source is None: raise ValueError('a source is needed')
        known = ShuffleSampler(np.flatnonzero(source.pids > 0), 4, seed=settings.seed)
        free = FixedLength(ShuffleSampler(len(crops), 4, seed=settings.seed), len(known))
        self.data, self.known = self.loader(free), self.loader(known, crops=source)
    def epoch(self, n): return self.batches(self.data, n, self.known)


class MixesRows(Two):
    "Reads the labels of the crops with the rows of the source: no row of the source may point beyond the crops"
    def loss(self, batch): return {'ce': F.cross_entropy(self.head(self.features(batch.source)), self.labels[batch.source.index])}


def test_a_source_is_drawn_where_the_method_takes_one():
    found = check_method(Two, only=('trains', 'resumes', 'workers', 'processes'))
    assert not found.bad and 'steps' in found[0].note


def test_half_precision_takes_the_gradient_of_a_gradient():
    class Penalty(Toy):
        "A gradient penalty"
        def loss(self, batch):
            x = batch.images.mean((2, 3)).requires_grad_()
            slope, = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return super().loss(batch) | {'penalty': (slope.float().norm(dim=1) - 1).square().mean()}
    assert not check_method(Penalty, only=('half', 'resumes')).bad


def test_clusters_settings_are_made_small():
    class Clustered(Toy):
        "Names the class of its settings"
        def __init__(self, settings: ClusterSettings, crops=None): super().__init__(settings, crops)
    s = small_settings(Clustered, p=2)
    assert isinstance(s, ClusterSettings) and (s.p, s.iterations, s.backbone) == (2, 4, 'small')
