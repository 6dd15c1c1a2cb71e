"""Classification of point clouds and clips: loss, predictions, accuracy."""

from collections import defaultdict
from statistics import mean
from typing import Any

import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from torch import Tensor

from support.checks import SetupError


class Classifier(BaseModel):
    """Softmax classifier; what inherits computes ``scores(inputs)``."""

    label_smoothing = 0.0

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        mode: str = 'tensor',
    ) -> Any:
        """Scores, their loss, or what the metric compares."""
        scores = self.scores(inputs)
        if mode == 'tensor':
            return scores
        if labels.max() >= scores.shape[1]:
            raise SetupError(
                f'A label is {labels.max()}, and model.num_classes='
                f'{scores.shape[1]}: set that to the classes of the data.'
            )
        if mode == 'loss':
            smoothing = self.label_smoothing
            loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
            return {'loss': loss}
        pairs = zip(labels.tolist(), scores.argmax(1).tolist(), strict=True)
        return [{'label': label, 'predicted': p} for label, p in pairs]


@METRICS.register_module()
class ClassAccuracy(BaseMetric):
    """Percentage of right predictions: of all, and the mean of classes."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keep label and prediction of each sample."""
        self.results += [(s['label'], s['predicted']) for s in data_samples]

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict:
        """Return ``accuracy`` and ``class_accuracy``."""
        right = defaultdict(list)
        for label, predicted in results:
            right[label].append(100.0 * (label == predicted))
        return {
            'accuracy': mean(hit for hits in right.values() for hit in hits),
            'class_accuracy': mean(map(mean, right.values())),
        }
