# No published row: the authors published R101 only.
_base_ = [
    '../_base_/models/deeplabv3_r50-d16.py',
    '../_base_/datasets/voc12aug_513.py',
    '../_base_/schedules/schedule_voc_50e.py',
    '../_base_/runtime_seg.py',
]
norm_cfg = dict(type='SyncBN')
model = dict(
    backbone=dict(
        norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    decode_head=dict(norm_cfg=norm_cfg),
)
