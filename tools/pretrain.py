"""Train the small network that comes with the package, on a site that no example of the book is tested on.

usage: python tools/pretrain.py [--people 300] [--epochs 24] [--out runs/harbour]
writes reidnb/weights/small.safetensors (half precision) and data/results/small/harbour.json (its card).
A run that is stopped goes on when started again.
"""
import argparse
from pathlib import Path

import torch

from reidnb.training.cards import write_card
from reidnb.training.models import load_model, save_model
from reidnb.training.scoring import score
from reidnb.methods.registry import recipe
from reidnb.practice.experiments import run_experiment
from reidnb.practice.opening import open_data

ROOT = Path(__file__).parent.parent

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--people', type=int, default=300)
    p.add_argument('--epochs', type=int, default=24)
    p.add_argument('--out', type=Path, default=Path('runs/harbour'))
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    data = open_data('world:harbour', n_train=a.people, n_test=100, seed=a.seed)
    print(data, flush=True)
    _, settings = recipe('baseline-small', weights='none', epochs=a.epochs, warmup=2, decay='cosine', lr=2e-3, p=16,
                         seed=a.seed)
    result = run_experiment('baseline-small', data, a.out, settings)
    print(f'before training  {result.before.metrics}\nafter training   {result.metrics}')
    method = load_model(a.out).half()   # without the classifier; 16 bits halve the file
    path = save_model(method, ROOT / 'reidnb' / 'weights' / 'small.safetensors')
    again = score(load_model('small'), data)
    print(f'from the file    {again}\n{path.name}: {path.stat().st_size / 1e6:.2f} MB, '
          f'{sum(x.numel() for x in method.parameters()):,} parameters, torch {torch.__version__}')
    write_card(result.card | {'file_mAP': float(again.mAP)}, ROOT / 'data' / 'results' / 'small' / 'harbour.json')
