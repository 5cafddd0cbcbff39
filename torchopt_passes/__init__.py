"""torchopt_passes: make PyTorch models small and fast, with every rewrite proven.

```python
import torchopt_passes as top

graph = top.capture(model, (x,))                                   # a trainable graph of your model
result = top.PruneWeights(sparsity=0.5)(graph)                     # rewritten in place, and proven
print(result.report)                                               # what changed, what did not, and why
result.plan.save("plan.json")                                      # a plan that applies to your own module too
artifact = top.export(graph, "model.onnx", example_inputs=(x,))    # verified before it is put in place
```

Names are imported when they are first used: importing the package costs little beyond torch.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

# The public names stand in __init__.pyi alone: type checkers read it, and the lazy imports are made from it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
