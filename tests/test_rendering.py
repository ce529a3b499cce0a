"""Property and fault tests of people, bodies and rendering; the notebooks hold the examples."""
import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from reidnb.world.bodies import JOINTS, PARTS, PRIMITIVES
from reidnb.world.people import sample_people, SEASONS
from reidnb.world.rendering import body_projection, rasterise, render, sweep_bounds, sweep_table, to_images

PEOPLE = {s: sample_people(60, seed=9, season=s) for s in SEASONS}
angle = st.floats(-20, 20)
quick = settings(max_examples=25, deadline=None)


def depth_of(ends, radii, shape, n=32, half=1.5):
    "Depth buffer of one primitive on an n by n window"
    axis = (torch.arange(n) + .5)/n*2*half - half
    args = [torch.as_tensor(a, dtype=torch.float32)[None, None] for a in (ends, radii, shape)]
    table = sweep_table(*args, torch.tensor([2*half/n]))
    return rasterise(table, sweep_bounds(*args), axis[:, None], axis.flip(0)[:, None]), axis


@quick
@given(st.sampled_from(SEASONS), st.integers(0, 59), angle, angle, st.floats(-.3, 1.2), st.floats(0, 1.5),
       st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(.1, 5), st.floats(.3, 3)))
def test_any_view_is_finite(season, who, phase, yaw, pitch, stride, box):
    "Whatever the pose and the window, values are finite and in range, and parts agree with the silhouette"
    r = render(PEOPLE[season], [who], [phase], [yaw], pitch=pitch, stride=stride, box=torch.tensor([box]),
               height=48, width=24, truth=True)
    for t in (r.rgb, r.alpha, r.depth, r.joints2d, r.joints3d): assert t.isfinite().all()
    assert 0 <= r.rgb.min() and r.rgb.max() <= 1 and 0 <= r.alpha.min() and r.alpha.max() <= 1
    assert ((r.parts > 0) == (r.alpha > .5)).all() and r.parts.max() < len(PARTS)
    assert r.joints2d.shape == (1, len(JOINTS), 2)


@quick
@given(st.lists(st.floats(-.6, .6), min_size=6, max_size=6), st.floats(.05, .6), st.floats(.05, .6), st.integers(0, 10**6))
def test_depth_against_ellipsoids(ends, r0, r1, seed):
    "The closed form is the nearest of many ellipsoids, for any ends, sizes and tilt"
    g = torch.Generator().manual_seed(seed)
    shape = torch.eye(3) + .4*torch.randn(3, 3, generator=g)
    if torch.linalg.det(shape).abs() < .2: shape = torch.eye(3)
    ends, radii = torch.tensor(ends).view(2, 3), torch.tensor([r0, r1])
    S = shape @ shape.T
    length = (torch.linalg.inv(torch.linalg.cholesky(S[:2, :2])) @ (ends[1, :2] - ends[0, :2])).norm()
    if length < 1.1*abs(r1 - r0) + .02: return            # one end hides the other: a documented approximation
    buf, axis = depth_of(ends, radii, shape)
    t, inv = torch.linspace(0, 1, 500)[:, None], torch.linalg.inv(shape)
    y, x = torch.meshgrid(axis.flip(0), axis, indexing='ij')
    a = (torch.stack([x, y, 0*x], -1).view(-1, 1, 3) - (ends[0] + t*(ends[1] - ends[0]))) @ inv.T
    b, r = inv[:, 2], (radii[0] + t*(radii[1] - radii[0]))[:, 0]
    p, q = (a @ b)/(b @ b), ((a*a).sum(-1) - r**2)/(b @ b)
    z = torch.where(p*p > q, (p*p - q).clamp(min=0).sqrt() - p, -torch.inf).amax(1).view(32, 32)
    mine, hit = buf.depth[..., 0], z.isfinite() & (buf.edge[..., 0] > .3)
    assert (mine - z)[hit].abs().max() < .02 if hit.any() else True
    assert (z.isfinite() != (buf.edge[..., 0] > 0)).float().mean() < .02


def test_chunk_and_order_do_not_matter():
    "A crop is the same alone, in a chunk and in another order"
    people, n = PEOPLE['winter'], 30
    who, g = torch.arange(n), torch.Generator().manual_seed(1)
    phase, yaw = torch.rand(2, n, generator=g)*6.28
    full = render(people, who, phase, yaw, height=64, width=32)
    back = render(people, who.flip(0), phase.flip(0), yaw.flip(0), height=64, width=32, chunk=7)
    assert (full.rgb - back.rgb.flip(0)).abs().mean() < 1e-3
    assert (full.alpha - back.alpha.flip(0)).abs().max() < .05
    alone = torch.cat([render(people, [i], phase[i:i + 1], yaw[i:i + 1], height=64, width=32).alpha for i in range(n)])
    assert (full.alpha - alone).abs().max() < .05


CODE = ("import hashlib, torch; torch.set_num_threads({threads}); from reidnb.world.people import *; "
        "from reidnb.world.rendering import *; p = sample_people(40, 3); n = torch.arange(40); "
        "print(hashlib.sha1(to_images(render(p, n, n*.7, n*1.3)).tobytes()).hexdigest())")


def test_same_bytes_in_two_processes():
    "One seed gives one picture, byte for byte, in every process"
    out = [subprocess.run([sys.executable, '-c', CODE.format(threads=1)], capture_output=True, text=True, check=True).stdout
           for _ in range(2)]
    assert out[0] == out[1] and len(out[0].strip()) == len(hashlib.sha1().hexdigest())


@pytest.mark.parametrize('season', SEASONS)
def test_people_do_not_depend_on_n(season):
    "Row i is the same in tables of any length"
    a, b = sample_people(7, 5, season=season), sample_people(300, 5, season=season)
    assert [a.describe(i) for i in range(7)] == [b.describe(i) for i in range(7)]
    assert torch.equal(a.colour, b.colour[:7]) and torch.equal(a.twin, b.twin[:7])


def test_no_knee_through_a_skirt():
    "Seen from the front, thighs stay behind long skirts"
    from reidnb.world.people import LOWERS
    p = sample_people(600, 2)
    p = p[p.lower == list(LOWERS).index('long skirt')]
    n = len(p)
    r = render(p, torch.arange(n), torch.arange(n)*.8, torch.zeros(n), truth=True)
    thigh = (r.parts == PARTS.index('left thigh')) | (r.parts == PARTS.index('right thigh'))
    assert n > 5 and thigh.float().mean() < .002


def test_smallest_crop_and_faults():
    "16 by 16 works, less is refused; so are other wrong arguments"
    p = PEOPLE['summer']
    assert to_images(render(p, [0], [0.], [0.], height=16, width=16)).shape == (1, 16, 16, 3)
    assert body_projection(p, [0], [0.], [0.], 16, 16).shape == (1, 1, 16, 16)
    for bad in (dict(height=15), dict(width=15), dict(box=torch.tensor([[0., 0., 0., 1.]])), dict(pitch=float('inf')),
                dict(light=torch.ones(3, 3)), dict(box=torch.ones(2, 4))):
        with pytest.raises(ValueError): render(p, [0], [0.], [0.], **bad)
    for who in ([-1], [60], []):
        with pytest.raises(ValueError): render(p, who, [0.], [0.])


def test_every_primitive_is_seen():
    "Somebody in a crowd shows each primitive's part"
    p = sample_people(200, 4, season='winter')
    n = torch.arange(200)
    r = render(p, n, n*.9, n*1.7, height=64, width=32, truth=True)
    assert set(r.parts.unique().tolist()) == set(range(len(PARTS))) and len(PRIMITIVES) == 33
