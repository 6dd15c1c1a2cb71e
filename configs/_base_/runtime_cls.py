# Runtime of every classification config.
_base_ = './default_runtime.py'
default_scope = 'mmpretrain'
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook'),
)
# Every image has one size.
env_cfg = dict(cudnn_benchmark=True)
visualizer = dict(
    type='UniversalVisualizer',
    vis_backends=_base_.vis_backends,
    name='visualizer',
)
