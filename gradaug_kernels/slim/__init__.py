"""Networks of adjustable width: layers, conversion, fusion, statistics."""
