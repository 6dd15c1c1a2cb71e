# No published row: BCN from estimates has no published VOC result.
_base_ = './deeplabv3_r101-d16_bcn-sync-ws-all_8xb2-50e_voc12aug-513x513.py'
norm_cfg = dict(mode='estimate')
model = dict(
    backbone=dict(norm_cfg=norm_cfg), decode_head=dict(norm_cfg=norm_cfg)
)
custom_hooks = [dict(type='ws_mm.SyncEstimatesHook')]
expected = None  # that of the base is of another batch
