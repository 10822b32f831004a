"""The engine: the process that owns the model (`child`, `scoring`) and the front's handle on it (`handle`, `restarts`)."""
