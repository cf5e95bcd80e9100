"""The value model of Value-Guided Search: model, losses, and a scorer of growing traces."""

from classifier_lib.device_memory import ScoringOutOfMemory
from classifier_lib.modeling import (
    LABEL_CORRECT,
    Qwen2ForClassifier,
    bradley_terry_loss,
    resolve_attn_implementation,
    rollout_loss,
    success_probs,
)
from classifier_lib.scoring import ValueScorer

__all__ = [
    "LABEL_CORRECT",
    "Qwen2ForClassifier",
    "ScoringOutOfMemory",
    "ValueScorer",
    "bradley_terry_loss",
    "resolve_attn_implementation",
    "rollout_loss",
    "success_probs",
]
