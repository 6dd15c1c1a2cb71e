# The first half of a narrow ResNet-18, with temporal shift, on moving
# views of photographs.
_base_ = './dgcnn_k10_solids.py'
custom_imports = dict(imports=['video.tsm', 'video.motions'])
default_scope = 'mmpretrain'
data_root = 'data/photographs/'

model = dict(
    _delete_=True,
    type='TSM',
    num_classes=8,
    channels=32,
    dropout=0.0,
    backbone=dict(
        type='ResNet_CIFAR',
        depth=18,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        stem_channels=16,
        base_channels=16,
        norm_eval=False,
        # Frames meet in the branches alone, which must not begin with 0.
        zero_init_residual=False,
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
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005
    )
)
