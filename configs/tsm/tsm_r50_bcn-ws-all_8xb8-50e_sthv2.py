# No published row: BCN has no published result on this data.
_base_ = './tsm_r50_gn-ws-all_8xb8-50e_sthv2.py'
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ws_mm.WSConv2d', eps_mode='inside'),
        norm_cfg=dict(
            _delete_=True,
            type='ws_mm.BCN',
            num_groups=32,
            mode='estimate',
            outer_affine='group',
        ),
        init_cfg=dict(
            checkpoint='https://www.cs.jhu.edu/~syqiao/BatchChannelNormalization/rn50_bcn_ws.pth',
        ),
    )
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
