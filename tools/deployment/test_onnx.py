"""Evaluate the ONNX file of a segmentor, from tools/deployment/export.py.

The config's data set, data_preprocessor and metrics; onnxruntime in place of
the model. ws_mm is not needed.
"""

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import checks, launch
from support.checks import SetupError


def parse_args() -> argparse.Namespace:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('onnx', help='file of tools/deployment/export.py')
    launch.add_common_options(parser)
    return parser.parse_args()


def register(path: str) -> None:
    """Register a segmentor of mmseg whose logits onnxruntime computes.

    Args:
        path: ONNX file with an input ``image`` and one output, the logits.

    Raises:
        SetupError: onnxruntime does not take the file, or it is of a model
            with other outputs.
    """
    import onnxruntime
    from mmseg.models import BaseSegmentor
    from mmseg.registry import MODELS

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=['CPUExecutionProvider']
        )
    except Exception as error:
        raise SetupError(
            f'onnxruntime cannot read {path}: {str(error)[:300]}'
        ) from error
    outputs = [output.name for output in session.get_outputs()]
    if outputs != ['logits']:
        raise SetupError(
            f'{path} has the outputs {", ".join(outputs)}; that of a '
            'segmentor has one, logits. Export it with '
            'tools/deployment/export.py.'
        )

    class OnnxSegmentor(BaseSegmentor):
        def __init__(
            self, data_preprocessor: dict, align_corners: bool, threshold: Any
        ) -> None:
            super().__init__(data_preprocessor)
            # What postprocess_result reads.
            self.align_corners = align_corners
            self.decode_head = SimpleNamespace(threshold=threshold)

        def encode_decode(self, inputs: Any, batch_data_samples: Any) -> Any:
            logits = session.run(None, {'image': inputs.cpu().numpy()})[0]
            return torch.from_numpy(logits).to(inputs)

        def predict(self, inputs: Any, data_samples: Any = None) -> Any:
            logits = self.encode_decode(inputs, data_samples)
            return self.postprocess_result(logits, data_samples)

        def extract_feat(self, inputs: Any) -> Any:
            raise NotImplementedError

        loss = _forward = extract_feat

    MODELS.register_module(module=OnnxSegmentor, force=True)


def main() -> None:
    """Check everything, then evaluate."""
    args = parse_args()
    needed = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    cfg = launch.load_config(args, needed)
    if cfg.get('default_scope') != 'mmseg':
        raise SetupError(
            f'default_scope = {cfg.get("default_scope")!r}: whole models are '
            'exported of segmentors (mmseg) only.'
        )
    mode = cfg.model.test_cfg.get('mode', 'whole')
    if mode != 'whole':
        raise SetupError(
            f'model.test_cfg.mode = {mode!r}: only whole images can be '
            'evaluated: --cfg-options model.test_cfg.mode=whole'
        )
    if not os.path.isfile(args.onnx):
        raise SetupError(
            f'No file {args.onnx}.{checks.did_you_mean(args.onnx, "*.onnx")}'
        )
    checks.check_data(cfg, ('test_dataloader',))
    checks.check_writable(cfg.work_dir, '--work-dir')
    init_default_scope('mmseg')
    register(args.onnx)
    head = cfg.model.decode_head
    head = head[-1] if isinstance(head, list) else head
    cfg.model = ConfigDict(
        type='OnnxSegmentor',
        data_preprocessor=cfg.model.data_preprocessor,
        align_corners=head.get('align_corners', False),
        threshold=head.get('threshold') or 0.3,
    )
    # Hooks act on layers, and this model has none.
    cfg.custom_hooks = []
    cfg.load_from = None
    cfg.resume = False
    launch.set_up_processes(cfg)
    runner = launch.build_runner(cfg)
    launch.build_loops(runner, ('test',))
    launch.gather_in_work_dir(runner, 'test')
    runner.test()


if __name__ == '__main__':
    launch.run(main)
