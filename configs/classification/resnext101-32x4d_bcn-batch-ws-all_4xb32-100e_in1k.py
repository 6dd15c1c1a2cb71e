# The authors' BCN, with the batch of each GPU. No published row: they released
# nothing of this network.
_base_ = './resnext101-32x4d_bcn-ws-all_4xb32-100e_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(mode='batch', momentum=0.1)))
custom_hooks = []
