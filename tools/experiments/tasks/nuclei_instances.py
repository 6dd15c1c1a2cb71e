"""The demo's Mask R-CNN on nuclei; with other estimates at the end, too."""

_base_ = (
    '../../../configs/demo/mask-rcnn_r18_fpn64_gn-ws-all_2xb1-4e_nuclei.py'
)

custom_imports = dict(
    imports=['experiments.hooks'], allow_failed_imports=False
)
custom_hooks = [dict(type='TrainModeGapHook'), dict(type='RecalibratedHook')]
