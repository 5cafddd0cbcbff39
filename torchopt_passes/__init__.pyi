from .errors import CallbackError as CallbackError
from .errors import CaptureError as CaptureError
from .errors import ConfigError as ConfigError
from .errors import ExportError as ExportError
from .errors import MissingExtraError as MissingExtraError
from .errors import PassError as PassError
from .errors import PlanError as PlanError
from .errors import ProofError as ProofError
from .errors import TorchOptError as TorchOptError
from .errors import VerificationError as VerificationError
from .graph.base import GraphPass as GraphPass
from .graph.base import PassContext as PassContext
from .graph.base import PassResult as PassResult
from .graph.base import on_copy as on_copy
from .graph.edit import Edit as Edit
from .graph.edit import Skip as Skip
from .graph.pipeline import Pipeline as Pipeline
from .graph.plan import Plan as Plan
from .graph.pruning import MaskWeights as MaskWeights
from .graph.pruning import PruneWeights as PruneWeights
from .graph.registry import make_pass as make_pass
from .graph.registry import pass_types as pass_types
from .graph.report import PassReport as PassReport
from .graph.report import Proof as Proof
from .graph.report import ReportRow as ReportRow

__version__: str
