# BCN from estimates and WS. No published row: a model for a CPU.
_base_ = './resnet18-w32_gn-ws-all_1xb16-10e_cifar10subset.py'
model = dict(
    backbone=dict(
        norm_cfg=dict(_delete_=True, type='ws_mm.BCN', num_groups=16)
    )
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
