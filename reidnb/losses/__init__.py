"Every loss beside its equation."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'metric': 'pairwise_distance triplet batch_hard_triplet hard_triplet focal_bce',
    'identity': 'cross_entropy camera_cross_entropy inter_camera_loss scr_loss ArcFace CenterLoss '
        'ClassMemoryLoss',
    'contrastive': 'info_nce invariance_loss agnostic_proxy_loss camera_proxy_loss hard_instance_loss '
        'view_invariance_loss',
    'hybrid': 'hybrid_loss intra_camera_loss',
    'distillation': 'soft_cross_entropy soft_triplet target_loss consistency_loss',
    'multilabel': 'mmcl_targets mmcl_loss'})
