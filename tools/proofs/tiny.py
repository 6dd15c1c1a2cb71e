"""A tiny detector and a tiny segmentor, and data for both.

The real scripts train and test them within seconds on a CPU.
"""

import json
from pathlib import Path

import cv2
import numpy as np

DET = """
default_scope = 'mmdet'
norm_cfg = dict(type='ws_mm.BCN', num_groups=4)
conv_cfg = dict(type='ws_mm.WSConv2d')
anchors = dict(
    type='AnchorGenerator',
    scales=[8],
    ratios=[0.5, 1.0],
    strides=[4, 8, 16, 32, 64],
)
box_coder = dict(type='DeltaXYWHBBoxCoder')
assigner = dict(
    type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5
)
sampler = dict(
    type='RandomSampler', num=16, pos_fraction=0.5, add_gt_as_proposals=True
)
proposals = dict(
    nms_pre=50,
    max_per_img=20,
    min_bbox_size=0,
    nms=dict(type='nms', iou_threshold=0.7),
)
extractor = dict(
    type='SingleRoIExtractor',
    roi_layer=dict(type='RoIAlign', output_size=7),
    out_channels=8,
    featmap_strides=[4, 8, 16, 32],
)
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor', pad_mask=True, pad_size_divisor=32
    ),
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        norm_eval=False,
        conv_cfg=conv_cfg,
        norm_cfg=norm_cfg,
    ),
    neck=dict(
        type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5
    ),
    rpn_head=dict(
        type='RPNHead',
        in_channels=8,
        feat_channels=8,
        anchor_generator=anchors,
        bbox_coder=box_coder,
    ),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=extractor,
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            in_channels=8,
            fc_out_channels=16,
            roi_feat_size=7,
            num_classes=1,
            bbox_coder=box_coder,
        ),
        mask_roi_extractor=extractor,
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=8,
            conv_out_channels=8,
            num_classes=1,
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=assigner,
            # Boxes of the truth are no anchors: indices would run over.
            sampler=dict(sampler, add_gt_as_proposals=False),
            pos_weight=-1,
            allowed_border=-1,
        ),
        rpn_proposal=proposals,
        rcnn=dict(
            assigner=assigner, sampler=sampler, mask_size=14, pos_weight=-1
        ),
    ),
    test_cfg=dict(
        rpn=proposals,
        rcnn=dict(
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=5,
            mask_thr_binary=0.5,
        ),
    ),
)
load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
]
dataset = dict(
    type='CocoDataset',
    data_root='DATA',
    ann_file='instances.json',
    data_prefix=dict(img='images'),
    metainfo=dict(classes=('square',)),
    filter_cfg=dict(filter_empty_gt=True),
    pipeline=[*load, dict(type='PackDetInputs')],
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dataset,
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        test_mode=True,
        data_root='DATA',
        ann_file='instances.json',
        data_prefix=dict(img='images'),
        metainfo=dict(classes=('square',)),
        pipeline=[
            load[0],
            dict(type='Resize', scale=(64, 64), keep_ratio=True),
            load[1],
            dict(
                type='PackDetInputs',
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
            ),
        ],
    ),
)
test_evaluator = dict(
    type='CocoMetric',
    ann_file='DATA/instances.json',
    metric=['bbox', 'segm'],
)
test_cfg = dict(type='TestLoop')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1),
    visualization=dict(type='DetVisualizationHook'),
)
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
)
randomness = dict(seed=0)
"""

SEG = """
default_scope = 'mmseg'
norm_cfg = dict(type='ws_mm.BCN', num_groups=4)
data_preprocessor = dict(type='SegDataPreProcessor', size=(64, 64))
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='ResNetV1c',
        depth=18,
        base_channels=8,
        stem_channels=8,
        conv_cfg=dict(type='ws_mm.WSConv2d'),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=64,
        in_index=3,
        channels=8,
        num_convs=1,
        num_classes=2,
        norm_cfg=norm_cfg,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
dataset = dict(
    type='BaseSegDataset',
    data_root='DATA',
    img_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='masks'),
    metainfo=dict(
        classes=('back', 'square'), palette=[[0, 0, 0], [255, 0, 0]]
    ),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ],
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dataset,
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dataset,
)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_cfg = dict(type='TestLoop')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
)
randomness = dict(seed=0)
"""


def write_data(folder: Path, images: int = 2) -> Path:
    """Bright squares on dark noise, as COCO JSON and as masks."""
    rng = np.random.default_rng(0)
    for name in ('images', 'masks'):
        (folder / name).mkdir(parents=True)
    coco = dict(images=[], annotations=[])
    coco['categories'] = [dict(id=1, name='square')]
    for index in range(images):
        image = rng.integers(0, 60, (64, 64, 3), np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        x, y, side = 8 + 4 * index, 12, 32
        image[y : y + side, x : x + side] += 150
        mask[y : y + side, x : x + side] = 1
        name = f'{index}.png'
        cv2.imwrite(str(folder / 'images' / name), image)
        cv2.imwrite(str(folder / 'masks' / name), mask)
        coco['images'].append(
            dict(id=index, file_name=name, height=64, width=64)
        )
        right, low = x + side, y + side
        coco['annotations'].append(
            dict(
                id=index + 1,
                image_id=index,
                category_id=1,
                bbox=[x, y, side, side],
                area=side * side,
                iscrowd=0,
                segmentation=[[x, y, right, y, right, low, x, low]],
            )
        )
    (folder / 'instances.json').write_text(json.dumps(coco))
    return folder


def write_config(folder: Path, text: str = DET, extra: str = '') -> Path:
    """A config on the data of ``folder``; it is written there, too."""
    config = folder / 'tiny.py'
    config.write_text(text.replace('DATA', str(folder)) + extra)
    return config
