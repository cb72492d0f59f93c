"""streamlap compresses a huge language model on small hardware, one decoder layer at a time.

Importing it registers the loader with transformers, so that `AutoModelForCausalLM.from_pretrained` opens its
output; nothing else happens at import, but that torch is asked to keep little of what it makes for products of one shape.
"""

import os

# oneDNN, and torch above it, keep what they made for products of a shape, half a MiB or more each, by default of a thousand
# shapes. Where every layer gets widths of its own, memory would grow by layers. They look at this while torch is imported.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")

from streamlap.errors import StreamlapError
from streamlap.loader import hf_plugin as hf_plugin
from streamlap.loader import modeling_nas as modeling_nas
from streamlap.output.inspect import inspect
from streamlap.output.load import load
from streamlap.output.report import Report
from streamlap.output.verify import verify
from streamlap.pipeline.adapt import Recovered
from streamlap.pipeline.compress import compress
from streamlap.pipeline.evaluate import Evaluation, evaluate
from streamlap.pipeline.export import export, export_dense
from streamlap.pipeline.recover import recover
from streamlap.pipeline.resume import resume
from streamlap.pipeline.survey import survey
from streamlap.pipeline.tasks import evaluate_tasks
from streamlap.planning.plan import Plan
from streamlap.planning.preview import plan
from streamlap.planning.survey_file import Survey
from streamlap.recipe import Calibration, Recipe
from streamlap.settings import RunSettings
from streamlap.version import __version__

__all__ = [
    "Calibration",
    "Evaluation",
    "Plan",
    "Recipe",
    "Recovered",
    "Report",
    "RunSettings",
    "StreamlapError",
    "Survey",
    "__version__",
    "compress",
    "evaluate",
    "evaluate_tasks",
    "export",
    "export_dense",
    "inspect",
    "load",
    "plan",
    "recover",
    "resume",
    "survey",
    "verify",
]
