"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -1.107,
            "slope": 1.0,
            "factor": 3.38,
            "worst": 5.75,
            "smallest": 0.0798,
            "largest": 1.5416,
            "cells": 7,
        },
        "kl": {
            "intercept": -0.785,
            "slope": 0.91,
            "factor": 2.22,
            "worst": 3.08,
            "smallest": 0.0798,
            "largest": 1.5416,
            "cells": 7,
        },
    },
    "default": {
        "excess": {
            "intercept": -1.423,
            "slope": 1.28,
            "factor": 1.32,
            "worst": 1.71,
            "smallest": 0.0158,
            "largest": 1.0296,
            "cells": 11,
        },
        "kl": {
            "intercept": -1.062,
            "slope": 1.062,
            "factor": 1.31,
            "worst": 1.62,
            "smallest": 0.0158,
            "largest": 1.0296,
            "cells": 11,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
