"""Models: loading, the attention seam, the stage a run trains, generation.

Importing it makes the families of `zoo/` known to transformers' Auto classes.
"""

import luthier.models.zoo.register as _register  # noqa: F401
