"""torch.fx's tracer, one at a time: while it traces, nn.Module's call and attribute access are its own, for all."""

import threading

from torch import fx

_LOCK = threading.RLock()


class Tracer(fx.Tracer):
    """Traces one model at a time in a process; modules that other threads call meanwhile run as ever."""

    def trace(self, root, concrete_args=None):
        with _LOCK:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
