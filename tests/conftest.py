"""Shape and dtype checks for the solver, and one thread, so that timings and rounding don't depend on the machine."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
# Has to come before the first import of the solver; without the hook its annotations cost nothing.
install_import_hook("thanos_lightning.solver", "beartype.beartype")
