"Labels of one, two and three processes are equal bit for bit, and an error reaches all of them."
from pathlib import Path

import pytest
import torch

from children import finish, start, start_world

CHILD = '''
import os, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from reidnb.networks.backbones import Encoder, make_backbone
from reidnb.data.toys import toy_crops
from reidnb.training.labelling import pseudo_labels, shared_features
if int(os.environ.get("WORLD_SIZE", 1)) > 1: dist.init_process_group("gloo")
torch.manual_seed(0)
net, toy = Encoder(make_backbone("small")), toy_crops(8, 2, 3)
options = dict(height=64, width=32, batch_size=10, k1=8, k2=2)
out = {n: shared_features(net, toy[:n], height=64, width=32, batch_size=10) for n in (48, 41, 11, 3)}
out["labels"] = pseudo_labels(net, toy, eps=.5, **options).labels
try: pseudo_labels(net, toy, eps=.5, min_samples=49, **options)
except ValueError as e: out["error"] = str(e)
torch.save(out, f"{sys.argv[1]}/{os.environ.get('RANK', 0)}.pt")
if dist.is_initialized(): dist.destroy_process_group()
'''


def run(folder, world):
    folder.mkdir()
    script = ['-c', CHILD]
    finish(start_world(script, folder, world=world) if world > 1 else start(script, folder))
    return [torch.load(folder / f'{r}.pt', weights_only=True) for r in range(world)]


@pytest.fixture(scope='module')
def alone(tmp_path_factory): return run(Path(tmp_path_factory.mktemp('labels')) / 'one', 1)[0]


@pytest.mark.parametrize('world', [2, 3])
def test_processes_agree(alone, tmp_path, world):
    for out in run(tmp_path / 'several', world):
        assert out.keys() == alone.keys() and 'lower min_samples' in out['error'] == alone['error']
        for k in alone:
            if k != 'error': assert torch.equal(out[k], alone[k]), k
