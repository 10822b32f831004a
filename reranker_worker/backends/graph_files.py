"""Names of the files in which a graph and its weights are kept; apart, so that running a graph needs nothing that writes one."""

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.weights"
