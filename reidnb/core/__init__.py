"Files, checkpoints, processes, costs, figures: what every floor above stands on."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'files': 'list_images write_atomic',
    'checkpoints': 'seed_everything random_state set_random_state save_checkpoint load_checkpoint',
    'distributed': 'rank_size join_processes gather on_main average_gradients broadcast_state global_batch_norm',
    'costs': 'Peak peak_memory',
    'figures': 'PALETTE contact_sheet',
    'notebook': 'show_image'})
