"""Train the small network of the package without any identity or camera: it learns to say what single crops show.

usage: OMP_NUM_THREADS=1 nice -n 10 python tools/pretrain_attributes.py [--people 12000] [--epochs 12] [--out DIR]
writes reidnb/weights/attributes.safetensors (half precision; `weights='attributes'` starts from it) and
data/results/attributes/harbour.json (its card). A run that is stopped goes on when started again.

Every crop shows another person, alone or beside people who are in no other crop, so there is no link to learn from.
The crops come from many camera networks of the harbour with random people of their own; cameras are not given.
The targets are what the renderer drew: kinds of garments, patterns, and colours as the nearest of the palette.
How the person is turned or steps is no target: it differs between two crops of one person, and a feature for
re-identification should not hold it.
"""
import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from reidnb.data.crops import Crops
from reidnb.data.samplers import ShuffleSampler
from reidnb.data.transforms import test_transform, train_transform
from reidnb.methods.baseline import Baseline, BaselineSettings
from reidnb.networks.backbones import Encoder
from reidnb.practice.opening import open_data
from reidnb.training.cards import make_card, write_card
from reidnb.training.loop import fit, read_log
from reidnb.training.method import Method
from reidnb.training.models import load_model, save_model
from reidnb.training.scoring import score
from reidnb.training.settings import Count, EncoderSettings, Part, Positive, Whole
from reidnb.world.people import BAGS, HAIRS, HATS, LOWERS, MATERIALS, PALETTE_RGB, PATTERNS, PRINTS, SHOES, UPPERS
from reidnb.world.plans import plan_site
from reidnb.world.sites import render_plan

ROOT = Path(__file__).parent.parent
UNSEEN = -100 # Target of what a crop does not show
TRAIN, HELD = 1000, 900 # First seeds of the camera networks that are learned from, and of those held out
_COLOURED = [m for m in MATERIALS if m != 'sole']
CLASSES = {'upper': len(UPPERS), 'lower': len(LOWERS), 'shoe': len(SHOES), 'bag': len(BAGS), 'hat': len(HATS),
           'hair': len(HAIRS), 'scarf': 2, 'open': 2, 'woman': 2, 'child': 2, 'print': len(PRINTS),
           'upper pattern': len(PATTERNS), 'lower pattern': len(PATTERNS), 'second colour': len(PALETTE_RGB),
           **{f'{m} colour': len(PALETTE_RGB) for m in _COLOURED}} # Attribute -> number of its classes


def attributes(people, yaw):
    "What a crop of each person shows, turned by `yaw` (0: faces the camera): classes `(N,A)`, `UNSEEN` where hidden"
    m = MATERIALS.index
    near = lambda linear: torch.cdist(linear**(1/2.2), torch.as_tensor(PALETTE_RGB, dtype=torch.float32)).argmin(1)
    turn = torch.as_tensor(np.abs((yaw + np.pi) % (2*np.pi) - np.pi))
    front, back = turn < np.pi/3, turn > 2*np.pi/3
    dress, bare = people.upper == list(UPPERS).index('dress'), people.hat == 0
    child = (people.head > 1.13) & (people.height < 1.5)
    short = torch.tensor([k in ('shorts', 'mini skirt', 'skirt') for k in LOWERS])[people.lower] | dress
    pattern = people.pattern[:, m('upper')]
    two = ~torch.tensor([p in ('plain', 'quilted', 'mottled') for p in PATTERNS])[pattern]
    value = dict(upper=people.upper, lower=people.lower, shoe=people.shoe, bag=people.bag, hat=people.hat,
                 hair=people.hair, scarf=people.scarf, open=people.open > 0, woman=people.femme > .5, child=child,
                 print=torch.where(front, people.print[:, 0], people.print[:, 1]))
    value |= {'upper pattern': pattern, 'lower pattern': people.pattern[:, m('lower')],
              'second colour': near(people.colour2[:, m('upper')]),
              **{f'{k} colour': near(people.colour[:, m(k)]) for k in _COLOURED}}
    seen = {'lower': ~dress, 'lower pattern': ~dress, 'lower colour': ~dress, 'hair': bare, 'woman': ~child,
            'open': ~back, 'print': front | back, 'second colour': two, 'hose colour': short,
            'hair colour': people.hair > 0, 'inner colour': front & (people.open > 0), 'bag colour': people.bag > 0,
            'hat colour': ~bare, 'scarf colour': people.scarf > 0}
    return torch.stack([torch.where(seen.get(k, front | True), value[k].long(), UNSEEN) for k in CLASSES], 1)


def single_crops(n, seed, size=(128, 64), each=1000):
    "`n` crops of `n` people from camera networks `seed`, `seed+1`, ...; one crop of those who walk together"
    images, targets, who, k = [], [], [], seed
    while len(images) < n:
        plan, people, look, _ = plan_site('harbour', each, 2, k, per_id=4)
        rows = np.random.default_rng([k, 404]).permutation(np.flatnonzero(plan.part == 0))
        rows = rows[people.twin[plan.person[rows]].numpy() < 0]   # nobody in another's garments
        rows = rows[np.sort(np.unique(plan.group[rows], return_index=True)[1])][:n - len(images)]
        p = plan[rows]
        images += render_plan(p, people, look, *size)
        targets.append(attributes(people[torch.as_tensor(p.person)], p.ground[:, 2]))
        who.append(np.stack([p.person, p.beside], 1) + np.where(np.stack([p.person, p.beside], 1) < 0, 0, 10**5*k))
        k += 1
    extra = dict(targets=torch.cat(targets).numpy(), who=np.concatenate(who))
    return Crops(images, np.arange(n) + 1, None, extra=extra, name=f'harbour/single crops from seed {seed}')


