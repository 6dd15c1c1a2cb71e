# BCN from estimates and WS. No published row with this schedule.
_base_ = './vgg16_gn-ws-all_1xb128-200e_cifar10.py'
model = dict(
    backbone=dict(
        norm_cfg=dict(_delete_=True, type='ws_mm.BCN', num_groups=32)
    )
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
