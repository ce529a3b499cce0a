"Crops as tables, and everything between a folder and a batch."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'crops': 'Crops ReIDData concat DISTRACTOR JUNK UNKNOWN',
    'toys': 'toy_crops',
    'splits': 'split_ids split_query_gallery reserve join',
    'folders': 'from_folder from_csv from_regex make_data',
    'checks': 'validate check Finding',
    'video': 'tracklets Tracklets tracklet_data by_tracklet is_video',
    'transforms': 'train_transform test_transform pipeline RandomErasing Views',
    'items': 'CropDataset Row',
    'samplers': 'PKSampler ShuffleSampler CameraDiversePK MoreCameraPK PerCameraParallel FixedLength',
    'loading': 'EpochLoader BatchDataset BatchAugment Pixels batch_form training_items'})

import reidnb.data.checks  # noqa: E402,F401  gives `ReIDData` its method `validate`
