"""Fast weights in models of Hugging Face's transformers: as an attention function, or in place of attention.

`register` adds attention functions that transformers knows by name, such as `attn_implementation="fwp_linear"`.
`convert` swaps the self-attention of a causal language model for fast weights with a state of constant size, and
`transfer` trains the swapped layers to do what attention did. `install` runs models that have fast weights already on
ours. `FwpForCausalLM` is `fwp.models.Decoder` as a model of transformers.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("fwp.interop.transformers: expected transformers ≥ 5.23, pip install 'fwp[hf]'") from error
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    raise ImportError(
        f"fwp.interop.transformers: expected transformers ≥ 5.23, pip install 'fwp[hf]', got {transformers.__version__}"
    )

from fwp.interop.transformers.attention import register
from fwp.interop.transformers.cache import FastWeightCacheLayer
from fwp.interop.transformers.conversion import convert, original
from fwp.interop.transformers.distill import Contribution, Losses, contribution, transfer
from fwp.interop.transformers.model import FwpConfig, FwpForCausalLM
from fwp.interop.transformers.serve import FAMILIES, install, uninstall

__all__ = [
    "FAMILIES",
    "Contribution",
    "FastWeightCacheLayer",
    "FwpConfig",
    "FwpForCausalLM",
    "Losses",
    "contribution",
    "convert",
    "install",
    "original",
    "register",
    "transfer",
    "uninstall",
]
