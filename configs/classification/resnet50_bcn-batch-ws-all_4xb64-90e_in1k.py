# The authors' BCN, with the batch of each GPU. No published row: they released
# weights without a figure.
_base_ = './resnet50_bcn-ws-all_4xb64-90e_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(mode='batch', momentum=0.1)))
custom_hooks = []
