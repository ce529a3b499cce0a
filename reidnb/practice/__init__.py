"Open data, search, run, report, compare."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'opening': 'open_data open_source',
    'gallery': 'Gallery compare_images show_hits',
    'report': 'write_report',
    'experiments': 'run_experiment report_run',
    'benchmarks': 'bench',
    'ablations': 'run_grid grid_table plot_grid',
    'comparisons': 'compare Side read_comparison'})
