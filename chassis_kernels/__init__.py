"""Streaming moments, delta-logit and KL kernels, each with an eager PyTorch reference. Needs torch alone to import."""

from chassis_kernels.affine_map import AffineMap, procrustes, stitch
from chassis_kernels.backends import BackendError, capabilities, use_backend
from chassis_kernels.bridge_project import Bridged, bridge_project
from chassis_kernels.bridge_table import BlockedTokens, BridgeTable
from chassis_kernels.chunks import Chunks
from chassis_kernels.concept_erasure import ConceptErasure
from chassis_kernels.delta_logits import delta_logits, delta_logits_, stack_adapters
from chassis_kernels.gold_kl import gold_kl
from chassis_kernels.linear_cka import StreamingCKA, linear_cka
from chassis_kernels.linear_kl import Delta, LinearKLStats, linear_kl, mean_probabilities
from chassis_kernels.linear_projection_kl import LinearProjectionKLStats, linear_projection_kl
from chassis_kernels.log_sums import log_sums
from chassis_kernels.moments import Moments, moments_update_, update_layers
from chassis_kernels.parallel.groups import Parallel
from chassis_kernels.projection_kl import ProjectionKLStats, projection_kl
from chassis_kernels.reduced_rank import ReducedRankRegression
from chassis_kernels.ridge import HeadMap, RidgeSolution, fit_ridge
from chassis_kernels.sparse import SparseProjection
from chassis_kernels.streaming_cca import StreamingCCA
from chassis_kernels.streaming_pca import StreamingPCA
from chassis_kernels.streaming_ridge import StreamingRidge
from chassis_kernels.streaming_ridge_cv import StreamingRidgeCV
from chassis_kernels.teacher import Teacher, TeacherHead, TopK
from chassis_kernels.token_kl import token_kl
from chassis_kernels.xtoken_config import TeacherConfig, XTokenConfig
from chassis_kernels.xtoken_loss import TeacherBatch, xtoken_loss

__all__ = [
    "AffineMap",
    "BackendError",
    "BlockedTokens",
    "BridgeTable",
    "Bridged",
    "Chunks",
    "ConceptErasure",
    "Delta",
    "HeadMap",
    "LinearKLStats",
    "LinearProjectionKLStats",
    "Moments",
    "Parallel",
    "ProjectionKLStats",
    "ReducedRankRegression",
    "RidgeSolution",
    "SparseProjection",
    "StreamingCCA",
    "StreamingCKA",
    "StreamingPCA",
    "StreamingRidge",
    "StreamingRidgeCV",
    "Teacher",
    "TeacherBatch",
    "TeacherConfig",
    "TeacherHead",
    "TopK",
    "XTokenConfig",
    "bridge_project",
    "capabilities",
    "delta_logits",
    "delta_logits_",
    "fit_ridge",
    "gold_kl",
    "linear_cka",
    "linear_kl",
    "linear_projection_kl",
    "log_sums",
    "mean_probabilities",
    "moments_update_",
    "procrustes",
    "projection_kl",
    "stack_adapters",
    "stitch",
    "token_kl",
    "update_layers",
    "use_backend",
    "xtoken_loss",
]
