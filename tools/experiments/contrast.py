"""Contrast of an image (its std): transforms and metrics by contrast."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import METRICS, TRANSFORMS
from mmseg.evaluation.metrics import IoUMetric

THIRDS = ('low', 'middle', 'high')
# Of ImageNet, as the data preprocessors of the configs have them.
LEVELS, SPREAD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def by_contrast(
    values: Sequence[float], contrasts: Sequence[float]
) -> dict[str, float]:
    """Mean of the values in each third of the images, by contrast."""
    order = np.argsort(contrasts, kind='stable')
    parts = np.array_split(order, len(THIRDS))
    return {
        f'contrast/{name}': mean(values[i] for i in part)
        for name, part in zip(THIRDS, parts, strict=True)
        if len(part)
    }


@METRICS.register_module()
class ContrastIoUMetric(IoUMetric):
    """The host's metric, and each image's own IoU by thirds of contrast.

    Convention: the contrast is that of the file, before any transform; an
        image's IoU is the mean over the classes that it or its prediction
        has, in percent.
    """

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keep areas and contrast of every image of a batch."""
        before = len(self.results)
        super().process(data_batch, data_samples)
        for i, sample in enumerate(data_samples, before):
            contrast = float(mmcv.imread(sample['img_path']).std())
            self.results[i] = self.results[i], contrast

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """The host's numbers, and three more."""
        areas = [area for area, _ in results]
        own = []
        for intersection, union, *_ in areas:
            there = union > 0
            iou = intersection[there] / union[there]
            own.append(100 * iou.mean().item())
        thirds = by_contrast(own, [contrast for _, contrast in results])
        return {**super().compute_metrics(areas), **thirds}


@TRANSFORMS.register_module()
class StandardizeImage(BaseTransform):
    """Give every image the mean and deviation that the network expects."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Standardize over all values of the image, channels together."""
        image = results['img'].astype(np.float32)
        image = (image - image.mean()) / max(float(image.std()), 1e-3)
        # The pipeline's images are BGR, the levels RGB.
        image = image * np.float32(SPREAD[::-1]) + np.float32(LEVELS[::-1])
        results['img'] = image
        return results