def facts(crops):
    "Counts of a table for its card: crops, people in the middle of one, people in all, camera networks"
    who = crops.extra['who']
    return dict(images=len(crops), ids=crops.n_ids, seen=len(np.unique(who[who >= 0])),
                networks=len(np.unique(who[:, 0]//10**5)), fingerprint=crops.fingerprint())


@dataclass(frozen=True)
class AttributeSettings(EncoderSettings):
    "Settings of `Attributes`"
    backbone:str='small' # Network
    weights:str='none' # Random weights
    epochs:Count=12 # Epochs
    height:Count=128 # Height of the input, pixels
    width:Count=64 # Width of the input, pixels
    lr:Positive=2e-3 # Learning rate after warm-up
    warmup:Whole=1 # Epochs of warm-up
    decay:str='cosine' # How `lr` falls
    batch_size:Count=64 # Crops in a batch
    flip:Part=.5 # Probability of a mirror image
    pad:Whole=5 # Zero padding before the random crop, pixels
    erase:Part=.5 # Probability of erasing


class Attributes(Method):
    "Say what one crop shows: a linear classifier an attribute on the BN-neck, cross entropy and nothing else"
    training_only = ('heads.',)
    def __init__(self, settings, crops=None):
        super().__init__(settings, crops)
        s = settings
        self.encoder = Encoder(self.new_backbone(), pooling=s.pooling)
        if crops is None: return
        self.heads = nn.Linear(self.encoder.dim, sum(CLASSES.values()))
        self.register_buffer('targets', torch.as_tensor(crops.extra['targets']), persistent=False)
        self.data = self.loader(ShuffleSampler(len(crops), s.batch_size, seed=s.seed),
                                train_transform(s.height, s.width, flip=s.flip, pad=s.pad, erase=s.erase))

    def epoch(self, n): return self.batches(self.data, n)

    def embed(self, images): return self.encoder.embed(images)

    def logits(self, images):
        "Scores of the classes of each attribute"
        return dict(zip(CLASSES, self.heads(self.encoder(images)[1]).float().split(list(CLASSES.values()), 1)))

    def loss(self, batch):
        "Minus the log-likelihood of what a crop shows, attribute by attribute"
        y = self.targets[batch.index]
        return {k: F.cross_entropy(z, y[:, i], ignore_index=UNSEEN, reduction='sum')/len(y)
                for i, (k, z) in enumerate(self.logits(batch.images).items())}


@torch.inference_mode()
def accuracy(method, crops, train):
    "Attribute -> share of the crops that show it named right; that of the commonest class of `train`; how many"
    read, said = test_transform(method.settings.height, method.settings.width), []
    for rows in np.array_split(np.arange(len(crops)), max(1, len(crops)//64)):
        z = method.eval().logits(torch.stack([read(crops.image(int(i))) for i in rows]))
        said.append(torch.stack([v.argmax(1) for v in z.values()], 1))
    said, y, known, out = torch.cat(said).numpy(), crops.extra['targets'], train.extra['targets'], {}
    for i, k in enumerate(CLASSES):
        on = y[:, i] != UNSEEN
        if not on.any(): continue
        common = np.bincount(known[:, i][known[:, i] != UNSEEN], minlength=1).argmax()
        out[k] = dict(right=float((said[on, i] == y[on, i]).mean()), common=float((y[on, i] == common).mean()),
                      crops=int(on.sum()))
    return out


def for_use(method):
    "The same encoder as a model file of the package can hold it: a `Baseline` without its classifier"
    s = method.settings
    model = Baseline(BaselineSettings(backbone=s.backbone, weights='none', height=s.height, width=s.width,
                                      seed=s.seed, pooling=s.pooling))
    model.encoder.load_state_dict(method.encoder.state_dict())
    return model


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--people', type=int, default=12000)
    p.add_argument('--held', type=int, default=1500)
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--out', type=Path, default=Path('runs/attributes'))
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    start = time.perf_counter()
    train, held = single_crops(a.people, TRAIN), single_crops(a.held, HELD)
    seconds = {'prepare': time.perf_counter() - start}
    print(f'{train}\n{held}\n{seconds["prepare"]:.0f} s', flush=True)
    torch.manual_seed(a.seed)
    settings = AttributeSettings(epochs=a.epochs, seed=a.seed)
    method = Attributes(settings, train)
    fit(method, a.out)
    seconds |= {'train': sum(r['seconds'] for r in read_log(a.out) if 'images' in r), 'cpu': time.process_time()}
    right = accuracy(method, held, train)
    for k, v in right.items(): print(f'{k:16} {v["right"]:.3f}  commonest {v["common"]:.3f}  of {v["crops"]}')
    path = save_model(for_use(method).half(), ROOT/'reidnb'/'weights'/'attributes.safetensors')
    again = open_data('world:harbour', n_train=300, n_test=100, seed=0)   # the test people of small's card
    found = score(load_model(path), again)
    print(f'harbour {found}\n{path.name}: {path.stat().st_size/1e6:.2f} MB')
    data = dict(name='world:harbour, single crops', train=facts(train), held=facts(held))
    metrics = {'attributes': right, 'harbour': found.to_dict()}
    card = make_card('attributes', settings, data, metrics, seconds, a.seed)
    write_card(card, ROOT/'data'/'results'/'attributes'/'harbour.json')
