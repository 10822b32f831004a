"""ONNX Runtime with its telemetry off; whoever needs the runtime imports it from here.

Its Linux wheels (1.31) write an identifier of the device below ~/.cache/Microsoft when they are imported, and look for a server of their
maker's. A worker beside a database does neither. The runtime reads the variable once, while it is imported.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as _untyped

runtime: Any = _untyped  # its types are few
