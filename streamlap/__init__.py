"""streamlap compresses a huge language model on small hardware, one decoder layer at a time.

Importing it registers the loader with transformers, so that `AutoModelForCausalLM.from_pretrained` opens its
output; nothing else happens at import.
"""

from streamlap import hf_plugin as hf_plugin
from streamlap.allocate import Survey
from streamlap.errors import StreamlapError
from streamlap.evaluate import Evaluation, evaluate
from streamlap.export.dense import export_dense
from streamlap.inventory import inspect
from streamlap.loading import load
from streamlap.pipeline import compress
from streamlap.plan import Plan, plan
from streamlap.recipe import Calibration, Recipe
from streamlap.report import Report
from streamlap.resuming import resume
from streamlap.survey import survey
from streamlap.verification import verify
from streamlap.version import __version__

__all__ = [
    "Calibration",
    "Evaluation",
    "Plan",
    "Recipe",
    "Report",
    "StreamlapError",
    "Survey",
    "__version__",
    "compress",
    "evaluate",
    "export_dense",
    "inspect",
    "load",
    "plan",
    "resume",
    "survey",
    "verify",
]
