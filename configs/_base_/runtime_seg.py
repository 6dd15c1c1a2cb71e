# Runtime of every segmentation config.
_base_ = './default_runtime.py'
default_scope = 'mmseg'
default_hooks = dict(
    checkpoint=dict(save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'),
)
# Every training crop has one size.
env_cfg = dict(cudnn_benchmark=True)
visualizer = dict(
    type='SegLocalVisualizer',
    vis_backends=_base_.vis_backends,
    name='visualizer',
)
tta_model = dict(type='SegTTAModel')
