"""State audit: what ran against what was asked, read from the live module and from the steps, never from the config.

Each function returns facts by name. Nothing here measures: the passes that are gated exactly are over, or are only looked
at through module hooks, and what those compute is in no count. Knows nothing of sessions, records' verdicts and judging.
"""

from __future__ import annotations

from hpc_core.audit.attention import attention_facts
from hpc_core.audit.feed import feed_facts
from hpc_core.audit.forwards import StepSeen, audited_step, watch_forwards
from hpc_core.audit.generation import generation_facts
from hpc_core.audit.loss import loss_facts
from hpc_core.audit.modules import module_facts
from hpc_core.audit.trainables import trainable_facts
from hpc_core.audit.training import Ran, training_facts
from hpc_core.audit.tuned import tuned_facts
from hpc_core.audit.values import value_facts
from hpc_core.audit.weights import weight_facts

__all__ = [
    "Ran",
    "StepSeen",
    "attention_facts",
    "audited_step",
    "feed_facts",
    "generation_facts",
    "loss_facts",
    "module_facts",
    "trainable_facts",
    "training_facts",
    "tuned_facts",
    "value_facts",
    "watch_forwards",
    "weight_facts",
]
