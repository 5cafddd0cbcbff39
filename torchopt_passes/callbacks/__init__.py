"""The training side: one class a file, one object for every loop."""

from __future__ import annotations

from torchopt_passes.callbacks.add_early_exits import AddEarlyExits
from torchopt_passes.callbacks.attach import Session, attach
from torchopt_passes.callbacks.base import Callback
from torchopt_passes.callbacks.batch_norm_slimming import BatchNormSlimming
from torchopt_passes.callbacks.compression_aware_lr import CompressionAwareLR
from torchopt_passes.callbacks.distill.cache import TeacherCache
from torchopt_passes.callbacks.distill.cache_writer import cache_teacher
from torchopt_passes.callbacks.distill.feature_losses import FSP, RKD, AttentionTransfer, Cosine, Hint
from torchopt_passes.callbacks.distill.logit_losses import DIST, DKD, JSD, SoftTargets
from torchopt_passes.callbacks.distill.relation_losses import AttentionRelations, ValueRelations
from torchopt_passes.callbacks.distill.self_teachers import AveragedWeights, DeeperLayers, InitialWeights
from torchopt_passes.callbacks.distill.sequences import teacher_sequences
from torchopt_passes.callbacks.distill.sim_kd import SimKD
from torchopt_passes.callbacks.distill.teachers import Teacher
from torchopt_passes.callbacks.distillation import Distillation
from torchopt_passes.callbacks.drop_filter import DropFilter
from torchopt_passes.callbacks.early_exit_model import EarlyExitModel
from torchopt_passes.callbacks.gradual_bits import GradualBits
from torchopt_passes.callbacks.gradual_channel_pruning import GradualChannelPruning
from torchopt_passes.callbacks.gradual_pruning import GradualPruning
from torchopt_passes.callbacks.group_lasso import GroupLasso
from torchopt_passes.callbacks.group_variance import GroupVariance
from torchopt_passes.callbacks.growing_regularization import GrowingRegularization
from torchopt_passes.callbacks.information_bottleneck import InformationBottleneck
from torchopt_passes.callbacks.items import num_items_in_batch
from torchopt_passes.callbacks.keep_zeros import KeepZeros
from torchopt_passes.callbacks.l0_channel_pruning import L0ChannelPruning
from torchopt_passes.callbacks.l0_pruning import L0Pruning
from torchopt_passes.callbacks.l1_penalty import L1Penalty
from torchopt_passes.callbacks.l2_penalty import L2Penalty
from torchopt_passes.callbacks.lifecycle import Epochs, LossTerm, Progress
from torchopt_passes.callbacks.lightning import lightning_callback
from torchopt_passes.callbacks.lottery_ticket import LotteryTicket
from torchopt_passes.callbacks.orthogonality import Orthogonality
from torchopt_passes.callbacks.quantization_noise import QuantizationNoise
from torchopt_passes.callbacks.quantization_schedule import QuantizationSchedule
from torchopt_passes.callbacks.rigl import RigL
from torchopt_passes.callbacks.scheduled import Scheduled
from torchopt_passes.callbacks.sensitivity_pruning import SensitivityPruning
from torchopt_passes.callbacks.set_sparsity import SET
from torchopt_passes.callbacks.soft_movement_pruning import SoftMovementPruning
from torchopt_passes.callbacks.splicing import Splicing
from torchopt_passes.callbacks.student_call import StudentCall

__all__ = [
    "DIST",
    "DKD",
    "FSP",
    "JSD",
    "RKD",
    "SET",
    "AddEarlyExits",
    "AttentionRelations",
    "AttentionTransfer",
    "AveragedWeights",
    "BatchNormSlimming",
    "Callback",
    "CompressionAwareLR",
    "Cosine",
    "DeeperLayers",
    "Distillation",
    "DropFilter",
    "EarlyExitModel",
    "Epochs",
    "GradualBits",
    "GradualChannelPruning",
    "GradualPruning",
    "GroupLasso",
    "GroupVariance",
    "GrowingRegularization",
    "Hint",
    "InformationBottleneck",
    "InitialWeights",
    "KeepZeros",
    "L0ChannelPruning",
    "L0Pruning",
    "L1Penalty",
    "L2Penalty",
    "LossTerm",
    "LotteryTicket",
    "Orthogonality",
    "Progress",
    "QuantizationNoise",
    "QuantizationSchedule",
    "RigL",
    "Scheduled",
    "SensitivityPruning",
    "Session",
    "SimKD",
    "SoftMovementPruning",
    "SoftTargets",
    "Splicing",
    "StudentCall",
    "Teacher",
    "TeacherCache",
    "ValueRelations",
    "attach",
    "cache_teacher",
    "lightning_callback",
    "num_items_in_batch",
    "teacher_sequences",
]
