"""The demo's DeepLabV3 on nuclei; results by contrast, too."""

_base_ = (
    '../../../configs/demo/deeplabv3_r18-w32-d8_gn-ws-all_1xb1-1k_nuclei.py'
)

custom_imports = dict(
    imports=['experiments.contrast', 'experiments.hooks'],
    allow_failed_imports=False,
)
custom_hooks = [dict(type='TrainModeGapHook'), dict(type='RecalibratedHook')]
val_evaluator = dict(type='ContrastIoUMetric')
test_evaluator = val_evaluator
