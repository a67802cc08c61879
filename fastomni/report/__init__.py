"""Metrics of a run: computed, printed, kept as JSON lines and TensorBoard events, and drawn."""

from fastomni.report.metrics import group_metrics, loss_metrics, recall_scores, update_metrics
from fastomni.report.stage import StageReport

__all__ = ["StageReport", "group_metrics", "loss_metrics", "recall_scores", "update_metrics"]
