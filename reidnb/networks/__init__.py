"Backbones, norms, partitions, memories, teachers."
from reidnb import _face

__getattr__, __dir__, __all__ = _face(__name__, {
    'weights': 'load_weights LoadReport',
    'backbones': 'make_backbone Backbone Encoder Classifier GlobalPool',
    'norms': 'convert_norms',
    'attention': 'add_se add_residual_attention grad_cam',
    'partitions': 'MultiBranch Architecture scr pcb asymmetric plot_architecture',
    'frames': 'sample_frames temporal_pool tracklet_features',
    'memory': 'ClassMapMemory ExemplarMemory HybridMemory ClusterProxyMemory CameraProxyMemory',
    'teacher': 'EMATeacher',
    'extraction': 'extract'})
