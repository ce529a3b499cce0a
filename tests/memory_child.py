"""Five steps of every memory and of a teacher, in one of several processes or alone.

usage: memory_child.py OUT        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set: one process of several
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from reidnb.networks.memory import (
    CameraProxyMemory, ClassMapMemory, ClusterProxyMemory, ExemplarMemory, HybridMemory)
from reidnb.core.distributed import global_batch_norm, rank_size
from reidnb.networks.teacher import EMATeacher

N, D, B = 30, 8, 12
torch.set_num_threads(1)


def run():
    "Memories, students and teacher after five steps, and what a broken batch in the last process raises"
    rank, world = rank_size()
    part = slice(rank * B // world, (rank + 1) * B // world)
    g = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=g)
    labels, cams = torch.arange(N) % 5 - 1, torch.arange(N) % 3
    memories = nn.ModuleDict(dict(
        assign=ClassMapMemory(4, (D,)), averaged=ClassMapMemory(4, (D,), keep=.5), exemplar=ExemplarMemory(N, D),
        hybrid=HybridMemory(N, D), cluster=ClusterProxyMemory(D), camera=CameraProxyMemory(D)))
    memories['hybrid'].rebuild(features, labels)
    memories['cluster'].rebuild(features, labels)
    memories['camera'].rebuild(features, labels, cams)
    torch.manual_seed(1)
    net = global_batch_norm(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 4)))
    student = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    teachers = nn.ModuleDict({b: EMATeacher(student, keep=.9, buffers=b) for b in ('own', 'copy', 'ema')})
    opt = torch.optim.SGD(net.parameters(), .1)
    for _ in range(5):
        index = torch.randint(0, N, (B,), generator=g)
        index[B // 2:] = torch.where(torch.rand(B // 2, generator=g) < .5, index[:B // 2], index[B // 2:])  # across
        f = torch.randn(B, D, generator=g)[part].requires_grad_()
        i, y, c = index[part], labels[index][part], cams[index][part]
        for k in ('assign', 'averaged'): memories[k].update(f, y)
        memories['exemplar'].update(f, i, keep=.4)
        memories['hybrid'].update(f, i)
        memories['cluster'].update(f, y, keep=.5)
        memories['camera'].update(f, y, c)
        opt.zero_grad()
        F.cross_entropy(student(f.detach()), y.clamp(min=0)).backward()
        opt.step()
        for t in teachers.values(): t(f.detach()), t.update(student)
    bad = f.detach().clone()
    if rank == world - 1: bad[-1, 0] = float('nan')
    try: memories['exemplar'].update(bad, i)
    except ValueError as e: error = str(e)
    return dict(memories=memories.state_dict(), teachers=teachers.state_dict(), student=net.state_dict(), error=error)


if __name__ == '__main__':
    dist.init_process_group('gloo')
    torch.save(run(), Path(sys.argv[1]) / f'{os.environ["RANK"]}.pt')
    dist.destroy_process_group()
