# The authors' BCN, with the batch of each GPU. No published row: they released
# weights without a figure.
_base_ = './resnet101_bcn-ws-all_4xb32-100e_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(mode='batch', momentum=0.1)))
custom_hooks = []
