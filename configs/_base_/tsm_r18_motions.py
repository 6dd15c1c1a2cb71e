# A narrow ResNet-18 with temporal shift on a moving view of photographs.
_base_ = './dgcnn_k10_solids.py'
custom_imports = dict(imports=['video.tsm', 'video.motions'])
default_scope = 'mmpretrain'
data_root = 'data/photographs/'

model = dict(
    _delete_=True,
    type='TSM',
    num_classes=8,
    channels=128,
    dropout=0.0,
    backbone=dict(
        type='ResNet',
        depth=18,
        stem_channels=16,
        base_channels=16,
        norm_eval=False,
        norm_cfg=dict(type='BN'),
    ),
)
clips = dict(_delete_=True, type='MovingPhotographs', data_root=data_root)
train_dataloader = dict(
    dataset=dict(clips, data_prefix=dict(img='train'), length=4000, seed=0)
)
val_dataloader = dict(
    dataset=dict(clips, data_prefix=dict(img='val'), length=800, seed=1)
)
test_dataloader = val_dataloader
