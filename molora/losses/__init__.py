"""Routing losses: pure functions of recorded routing decisions, chosen by name in `routing_losses`."""

from molora.losses.adaptive import adapted_coefficients
from molora.losses.batch_entropy import batch_entropy
from molora.losses.coefficients import coefficient_at, coefficient_problem, is_scheduled, settings_of
from molora.losses.consistency import consistency
from molora.losses.expert_contrastive import expert_contrastive
from molora.losses.expert_orthogonality import expert_orthogonality, output_orthogonality
from molora.losses.gate_contrastive import gate_contrastive
from molora.losses.importance import importance
from molora.losses.l1_sparsity import l1_sparsity, next_coefficient
from molora.losses.load import load
from molora.losses.load_balancing import load_balancing
from molora.losses.localized_balancing import localized_balancing
from molora.losses.mutual_information import mutual_information
from molora.losses.options import Choice, Group, Number
from molora.losses.parameter_penalty import parameter_penalty
from molora.losses.registry import (
    ADAPTIVE,
    LAYER_REDUCTION,
    LOGITS,
    LOSSES,
    TASK_IDS,
    LossInputs,
    RoutingLoss,
    loss_needs,
    option_problem,
)
from molora.losses.router_entropy import router_entropy
from molora.losses.router_orthogonality import router_orthogonality
from molora.losses.router_z import router_z
from molora.losses.routing_contrastive import routing_contrastive
from molora.losses.total import total_loss

__all__ = [
    "ADAPTIVE",
    "LAYER_REDUCTION",
    "LOGITS",
    "LOSSES",
    "TASK_IDS",
    "Choice",
    "Group",
    "LossInputs",
    "Number",
    "RoutingLoss",
    "adapted_coefficients",
    "batch_entropy",
    "coefficient_at",
    "coefficient_problem",
    "consistency",
    "expert_contrastive",
    "expert_orthogonality",
    "gate_contrastive",
    "importance",
    "is_scheduled",
    "l1_sparsity",
    "load",
    "load_balancing",
    "localized_balancing",
    "loss_needs",
    "mutual_information",
    "next_coefficient",
    "option_problem",
    "output_orthogonality",
    "parameter_penalty",
    "router_entropy",
    "router_orthogonality",
    "router_z",
    "routing_contrastive",
    "settings_of",
    "total_loss",
]
