"""A corpus of files through a model on the machines of a Ray cluster: `encode`, `classify`.

Importing this loads neither Ray nor torch: a worker says how their threads wait and how many there are before that.
`import ray` in here is Ray, since imports name whole paths.
"""

from __future__ import annotations

from fastbert.ray.run import Written, classify, encode

__all__ = ["Written", "classify", "encode"]
