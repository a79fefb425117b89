"""Named builders with keyword options: looking names up and checking options, for data sets, models and presets."""

import difflib
import inspect


def nearest(kind, name, names):
    """The sentence that answers an unknown name: `unknown preset "quickstat"; the nearest is "quickstart"`."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f'unknown {kind} "{name}"; the nearest is "{close[0]}"' if close else f'unknown {kind} "{name}"'


def keyword_options(function):
    """The keyword-only parameters of `function` as {name: default}: the options that a configuration may set."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def printable(text):
    """`text` with what a terminal would obey (control characters and the like) as escape sequences, on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
