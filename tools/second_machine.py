"""Run the numeric tests as another machine would: one thread, and none of the vector instructions of this processor.

usage: python tools/second_machine.py [--pages] [arguments of pytest, such as -n 2]

torch, oneDNN, MKL, OpenBLAS and numpy choose their kernels by the processor, so sums are rounded in another order elsewhere.
Here each is told to use its plainest kernels; a test that fails held on to the rounding of one machine. `--pages` runs the
notebooks too. A file of tests is left out when numbers are not its subject, and a test when it compares runs on one machine.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_NUMERIC = {'ablations', 'bench', 'cli', 'collector', 'comparisons', 'conformance', 'datasets', 'datasets_property', 'house',
               'launch', 'loop_faults', 'report', 'site', 'viz'}

ONE_MACHINE = ('killed', 'same_bytes', 'full_sizes', 'processes_agree', 'loader_processes', 'every_switch')


def plain_kernels():
    "Environment variables under which every library computes as on a processor without vector instructions"
    code = ('import numpy as np; found = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", []); '
            'print(" ".join(found))')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    return dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX2',
                MKL_CBWR='COMPATIBLE', OPENBLAS_CORETYPE='Nehalem', NPY_DISABLE_CPU_FEATURES=found)


def files(pages):
    "Test files whose subject is numbers, and with `pages` the notebooks"
    tests = [p for p in sorted((ROOT / 'tests').glob('test_*.py')) if p.stem[5:] not in NOT_NUMERIC]
    return [*map(str, tests), *([str(ROOT / 'nbs')] if pages else [])]


if __name__ == '__main__':
    args = sys.argv[1:]
    pages = '--pages' in args
    chosen = [] if '-k' in args else ['-k', ' and '.join(f'not {k}' for k in ONE_MACHINE)]
    command = [sys.executable, '-m', 'pytest', *files(pages), *chosen, *(a for a in args if a != '--pages')]
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | plain_kernels()).returncode)
